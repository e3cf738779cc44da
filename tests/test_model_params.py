"""Settings of pretraining: the original's names and defaults, the presets, and what is refused."""

import re
from pathlib import Path

import attr
import pytest

from model_params import PRESETS, BYOLParams, ModelParams, VICRegParams
from self_supervised.fields import expanded
from self_supervised.runs.run_options import RunOptions

WITHOUT_NEGATIVES = {"use_negative_examples_from_batch": False, "use_negative_examples_from_same_view": False}

# The listing in the original's README: users rely on every name and default.
ORIGINAL = {
    "encoder_arch": "resnet18", "shuffle_batch_norm": False, "dataset_name": "stl10", "batch_size": 256,
    "K": 65536, "dim": 128, "m": 0.996, "T": 0.2,
    "eqco_alpha": 65536, "use_eqco_margin": False, "use_negative_examples_from_batch": False,
    "lr": 0.5, "momentum": 0.9, "weight_decay": 1e-4, "max_epochs": 320, "final_lr_schedule_value": 0.0,
    "transform_s": 0.5, "transform_apply_blur": True,
    "use_momentum_schedule": False, "loss_type": "ce", "use_negative_examples_from_queue": True,
    "use_both_augmentations_as_queries": False, "optimizer_name": "sgd", "lars_warmup_epochs": 1, "lars_eta": 1e-3,
    "exclude_matching_parameters_from_lars": [], "loss_constant_factor": 1,
    "use_vicreg_loss": False, "use_lagging_model": True, "use_unit_sphere_projection": True,
    "invariance_loss_weight": 25.0, "variance_loss_weight": 25.0, "covariance_loss_weight": 1.0,
    "variance_loss_epsilon": 1e-4,
    "projection_mlp_layers": 2, "prediction_mlp_layers": 0, "mlp_hidden_dim": 512,
    "mlp_normalization": None, "prediction_mlp_normalization": "same", "use_mlp_weight_standardization": False,
    "num_data_workers": 4, "drop_last_batch": True, "pin_data_memory": True,
}  # fmt: skip


def test_every_field_and_default_of_the_original():
    params = ModelParams()
    assert {name: getattr(params, name) for name in ORIGINAL} == ORIGINAL
    # Two defaults are inferred: the width of the encoder, and whether there are processes to gather from.
    assert params.embedding_dim is None and params.gather_keys_for_queue is None
    ModelParams(embedding_dim=512, gather_keys_for_queue=False)


def test_the_originals_recipes():
    by_hand = ModelParams(
        prediction_mlp_layers=2,
        mlp_normalization="bn",
        loss_type="ip",
        use_negative_examples_from_queue=False,
        use_both_augmentations_as_queries=True,
        use_momentum_schedule=True,
        optimizer_name="lars",
        exclude_matching_parameters_from_lars=[".bias", ".bn"],
        loss_constant_factor=2,
    )
    assert by_hand == BYOLParams()
    cifar = VICRegParams(
        dataset_name="cifar10", transform_apply_blur=False, mlp_hidden_dim=2048, dim=2048, batch_size=256, lr=0.3,
        final_lr_schedule_value=0, weight_decay=1e-4, lars_warmup_epochs=10, lars_eta=0.02,
    )  # fmt: skip
    assert cifar.loss_type == "vic" and not cifar.use_lagging_model and cifar.crop_size == 32 and cifar.low_resolution
    imagenet = ModelParams(encoder_arch="resnet50", shuffle_batch_norm=True, embedding_dim=2048, mlp_hidden_dim=2048,
                           dataset_name="imagenet", batch_size=32, lr=0.03, max_epochs=200, transform_crop_size=224,
                           num_data_workers=32, gather_keys_for_queue=True)  # fmt: skip
    assert imagenet.crop_size == 224 and not imagenet.low_resolution


def test_the_method_table():
    """The rows of settings are those of the README's table of methods."""
    rows = {
        "moco_v2": ([(0, 1)], True, (True, False, False), True, 0, "ce"),
        "eqco": ([(0, 1)], True, (False, True, False), True, 0, "ce"),
        "sce": ([(0, 1), (1, 0)], True, (True, True, False), True, 0, "sce"),
        "byol": ([(0, 1), (1, 0)], True, (False, False, False), True, 2, "ip"),
        "simclr": ([(0, 1), (1, 0)], False, (False, True, True), True, 0, "ce"),
        "vicreg": ([(0, 1)], False, (False, False, False), False, 0, "vic"),
        "barlow_twins": ([(0, 1)], False, (False, False, False), False, 0, "barlow"),
    }
    for name, row in rows.items():
        p = PRESETS[name]()
        negatives = tuple(getattr(p, f"use_negative_examples_from_{s}") for s in ("queue", "batch", "same_view"))
        found = (p.pairs, p.use_lagging_model, negatives, p.use_unit_sphere_projection, p.prediction_mlp_layers)
        assert (*found, p.loss_type) == row, name


def test_evolve_and_vicreg_by_its_other_name():
    assert ModelParams(use_vicreg_loss=True) == ModelParams(use_vicreg_loss=True, loss_type="vic")
    changed = attr.evolve(BYOLParams(), lr=0.1, mlp_normalization=None)
    assert (changed.lr, changed.mlp_normalization, changed.loss_type) == (0.1, None, "ip")
    assert VICRegParams(lr=0.3).lr == 0.3


def test_unknown_field_is_a_type_error():
    with pytest.raises(TypeError, match="learning_rate"):
        ModelParams(learning_rate=0.1)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"loss_type": "cee"}, "loss_type='cee' is unknown: choose one of ce, dcl, bce, ip, sce, vic, "),
        ({"optimizer_name": "adan"}, "optimizer_name='adan' is unknown: choose one of sgd, lars, adamw, adam"),
        ({"mlp_normalization": "batch"}, "mlp_normalization='batch' is unknown: choose one of None, bn, ln, gn, br"),
        ({"prediction_mlp_normalization": "x"}, "prediction_mlp_normalization='x' .*None, same, bn"),
        ({"encoder_arch": "resnet81"}, "encoder_arch='resnet81' is unknown: .*Nearest: resnet18"),
        ({"encoder_arch": "get_model"}, "encoder_arch='get_model' is unknown"),
        ({"dataset_name": "mnist"}, "dataset_name='mnist' is unknown: choose one of digits, cifar10"),
        ({"use_negative_examples_from_queue": False}, "loss_type='ce' needs negatives"),
        ({"loss_type": "sce", "use_negative_examples_from_queue": False}, "loss_type='sce' needs negatives"),
        ({"use_vicreg_loss": True, "loss_type": "ip"}, "use_vicreg_loss=True contradicts loss_type='ip'"),
        ({"mlp_normalization": "gn", "mlp_hidden_dim": 100}, "mlp_hidden_dim=100 .* multiple of 32"),
        (
            {
                "use_nearest_keys": True,
                "use_negative_examples_from_same_view": True,
                "use_lagging_model": False,
                "use_negative_examples_from_queue": False,
                "use_negative_examples_from_batch": True,
            },
            "use_nearest_keys=True replaces keys by neighbors.*same_view=False",
        ),
        ({"K": 0}, "K=0 makes an empty queue. Choose K above 0.$"),
        ({"use_negative_examples_from_same_view": True}, "use_lagging_model=False .*True.*prediction_mlp_layers=0"),
        (
            {
                "use_negative_examples_from_batch": True,
                "use_negative_examples_from_same_view": True,
                "use_lagging_model": False,
                "prediction_mlp_last_normalization": "bn",
            },
            r"one network.*prediction_mlp_last_normalization=None \(is bn\)",
        ),
        ({"shuffle_batch_norm": True, "use_lagging_model": False}, "shuffle_batch_norm=True .*use_lagging_model=True"),
        ({"low_resolution_stem": True, "encoder_arch": "vit_b_16"}, "low_resolution_stem=True .*'vit_b_16'"),
        ({"evaluations": ["knn", "svm"]}, r"evaluations=\['svm'\] unknown: choose from linear_probe, knn"),
        ({"transform_blur_probability": [1.0]}, r"transform_blur_probability=\[1.0\] has 1 values for 2 views"),
        (
            {"transform_flip_probability": [0.5, 1.5]},
            r"transform_flip_probability=1.5 must be at least 0 and at most 1",
        ),
        ({"transform_crop_size": 6}, "transform_crop_size=6 must be above 6"),
        ({"batch_size": 0}, "batch_size=0 must be above 0"),
        ({"dim": -1}, "dim=-1 must be above 0"),
        ({"T": 0.0}, "T=0.0 must be above 0"),
        ({"sce_target_T": -0.1}, "sce_target_T=-0.1 must be above 0"),
        ({"max_epochs": 0}, "max_epochs=0 must be above 0"),
        ({"lars_warmup_epochs": -1}, "lars_warmup_epochs=-1 must be at least 0"),
        ({"m": 1.2}, "m=1.2 must be at least 0 and at most 1"),
        ({"adam_betas": [0.9, 1.0]}, "adam_betas=1.0 must be at least 0 and at most 0.999999"),
        ({"adam_betas": [0.9]}, r"adam_betas=\[0.9\] must be a list of 2 numbers"),
        ({"adam_betas": 0.9}, "adam_betas=0.9 must be a list of 2 numbers"),
        ({"lr": float("nan")}, "lr=nan must be above 0"),
        ({"lr": "0.3"}, "lr='0.3' must be a number"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"use_lagging_model": "no"}, "use_lagging_model='no' must be True or False"),
        ({"exclude_matching_parameters_from_lars": ".bias"}, "exclude_.*='.bias' must be a list of strings"),
        ({"encoder_arch": None}, "encoder_arch=None must be a string"),
        ({"encoder_arch": "resnet18.foo"}, "encoder_arch='resnet18.foo' is unknown"),
        ({"transform_s": "a"}, "transform_s='a' must be a number, or a list"),
        ({"use_eqco_margin": True, "loss_type": "ip"}, "use_eqco_margin=True .*loss_type='ce', not for 'ip'"),
        ({"loss_type": "vic", "batch_size": 1}, "batch_size=1 .*loss_type='vic'"),
        (
            {"batch_size": 1, "projection_mlp_last_normalization": "bn"},
            "batch_size=1 is too small for projection_mlp_last_normalization='bn': a single image",
        ),
        (
            {"micro_batch_size": 1, "prediction_mlp_layers": 2, "prediction_mlp_normalization": "br"},
            "micro_batch_size=1 is too small for prediction_mlp_normalization='br': a single image",
        ),
        (
            {"batch_size": 1, "mlp_normalization": "bn", "projection_mlp_last_normalization": "same"},
            "batch_size=1 is too small for mlp_normalization='bn': a single image",
        ),
        ({"batch_size": 2.5}, "batch_size=2.5 must be a whole number"),
    ],
)
def test_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelParams(**fields)


@pytest.mark.parametrize(
    ("preset", "fields", "n_remedies"),
    [
        ("supcon", WITHOUT_NEGATIVES, 1),
        ("simclr", WITHOUT_NEGATIVES, 2),
        ("nnclr", WITHOUT_NEGATIVES, 1),
        ("nnclr", {"K": 0}, 1),
        ("sce", {"K": 0}, 1),
        ("moco_v2", {"K": 0}, 0),
        ("simclr", {"batch_size": 1}, 1),  # a queue
        ("moco_v3", {"batch_size": 1}, 0),  # a queue does not help: a larger batch only
        ("nnclr", {"batch_size": 1}, 0),
        ("supcon", {"batch_size": 1}, 0),
        ("vicreg", {"batch_size": 1}, 0),
        ("vicreg", {"batch_size": 1, "use_negative_examples_from_queue": True}, 0),
    ],
)
def test_each_setting_that_an_error_recommends_is_accepted(preset, fields, n_remedies):
    with pytest.raises(ValueError) as error:
        PRESETS[preset](**fields)
    remedies = re.findall(r"(\w+)=(True|False)", str(error.value).split(". ", 1)[1])
    assert len(remedies) == n_remedies
    for name, value in remedies:
        PRESETS[preset](**{**fields, name: value == "True"})


def test_the_home_directory_stands_for_a_tilde_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    p = ModelParams(dataset_name="folder", data_path="~/a.tar::~/b.tar", splits_path=Path("~/lists"))
    assert (p.data_path, p.splits_path) == ("/home/me/a.tar::/home/me/b.tar", "/home/me/lists")
    names = {"out", "preview", "resume", "data_path", "splits_path", "encoder_weights", "video_path_prefix", "teacher"}
    every = [field for kind in (RunOptions, ModelParams) for field in attr.fields(kind)]
    assert {field.name for field in every if field.converter is expanded} == names
    assert {field.name for field in every if field.name.split("_")[-1] in ("path", "folder", "file", "prefix")} <= names
