"""Random settings either train or are refused at construction by a ValueError that names a field.

`LONG=5 pytest tests/test_properties.py` tries five times as many, with different ones in each run.
"""

import math
import re
import warnings

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from conftest import LONG
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from moco import SelfSupervisedMethod
from model_params import LOSSES, PRESETS, ModelParams
from self_supervised import losses
from self_supervised.catalogue import DATASETS, EVALUATIONS, NORMALIZATIONS, STEM_VARIANTS

NAMES = [attribute.name for attribute in attrs.fields(ModelParams)]
SMALL = {
    "dataset_name": "digits", "encoder_arch": "module", "batch_size": 8, "global_batch_size": None, "K": 24, "dim": 6,
    "mlp_hidden_dim": 8, "warmup_epochs": 0,
}  # fmt: skip

# ---- Random settings ----


def either(*values) -> st.SearchStrategy:
    return st.sampled_from(values)


FLAG = st.booleans()
SHARE = either(0, 0.0, 0.01, 0.5, 0.99, 1, 1.0) | st.floats(0, 1)
WEIGHT = either(0, 0.0, 1e-6, 0.0051, 1, 25.0, 1000)
EPOCHS = either(0, 0.01, 0.5, 1, 10, 1000)
TEMPERATURE = either(1e-3, 0.01, 0.07, 0.2, 1, 1.0, 10, 1000.0)


def per_view(numbers: st.SearchStrategy) -> st.SearchStrategy:
    return numbers | st.lists(numbers, min_size=2, max_size=2) | st.tuples(numbers, numbers) | st.none()


PER_VIEW = per_view(SHARE)
STRENGTH = per_view(either(0, -0.0, 0.4, 1, 5))
NORM = either(None, *NORMALIZATIONS)
SCHEDULE = {"warmup_epochs": either(0, 0, 0, 0.5, 2), "warmup": either("linear", "cosine")}
SCHEDULE["schedule"] = either("constant", "constant", "linear", "cosine")

VIEW_EVENTS = ("jitter", "grayscale", "blur", "solarize", "flip", "vertical_flip", "rotation", "time_difference")

SENSIBLE = {
    "encoder_arch": either("shufflenet_v2_x0_5", "ws_resnet18", "resnet18"),
    "embedding_dim": either(None, 6),
    "encoder_weights": st.none(),
    "low_resolution_stem": either(None, False, True),
    "zero_init_residual": st.booleans(),
    "drop_path_rate": either(None, None, None, 0.1),
    "stem_variant": either("standard", "standard", *STEM_VARIANTS),
    "in_channels": either(None, 1, 2, 3),
    "pooling_size": either(1, 1, 1, 2),
    "dataset_name": either(*DATASETS),
    "batch_size": st.integers(1, 12),
    "global_batch_size": st.none() | st.integers(1, 12),
    "transform_crop_size": st.none() | st.integers(7, 16),
    "image_mean": st.none() | st.just([0.5]),
    "image_std": st.none() | st.just([0.25]),
    "seed": st.none() | either(0, 1, 2**32 - 1, 2**32, 2**63 - 1) | st.integers(0, 2**32),
    "num_data_workers": either(0, 1, 64, 1000),
    "drop_last_batch": FLAG | st.none(),
    "pin_data_memory": FLAG,
    "data_on_device": either(None, False, True),
    "torch_compile": either(False),  # compiled in test_speed.py: it takes seconds
    "activation_checkpointing": either(False, False, True),
    "winograd": either(False),  # in networks/test_winograd.py: compiling takes seconds
    "unreadable_images": either("stop", "skip"),
    "exif_orientation": st.booleans(),
    "pack_images": either(False),  # in data/test_packed_files.py
    # settings of videos: refused on images unless they have the default
    "num_frames": either(8, 8, 8, 1, 16),
    "clip_duration": either(2.56, 2.56, 2.56, 1, 10.0),
    "clip_speeds": either([1.0], [1], [1.0], [0.5, 2]),
    "clip_jitter": either(0, 0.0, 0, 0.2),
    "video_decoder": either("file", "frames"),
    "frames_per_second": either(30.0, 30, 30.0, 29.97),
    "decoding_threads": either(1, 2, 8),
    "video_path_prefix": either(None, None, None, "~/videos"),
    "evaluation_clips": either(1, 1, 1, 10),
    "evaluation_crops": either(1, 1, 1, 3),
    "data_path": either(None, "photos"),
    "image_key": either(None, "image", "jpg;png"),
    "label_key": either(None, "label", "cls"),
    "include_patterns": either([], ["*.png"]),
    "exclude_patterns": either([], ["a/*", "b"]),
    "labels_from": either("first_folder", "last_folder", None),
    "class_to_idx": either(None, ["cat=0"], {"cat": 0, "dog": 1}),
    "val_size": SHARE,
    "test_size": SHARE,
    "data_fraction": SHARE,
    "data_seed": either(0, 1, 2**63 - 1),
    "splits_path": either(None, "splits"),
    "pixel_range": either(None, [0, 10000], [-1.0, 1.0]),
    "compute_statistics": either(False),  # reads the data set: test_custom_data.py
    "lr_scaling": either(None, "linear", "sqrt"),
    "lr_batch_size": either(1, 8, 256, 100_000),
    "shuffle_batch_norm": FLAG,
    "n_virtual_devices": either(1, 2, 3, 8, 1000),
    "K": either(1, 2, 7, 8, 9, 100),
    "dim": either(1, 2, 6, 31, 64),
    "m": SHARE,
    "T": TEMPERATURE,
    "eqco_alpha": either(1e-3, 1, 256, 65536.0, 1e6),
    "use_eqco_margin": FLAG,
    "use_negative_examples_from_batch": FLAG,
    "use_negative_examples_from_same_view": FLAG,
    "dcl_sigma": either(None, 1e-4, 0.5, 10.0),
    "sce_coefficient": SHARE,
    "sce_target_T": TEMPERATURE,
    **{f"sce_{name}_{part}": s for name in ("coefficient", "target_T") for part, s in SCHEDULE.items()},
    **{f"sce_coefficient_{end}": SHARE for end in ("warmup_start", "final")},
    **{f"sce_target_T_{end}": TEMPERATURE | st.none() for end in ("warmup_start", "final")},
    "optimizer_name": either("sgd", "lars", "adamw", "adam"),
    "grad_clip_lars": FLAG,
    "lr_schedule": either("cosine", "linear", "steps", "constant"),
    "lr_decay_steps": either([], [0], [0.5, 1], [3]),
    "lr_decay_factor": either(0.1, 0.5, 1),
    "warmup_start_lr": either(0, 0.0, 1e-6, 0.3),
    "final_weight_decay": either(None, 0, 1e-3, 0.4),
    "layer_decay": either(1, 1.0, 0.65, 1e-3),
    "parameter_options": st.lists(
        either(
            {"pattern": "model", "lr_mult": 0.5},
            {"pattern": "bias$", "lr": 0.001, "weight_decay": 0},
            {"pattern": "^model", "momentum": 0.5, "weight_decay_mult": 2},
            {"pattern": "projection", "lars_exclude": True},
            {"pattern": "nothing", "lr_mult": 2},
        ),
        max_size=2,
    ),
    "lr": either(1e-8, 1e-4, 0.05, 0.5, 3.2, 30, 1000.0) | st.floats(1e-6, 10),
    "momentum": SHARE,
    "adam_betas": either([0.9, 0.999], (0.9, 0.95), [0, 0.5]),
    "weight_decay": either(0, 1e-6, 1e-4, 0.1, 1.0),
    "max_epochs": either(1, 2, 1000),
    "final_lr_schedule_value": either(0, 0.0, 1e-6, 0.002, 1),
    "warmup_epochs": EPOCHS | st.none(),
    "lars_warmup_epochs": EPOCHS,
    "lars_eta": either(1e-6, 1e-3, 0.02, 1),
    "exclude_matching_parameters_from_lars": st.lists(either(".bias", ".bn", "", "net", "model."), max_size=3),
    "loss_constant_factor": either(1e-3, 0.1, 1, 2, 100.0),
    "transform_s": either(0, 0.5, 1.0, 5) | st.lists(either(0, 0.5, 1), min_size=2, max_size=2),
    "transform_apply_blur": FLAG,
    **{f"transform_{name}_probability": PER_VIEW for name in VIEW_EVENTS},
    **{f"transform_{name}": STRENGTH for name in ("brightness", "contrast", "saturation")},
    **{f"transform_{small}crop_scale_{end}": PER_VIEW for small in ("", "small_") for end in ("min", "max")},
    "transform_small_crop_size": either(None, 7, 8, [8, 7]),
    "transform_crop_ratio_min": per_view(either(0.01, 0.5, 0.75, 1)),
    "transform_crop_ratio_max": per_view(either(1, 1.5, 100)),
    "transform_hue": per_view(either(0, -0.0, 0.1, 0.5)),
    "transform_blur_sigma_min": per_view(either(0.01, 0.1, 1)),
    "transform_blur_sigma_max": per_view(either(1, 2.0, 3)),
    "transform_solarize_threshold": PER_VIEW,
    "n_large_views": either(2, 2, 2, 3),
    "n_small_views": either(0, 0, 1, 2, 3),
    "use_momentum_schedule": FLAG,
    "use_nearest_keys": FLAG,
    "micro_batch_size": either(None, None, 2, 7, 100),
    "teacher": st.none(),
    "teacher_channels": either([], [0]),
    "teacher_crop_size": either(None, 8),
    "n_prototypes": either(1, 2, 24),
    "prototypes_frozen_epochs": EPOCHS,
    "queue_from_epoch": EPOCHS,
    "center_momentum": SHARE,
    "sigreg_weight": SHARE,
    "mlp_activation": either("relu", "gelu"),
    "loss_type": either(*LOSSES),
    "use_negative_examples_from_queue": FLAG,
    "use_both_augmentations_as_queries": FLAG,
    "stop_gradient_of_keys": FLAG,
    "use_vicreg_loss": FLAG,
    "use_lagging_model": FLAG,
    "use_unit_sphere_projection": FLAG,
    "invariance_loss_weight": WEIGHT,
    "variance_loss_weight": WEIGHT,
    "covariance_loss_weight": WEIGHT,
    "variance_loss_epsilon": either(1e-8, 1e-4, 1),
    "redundancy_loss_weight": WEIGHT,
    "projection_mlp_layers": st.integers(0, 4),
    "prediction_mlp_layers": st.integers(0, 3),
    "mlp_hidden_dim": either(1, 2, 7, 32, 64),
    "projection_mlp_hidden_dims": either([], [], [7], (32,), [8, 64]),
    "prediction_mlp_hidden_dims": either([], [], [7], [32]),
    "mlp_bias": FLAG,
    "mlp_last_affine": FLAG,
    **{f"{head}_mlp_last_bias": FLAG for head in ("projection", "prediction")},
    **{f"{head}_mlp_last_normalization": NORM | st.just("same") for head in ("projection", "prediction")},
    "mlp_normalization": NORM,
    "prediction_mlp_normalization": NORM | st.just("same"),
    "use_mlp_weight_standardization": FLAG,
    "gather_keys_for_queue": either(None, False, True),
    "evaluations": st.lists(either(*EVALUATIONS), max_size=4),
    "evaluate_every_n_epochs": either(1, 2, 1000),
    "probe_on_training_set": FLAG,
    "online_classifier": FLAG,
    "online_classifier_lr": either(1e-3, 0.1, 1),
    "n_classes": either(None, 10),
    "probe_solver": either("sklearn", "torch"),
}
LISTS = ([], [0.5], [0.5, 1.5], [None, 0.5], [True, 0.5], [math.nan, 0.1], [[0.5], [0.5]], [0.1] * 3, ["knn", 1])
ODD = either(
    None, True, False, "", "x", "0.5", "same", ".bn", "~nobody/x", "timm:x", "module", b"bn", (), {}, {1},
    -1, 0, 1, 2, 4, 0.5, 2.5, 1.0, -0.0, -1e-9, 10**12, 10**30, 2**31, 2**63, 2**64, 10**400,
    math.nan, math.inf, -math.inf, 5e-324, 1e-300, 1e-30, 1e30, 1e300, 1.0 + 1e-9,
    np.array([0.5, 0.5]), np.float64(0.5), np.float32(0.5), np.int64(8), torch.tensor(1), torch.ones(2), object(), int,
    1j, *LISTS,
)  # fmt: skip


def of_field(strategy_of) -> st.SearchStrategy:
    return either(*NAMES).flatmap(lambda name: st.tuples(st.just(name), strategy_of(name)))


@st.composite
def rows(draw) -> tuple[str, dict]:
    """A preset and up to twenty changes to it, also at the limits; one row in three has an odd value, too."""
    changes = {"dataset_name": draw(either("digits", "cifar10"))}
    changes |= dict(draw(st.lists(of_field(SENSIBLE.get), max_size=20)))
    changes |= dict([draw(of_field(lambda _: ODD))] if draw(either(True, False, False)) else [])
    return draw(either(*PRESETS)), changes


# ---- Training with them ----


class AllFinite(pl.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        assert all(value.isfinite() for name, value in trainer.callback_metrics.items() if "loss" in name)
        if not all(p.isfinite().all() for p in module.parameters()):
            raise FloatingPointError("the weights are not finite")


def may_diverge(p: ModelParams) -> bool:
    """Return whether a FloatingPointError is an acceptable outcome.

    It is if steps are so long, or outputs without the unit sphere so large, that the second loss may exceed float32.
    This depends on the encoder, the images and the Trainer, so it cannot be known at construction.
    """
    ratio = (p.global_batch_size or p.batch_size) / p.lr_batch_size
    lr = p.lr * {None: 1, "linear": ratio, "sqrt": math.sqrt(ratio)}[p.lr_scaling]
    weights = (p.invariance_loss_weight, p.variance_loss_weight, p.covariance_loss_weight, p.redundancy_loss_weight)
    long = lr > (0.05 if p.optimizer_name.startswith("adam") else 1) or lr * p.loss_constant_factor * max(weights) > 25
    return long or (p.use_mlp_weight_standardization and not p.use_unit_sphere_projection)


def build(preset: str, fields: dict) -> SelfSupervisedMethod:
    """Return a method with a small custom encoder, [N, C, H, W] -> [N, 6], unless `encoder_arch` is set."""
    params = PRESETS[preset](**{**SMALL, **fields})
    if "encoder_arch" in fields:
        return SelfSupervisedMethod(params)
    own = nn.Sequential(nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(9 * params.channels, 6))
    return SelfSupervisedMethod(params, encoder=own)


def loader_for(p: ModelParams) -> DataLoader:
    """Return a loader of two batches: uint8 images, or float views if the data set's constants do not fit them."""
    n = min(32, p.global_batch_size or p.batch_size)
    size, labels = p.crop_size, torch.arange(2 * n) % 3
    if p.channels == p.dataset.channels:
        images = torch.randint(256, (2 * n, p.channels, size, size), dtype=torch.uint8)
    else:
        images = torch.randn(2 * n, p.n_views, p.channels, size, size)
    return DataLoader(TensorDataset(images, labels), batch_size=n)


def outcome(preset: str, fields: dict, trainer, own_images: bool = True) -> str:
    """Train two steps and return "trains" or "diverges", or the message of a refusal, which must name a field."""
    torch.manual_seed(0)
    try:
        model = build(preset, fields)
    except ValueError as error:
        assert any(re.search(rf"\b{name}" + (r"\b" if "_" in name else "="), str(error)) for name in NAMES), error
        return str(error)
    p = model.params
    own_images = own_images or p.dataset_name != "digits" or p.channels != 1 or 1 in (p.batch_size, p.global_batch_size)
    fit = trainer(callbacks=[AllFinite()], limit_val_batches=0 if own_images else 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the warm-up of .* is longer|collapse: ")
            fit.fit(model, *([loader_for(p)] if own_images else []))
    except FloatingPointError:
        assert may_diverge(p)
        return "diverges"
    except ValueError as error:  # a setting of dataset_name's images, with a loader of one's own
        assert own_images and "data_fraction" in str(error)
        return str(error)
    assert fit.global_step == 2 or (p.data_fraction < 0.1 and fit.global_step == 1)
    return "trains"


@pytest.mark.slow
@settings(
    max_examples=100 * LONG,
    derandomize=LONG == 1,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(row=rows(), own_images=either(True, True, True, False))
def test_any_settings_train_or_are_refused_in_words(row, own_images, trainer):
    how = outcome(*row, trainer, own_images)
    event(how if how in ("trains", "diverges") else "is refused")


def test_every_field_is_drawn():
    assert SENSIBLE.keys() == set(NAMES)


FOUND = [  # (preset, fields, field that the refusal names or None if they train); once, they did neither
    # values of another type
    ("moco_v2", {"dataset_name": []}, "dataset_name"),
    ("moco_v2", {"optimizer_name": np.array([0.5, 0.5])}, "optimizer_name"),
    ("moco_v2", {"transform_blur_probability": True}, "transform_blur_probability"),
    ("moco_v2", {"transform_s": [0.5, True]}, "transform_s"),
    ("moco_v2", {"low_resolution_stem": ""}, "low_resolution_stem"),
    ("moco_v2", {"gather_keys_for_queue": "no"}, "gather_keys_for_queue"),
    ("moco_v2", {"embedding_dim": 6.0}, "embedding_dim"),
    ("moco_v2", {"encoder_weights": "some.pt"}, "encoder_weights"),  # of a custom module
    # too large
    ("moco_v2", {"K": 10**12}, "K"),
    ("moco_v2", {"K": 10**9, "dim": 10**5}, "K"),
    ("byol", {"dim": 10**12}, "dim"),
    ("byol", {"mlp_hidden_dim": 10**30}, "mlp_hidden_dim"),
    ("byol", {"projection_mlp_layers": 10**12}, "projection_mlp_layers"),
    ("byol", {"prediction_mlp_layers": 10**12}, "prediction_mlp_layers"),
    ("byol", {"prediction_mlp_layers": 100}, "prediction_mlp_layers"),
    ("byol", {"transform_crop_size": 10**7}, "transform_crop_size"),
    ("byol", {"in_channels": 10**12}, "in_channels"),
    ("byol", {"seed": 2**64}, "seed"),
    ("byol", {"num_data_workers": 10**30}, "num_data_workers"),
    ("byol", {"warmup_epochs": 10**400}, "warmup_epochs"),
    ("byol", {"lars_warmup_epochs": math.inf, "warmup_epochs": None}, "lars_warmup_epochs"),
    ("byol", {"lr": math.inf}, "lr"),
    ("byol", {"weight_decay": 1e300}, "weight_decay"),
    ("moco_v2", {"weight_decay": 1000, "prediction_mlp_layers": 20}, "weight_decay"),
    ("byol", {"final_lr_schedule_value": math.inf}, "final_lr_schedule_value"),
    ("byol", {"loss_constant_factor": 1e300}, "loss_constant_factor"),
    ("byol", {"lars_eta": 1e300}, "lars_eta"),
    ("vicreg", {"invariance_loss_weight": 1e300}, "invariance_loss_weight"),
    ("barlow_twins", {"redundancy_loss_weight": math.inf}, "redundancy_loss_weight"),
    ("eqco", {"eqco_alpha": 10**400}, "eqco_alpha"),
    # too small
    ("eqco", {"eqco_alpha": 5e-324}, "eqco_alpha"),
    ("moco_v2", {"T": 1e-300}, "T"),
    ("sce", {"sce_target_T": 1e-300}, "sce_target_T"),
    ("byol", {"lr": 1e-310, "final_lr_schedule_value": 1.0}, "lr"),
    ("byol", {"lr_scaling": "linear", "lr_batch_size": 10**400}, "lr_batch_size"),
    # one image at a time
    ("eqco", {"global_batch_size": 1}, "global_batch_size"),
    ("vicreg", {"global_batch_size": 1}, "global_batch_size"),
    ("byol", {"batch_size": 1}, "batch_size"),
    ("moco_v2", {"batch_size": 1, "mlp_normalization": "gn", "mlp_hidden_dim": 32}, "batch_size"),
    ("moco_v2", {"batch_size": 1, "mlp_normalization": "ln"}, None),
    # valid settings
    ("sce", {"dataset_name": "cifar10", "transform_grayscale_probability": 1}, None),
    ("sce", {"dataset_name": "cifar10", "transform_s": -0.0}, None),
]


@pytest.mark.parametrize("preset, fields, named", FOUND)
def test_found_earlier(preset, fields, named, trainer):
    how = outcome(preset, fields, trainer)
    assert how == "trains" if named is None else f"{named}=" in how


def test_a_last_batch_of_one_image_without_negatives(trainer):
    method, images = build("eqco", {}), torch.randint(256, (9, 1, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="^a batch has one image: .*no other image to compare with.*drop_last=True"):
        trainer(limit_val_batches=0).fit(method, DataLoader(images, batch_size=8))
    z = torch.ones(1, 4)  # on one of many processes; EqCo's margin was once divided by the number of negatives, 0
    assert losses.get_loss(method.params)(z, z, None)["loss"].isfinite()
