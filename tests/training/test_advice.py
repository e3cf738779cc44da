"""Doubts about settings. Whether a setting has an effect is what a training says: its weights after a few steps."""

from collections.abc import Iterator
from types import SimpleNamespace

import attrs
import pytest
import torch
from conftest import LONG, SMALL, normalized_encoder

from moco import SelfSupervisedMethod
from model_params import PRESETS, EncoderAndDataParams, ModelParams
from self_supervised import recipes
from self_supervised.training import advice, optimizers, parameter_groups
from self_supervised.training.plan import Plan, lr_factor, resolved_warmup_epochs
from self_supervised.views import training_views

STEPS = 5
AN_EPOCH = 2  # steps
TINY = {**SMALL, "K": 8, "dim": 4, "mlp_hidden_dim": 6, "lr": 0.1, "batch_size": 4}
TINY |= {
    "warmup_epochs": None,
    "lars_warmup_epochs": 1.0,
    "projection_mlp_hidden_dims": [],
    "final_lr_schedule_value": 0,
}
SCE = {"sce_coefficient_warmup_epochs": 1.25, "sce_target_T_warmup_epochs": 1.25, "sce_target_T_warmup_start": 0.1}
SCE |= {"sce_target_T_schedule": "linear", "sce_target_T_final": 0.02, "sce_coefficient_schedule": "cosine"}
SCE |= {"sce_coefficient_warmup_start": 0.8}
BASES = {  # every loss and optimizer, and settings that only have an effect with others
    "ce, sgd": {},
    "ip, lars": {"preset": "byol", "prediction_mlp_last_normalization": "ln"},
    "sce": {"preset": "sce", **SCE},
    "dclw": {"preset": "dcl", "dcl_sigma": 0.5},
    "swav": {"preset": "swav", "n_prototypes": 6, "prototypes_frozen_epochs": 1, "queue_from_epoch": 0},
    "dino": {"preset": "dino", "n_prototypes": 6, "sce_target_T_warmup_epochs": 1.25, "sce_target_T_warmup_start": 0.1},
    "nearest keys": {"preset": "nnclr", "projection_mlp_hidden_dims": [], "prediction_mlp_hidden_dims": []},
    "seed": {"preset": "distill", "n_large_views": 2},
    **{name: {"preset": name} for name in ("supcon", "fastsiam", "lejepa", "visreg", "emp_ssl", "frossl", "mmcr")},
    "vic, adam": {"loss_type": "vic", "optimizer_name": "adam"},
    "barlow, sgd": {"loss_type": "barlow", "use_lagging_model": False, "lr_schedule": "constant"},
    "bce, steps": {
        **{"loss_type": "bce", "lr_schedule": "steps", "lr_decay_steps": [1.0], "shuffle_batch_norm": True},
        **{"online_classifier": True, "lr_scaling": "linear"},
    },
    "eqco, adamw": {"preset": "eqco", "optimizer_name": "adamw", "warmup_epochs": 1.25},
    **({name: {"preset": name} for name in PRESETS if name not in ("sce_video", "ressl", "swav")} if LONG > 1 else {}),
}
HEADS_ALONE = {  # bases with which nothing else is tried
    "one layer": {
        "preset": "simsiam",
        "projection_mlp_layers": 1,
        "prediction_mlp_layers": 1,
        "mlp_normalization": None,
    },
    "widths": {
        **{"preset": "byol", "projection_mlp_hidden_dims": [5], "prediction_mlp_layers": 1},
        **{"prediction_mlp_last_normalization": "same", "mlp_normalization": None},
    },
    "one normalization": {"preset": "byol", "projection_mlp_layers": 1, "prediction_mlp_normalization": "ln"},
}
WITH_HEADS = ("ce, sgd", "ip, lars")  # bases with which the settings of heads are tried
NOT_OF_A_STEP = {  # of validation, of views, of the programs, of several processes, or another name of a setting
    "evaluations", "evaluate_every_n_epochs", "probe_solver", "probe_on_training_set", "n_large_views", "n_small_views",
    "max_epochs", "gather_keys_for_queue", "n_classes", "use_vicreg_loss", "teacher", "teacher_channels",
    "teacher_crop_size", "micro_batch_size",
}  # fmt: skip
FIELDS = [
    field.name
    for field in attrs.fields(ModelParams)
    if (field.name not in attrs.fields_dict(EncoderAndDataParams) or field.name == "lr_batch_size")
    and not field.name.startswith("transform_")
    and field.name not in NOT_OF_A_STEP
]
OTHER = {  # values where none can be derived from the present one
    "mlp_normalization": ("ln", "bn"), "prediction_mlp_normalization": ("ln",), "warmup_epochs": (1.5,),
    "prediction_mlp_last_normalization": ("bn",), "projection_mlp_last_normalization": ("bn",),
    "exclude_matching_parameters_from_lars": ([".bias"],), "lr_decay_steps": ([0.5],),
    "parameter_options": ([{"pattern": "bias", "lr_mult": 2.0}],), "final_weight_decay": (0.5,),
    "projection_mlp_hidden_dims": ([5], [5, 5]), "prediction_mlp_hidden_dims": ([5],), "weight_decay": (0.3,),
    "sce_target_T_warmup_start": (0.3,), "sce_target_T_final": (0.3,), "T": (0.4,), "lr": (0.2,), "m": (0.5,),
    "n_virtual_devices": (1,), "dcl_sigma": (0.8,), "adam_betas": ([0.8, 0.99],),
}  # fmt: skip


VIEWS = {
    "color": {},
    "digits": {"dataset_name": "digits", "transform_crop_size": 16},
    "gray": {"in_channels": 1, "dataset_name": "folder"},
    "strengths, solarized": {
        **{f"transform_{name}": 0.3 for name in ("brightness", "contrast", "saturation", "hue")},
        "transform_solarize_probability": 0.5,
    },
    "no jitter, no blur": {"transform_jitter_probability": 0, "transform_apply_blur": False},
    "no strength, no blur": {"transform_s": 0, "transform_blur_probability": 0},
}
OF_VIEWS = {
    **{"transform_crop_scale_min": 0.3, "transform_crop_scale_max": 0.8},
    **{"transform_crop_ratio_min": 0.9, "transform_crop_ratio_max": 1.2},
    **{"transform_s": 0.2, "transform_blur_sigma_min": 0.7, "transform_blur_sigma_max": 1.0},
}


def others(params: ModelParams, name: str) -> list:
    """Return values of a setting that differ from the present one."""
    value = getattr(params, name)
    choices = attrs.fields_dict(ModelParams)[name].metadata.get("choices", ())
    if name in OTHER or choices:
        return [one for one in OTHER.get(name, choices) if one != value]
    if isinstance(value, bool):
        return [not value]
    return [value + max(1, value // 3)] if isinstance(value, int) else [0.7 * value + 0.05]


def trained(params: ModelParams) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the trained weights after each of STEPS steps of two epochs, on a stand-in for Lightning's Trainer."""
    torch.manual_seed(0)
    model = SelfSupervisedMethod(params, encoder=normalized_encoder())
    model._trainer = SimpleNamespace(global_step=0, current_epoch=0)
    model.log_step = lambda *_: None
    scaling = params.batch_size / params.lr_batch_size if params.lr_scaling else 1.0
    warmup = resolved_warmup_epochs(params) * AN_EPOCH
    model.plan = Plan(1, 1, params.batch_size, params.lr * scaling, STEPS, AN_EPOCH, warmup, scaling)
    named = dict(model.named_parameters())
    groups = parameter_groups.optimizer_groups(model.parameter_table(), named, params)
    found = optimizers.for_pretraining(params, model.plan, groups)
    for step in range(STEPS):
        batch = (
            [torch.randn(params.batch_size, 1, 8, 8) for _ in range(params.n_views)],
            torch.arange(params.batch_size) // 2,
        )
        found["optimizer"].zero_grad()
        model.training_step(batch, step).backward()
        model.on_after_backward()
        model.optimizer_step(0, step, found["optimizer"], lambda: None)
        found["lr_scheduler"]["scheduler"].step()
        model._trainer.global_step += 1
        yield {name: p.detach().clone() for name, p in named.items() if p.requires_grad}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("base", {**BASES, **HEADS_ALONE})
def test_what_has_no_effect_trains_bit_equal_and_all_else_does_not(base):
    settings = {**TINY, **{**BASES, **HEADS_ALONE}[base]}
    params = PRESETS[settings.pop("preset", "moco_v2")](**settings)
    before = list(trained(params))
    wrong = []
    for name in FIELDS:
        is_tried = "mlp" in name if base in HEADS_ALONE else base in WITH_HEADS or "mlp" not in name
        for value in others(params, name) if is_tried else ():
            try:
                changed = attrs.evolve(params, **{name: value})
            except ValueError:
                continue  # refused, which is no silence
            said = advice.lacks(changed, name, changed.loss_type)
            if not said and name not in advice.NEEDS and base not in (*WITH_HEADS, *HEADS_ALONE) and LONG == 1:
                continue  # tried with the others
            if all(map(equal, before, trained(changed))) != bool(said):  # ends at the first step that differs
                wrong.append((name, value, said))
    assert not wrong


def plan_of(params: ModelParams) -> Plan:
    size = params.global_batch_size or params.batch_size
    return Plan(1, 1, size, params.lr * (size / params.lr_batch_size if params.lr_scaling else 1), 9000, 3)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_raise_no_doubts(preset):
    params = PRESETS[preset]()
    found = advice.doubts(params, plan_of(params), params.loss_type)
    assert advice.changed_by_user(params) == [] and len(found) == (preset == "distill")
    assert not found or "Pass a teacher" in found[0]


def test_views_that_are_not_compared_with_a_teacher_are_named():
    params = PRESETS["distill"](teacher="resnet18.pth", n_large_views=2)
    (line,) = advice.doubts(params, plan_of(params), params.loss_type)
    assert line.startswith("n_large_views=2: of the large views, only the first is compared with the teacher's")
    both = attrs.evolve(params, use_both_augmentations_as_queries=True)
    assert advice.doubts(both, plan_of(both), both.loss_type) == []


def test_a_learning_rate_far_from_those_tried_and_changes_without_effect_are_a_line_each(small, trainer, caplog):
    params = small("byol", lr=0.5, optimizer_name="sgd", lars_eta=0.1, T=0.1, evaluations=[])
    trainer().fit(SelfSupervisedMethod(params, encoder=normalized_encoder()))
    lr, unused = [line for line in caplog.messages if line.startswith("warning: ")]
    assert "lr=0.5 with 16 images per step corresponds to lr=8 for 256 images. " in lr and "Try lr=0.031" in lr
    assert "T=0.1, lars_eta=0.1: no effect" in unused and "lars_eta needs optimizer_name=lars" in unused
    assert "T needs loss_type=ce or dcl or bce or sce or supcon or swav or dino or seed; " in unused


@pytest.mark.parametrize("kind", recipes.KINDS)
def test_learning_rates_of_recipes_that_were_run_are_among_those_tried(kind):
    for preset in (name for name, row in recipes.KINDS[kind].rows.items() if row.result):
        params = recipes.recipe(preset, kind)
        lowest, highest = advice.TRIED_LR[params.optimizer_name]
        lr = params.lr * lr_factor(params, params.batch_size) * advice.REFERENCE_BATCH / params.batch_size
        assert lowest <= lr <= highest, preset


@pytest.mark.parametrize("rule", [None, "linear", "sqrt"])
@pytest.mark.parametrize("lr", [1e-4, 50.0])
def test_the_suggested_learning_rate_leaves_no_doubt(rule, lr):
    params = PRESETS["moco_v2"](lr=lr, lr_scaling=rule, global_batch_size=4096)
    factor = lr_factor(params, 4096)
    said = advice.doubt_of_lr(params, Plan(1, 1, 4096, lr * factor, 9000, 3, lr_factor=factor))
    near = float(said.rpartition("lr=")[2])
    assert f"lr={lr:.4g}" in said and ("lr_scaling" in said) == (rule is not None)
    assert not advice.doubt_of_lr(
        attrs.evolve(params, lr=near), Plan(1, 1, 4096, near * factor, 9000, 3, lr_factor=factor)
    )


@pytest.mark.parametrize("loss_type", ["vic", "barlow"])
def test_a_queue_that_is_not_read_is_no_doubt(loss_type):
    params = ModelParams(loss_type=loss_type, use_lagging_model=False, use_unit_sphere_projection=False, batch_size=64)
    plan = Plan(1, 1, 64, params.lr, 100, 10)
    assert not any("random vectors" in line for line in advice.doubts(params, plan, loss_type))
    assert any("random vectors" in line for line in advice.doubts(params, plan, advice.CUSTOM_LOSS))


def test_losses_without_a_minimum_are_a_line():
    for preset in ("byol", "simsiam", "dcl", "emp_ssl", "mmcr"):
        params = PRESETS[preset](use_unit_sphere_projection=False)
        assert "falls without end" in advice.doubt_of_lengths(params, params.loss_type)


def test_prototypes_that_never_move_and_a_queue_that_is_never_used_are_a_line():
    for preset, epochs, said in (
        (
            "swav",
            1,
            "prototypes_frozen_epochs=1: the prototypes never move; queue_from_epoch=15: the queue is never used",
        ),
        ("swav", 15, "queue_from_epoch=15: the queue is never used in this training of 15 epochs"),
        *(("swav", 16, ""), ("dino", 1, "the prototypes never move in this training of 1 epoch."), ("dino", 2, "")),
        ("moco_v2", 1, ""),
    ):
        params = PRESETS[preset]()
        line = advice.doubt_of_epochs(params, Plan(1, 1, 256, 0.1, 10 * epochs, 10), params.loss_type)
        assert said in line and bool(said) == bool(line)


def test_a_target_that_a_warm_up_never_reaches_is_a_line():
    params = PRESETS["sce"](sce_coefficient_warmup_epochs=5, sce_coefficient_warmup_start=1.0)
    plan = Plan(1, 1, 256, 0.1, 40, 10)
    line = advice.doubt_of_epochs(params, plan, "sce")
    assert line.startswith("sce_coefficient_warmup_epochs=5: sce_coefficient=0.5 is never reached in this training")
    assert not advice.doubt_of_epochs(params, plan, "ce")


def test_max_epochs_of_the_settings_that_the_trainer_does_not_have_is_a_line():
    four, steps = SimpleNamespace(max_epochs=4, max_steps=-1), SimpleNamespace(max_epochs=-1, max_steps=4)
    line = "max_epochs=100: no effect, because the Trainer has its own, 4"
    assert advice.doubts_of_max_epochs(PRESETS["simclr"](max_epochs=100), four) == [line]
    for params, trainer in (({"max_epochs": 4}, four), ({"max_epochs": 100}, steps), ({}, four)):
        assert advice.doubts_of_max_epochs(PRESETS["simclr"](**params), trainer) == []


def test_a_queue_that_is_filled_late_is_a_line():
    """64 keys a step fill 65,536 places in 1,024 steps; with both views as keys, in 512."""
    for fields, filled in (({}, 1024), ({"use_both_augmentations_as_queries": True}, 512)):
        params = PRESETS["moco_v2"](batch_size=64, lr=0.125, **fields)
        line = advice.doubt_of_queue(params, Plan(1, 1, 64, params.lr, 2340, 260))
        assert f"random vectors until step {filled} of 2340" in line and f"Try K={8192 * 1024 // filled}," in line
        assert not advice.doubt_of_queue(params, Plan(1, 1, 64, params.lr, 10 * filled, 260))
    own = PRESETS["moco_v2"](batch_size=64, lr=0.125, gather_keys_for_queue=False)  # a queue for each process
    assert "until step 1024 of 2340" in advice.doubt_of_queue(own, Plan(8, 1, 64, own.lr, 2340, 260))
    assert not advice.doubt_of_queue(PRESETS["byol"](), Plan(1, 1, 64, 0.1, 9, 3))


@pytest.mark.parametrize("base", VIEWS)
def test_what_has_no_effect_gives_equal_views_and_all_else_does_not(base):
    params = ModelParams(**{"dataset_name": "cifar10", "transform_crop_size": 16, **VIEWS[base]})
    images = torch.randint(256, (64, params.channels, 20, 20), dtype=torch.uint8)
    before = training_views(params)(images, 0)
    for name in (field.name for field in attrs.fields(ModelParams)):
        other_size = ("transform_small", "transform_crop_size", "transform_time")  # or refused
        if not name.startswith("transform_") or name.startswith(other_size):
            continue
        value = False if name == "transform_apply_blur" else OF_VIEWS.get(name, 0.35)
        changed = attrs.evolve(params, **{name: value})
        after = training_views(changed)(images, 0)
        is_equal = all(torch.allclose(*pair, atol=1e-3) for pair in zip(before, after, strict=True))  # hue rounds
        assert is_equal == bool(advice.lacks(changed, name, "ce")) or not value, name


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"evaluations": ["knn"], "probe_solver": "torch"}, "linear_probe in evaluations"),
        ({"evaluations": ["rank_me"], "probe_on_training_set": True}, "linear_probe or knn in evaluations"),
        ({"evaluations": [], "online_classifier": True, "evaluate_every_n_epochs": 2}, ""),
        ({"evaluations": [], "evaluate_every_n_epochs": 2}, "evaluations or online_classifier"),
        ({"decoding_threads": 2}, "videos"),
        ({"dataset_name": "kinetics", "decoding_threads": 2}, ""),
        ({"dataset_name": "kinetics", "frames_per_second": 5}, "video_decoder=frames"),
        ({"dataset_name": "kinetics", "pack_images": True}, "a data set of image files"),
        ({"dataset_name": "imagenet", "pack_images": True}, ""),
        ({"dataset_name": "digits", "unreadable_images": "skip"}, "a data set of files"),
        ({"dataset_name": "kinetics", "unreadable_images": "skip"}, ""),
        ({"dataset_name": "kinetics", "exif_orientation": False}, "a data set of image files, or video_decoder=frames"),
        ({"dataset_name": "kinetics", "video_decoder": "frames", "exif_orientation": False}, ""),
        ({"stem_variant": "no_relu"}, "low_resolution_stem=True"),
        ({"dataset_name": "cifar10", "stem_variant": "no_relu"}, ""),
        ({"data_seed": 1}, "data_fraction below 1"),
        ({"data_fraction": 0.5, "data_seed": 1}, ""),
        ({"dataset_name": "digits", "transform_hue": 0}, ""),  # off, as it is
    ],
)
def test_settings_of_data_and_evaluations_say_what_they_need(settings, needs):
    assert advice.lacks(ModelParams(**settings), [*settings][-1], "ce") == needs


def test_settings_of_a_loss_have_no_effect_with_a_loss_of_the_users_own():
    assert advice.lacks(PRESETS["simclr"](T=0.3), "T", "custom") and not advice.lacks(PRESETS["simclr"](), "T", "ce")
    assert not advice.lacks(PRESETS["moco_v2"](K=64), "K", "custom")  # the function gets the queue
    assert advice.lacks(PRESETS["simclr"](K=64), "K", "custom")
