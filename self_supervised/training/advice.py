"""Doubts about settings before the first step: a learning rate far from what was tried, a queue that is filled late,
and changes without effect."""

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytorch_lightning as pl

from model_params import (
    COMPARE_NEGATIVES,
    HEADS,
    PRESETS,
    PROTOTYPE_LOSSES,
    SCHEDULED,
    TWO_DISTRIBUTIONS,
    ModelParams,
    losses_that_read,
    losses_with,
    nearest_preset,
)
from self_supervised.fields import defaults
from self_supervised.training.plan import Plan, epochs_text, resolved_warmup_epochs

# optimizer -> lowest and highest lr for 256 images per step in presets, papers (docs/methods.md) and docs/results.md
TRIED_LR = {"sgd": (0.03, 0.5), "lars": (0.1, 2.4), "adamw": (1.5e-4, 4e-3), "adam": (1.5e-4, 4e-3)}
FAR = 3  # factor beyond these limits from which a learning rate is doubtful
REFERENCE_BATCH = 256  # number of images for which learning rates are compared

CUSTOM_LOSS = "custom"  # loss_type of a user's own function
UNBOUNDED = ("ip", "dcl", "emp", "mmcr")  # losses without a minimum, but for vectors of length 1
READ_QUEUE = (*COMPARE_NEGATIVES, "swav")
STRENGTHS = ("brightness", "contrast", "saturation", "hue")


def any_view(name: str) -> Callable[[ModelParams], bool]:
    return lambda p: any(getattr(view, name) for view in p.views)


def any_head(condition: Callable[[ModelParams, str], Any], heads: tuple[str, ...] = HEADS) -> Callable:
    return lambda p: any(condition(p, head) for head in heads)


def has_hidden(p: ModelParams, head: str) -> bool:
    return bool(p.head(head)["hidden_dim"])


def is_normalized(p: ModelParams, head: str) -> bool:
    """Return whether a head has a place for the normalization of hidden layers."""
    return has_hidden(p, head) or getattr(p, f"{head}_mlp_last_normalization") == "same"


# condition that no single field states, in words -> function that returns whether the settings fulfill it
DERIVED: dict[str, Callable[[ModelParams], Any]] = {
    (WARMUP := "a warm-up"): resolved_warmup_epochs,
    (HIDDEN := "a hidden layer in a head"): any_head(has_hidden),
    (WIDTH := "a hidden layer whose width is not in ..._mlp_hidden_dims"): any_head(
        lambda p, head: has_hidden(p, head) and not getattr(p, f"{head}_mlp_hidden_dims")
    ),
    (NORM := "a hidden layer, or ..._mlp_last_normalization=same"): lambda p: (
        is_normalized(p, "projection") or (is_normalized(p, "prediction") and p.prediction_mlp_normalization == "same")
    ),
    (NORM_OF_PREDICTION := "a hidden layer, or prediction_mlp_last_normalization=same"): any_head(
        is_normalized, ("prediction",)
    ),
    (LAST_NORM := "a normalization after a head"): any_head(lambda p, head: p.head(head)["last_normalization"]),
    (GRADIENT := "keys of the trained network"): lambda p: not (p.use_lagging_model or p.use_nearest_keys or p.teacher),
    (QUEUE := "a queue that the loss reads"): lambda p: (
        p.use_nearest_keys or (p.use_negative_examples_from_queue and p.loss_type in READ_QUEUE)
    ),
    (LARGE_VIEWS := "two large views"): lambda p: p.n_large_views > 1,
    (SCORED := "evaluations or online_classifier"): lambda p: p.is_evaluated,
    (PROBE := "linear_probe in evaluations"): lambda p: "linear_probe" in p.evaluations,
    (FITTED := "linear_probe or knn in evaluations"): lambda p: {"linear_probe", "knn"} & set(p.evaluations),
    (COLOR := "images in color"): lambda p: p.channels == p.dataset.channels == 3,
    (JITTER := "transform_jitter_probability above 0"): any_view("jitter_probability"),
    (STRENGTH := "a strength of the color jitter above 0"): lambda p: any(any_view(one)(p) for one in STRENGTHS),
    (OPEN := "a strength of None"): lambda p: any(
        value is None or (isinstance(value, list) and None in value)
        for value in (getattr(p, f"transform_{one}") for one in STRENGTHS[: 4 if DERIVED[COLOR](p) else 2])
    ),
    (BLUR := "transform_blur_probability above 0"): any_view("blur_probability"),
    (SOLARIZE := "transform_solarize_probability above 0"): any_view("solarize_probability"),
    (VIDEOS := "videos"): lambda p: p.dataset.of_videos,
    (FILES := "a data set of files"): lambda p: not p.dataset.is_packed,
    (IMAGE_FILES := "a data set of image files"): lambda p: not (p.dataset.is_packed or p.dataset.of_videos),
    (EXIF := "a data set of image files, or video_decoder=frames"): lambda p: (
        DERIVED[IMAGE_FILES](p) or (p.dataset.of_videos and p.video_decoder == "frames")
    ),
    (LOW_RESOLUTION := "low_resolution_stem=True"): lambda p: p.low_resolution,
    (PART_OF_DATA := "data_fraction below 1"): lambda p: p.data_fraction < 1 or p.dataset.is_custom,
}

# setting -> {another setting: values with which the first has an effect; None: all but 0, False, None and []}
# tests/training/test_advice.py trains with every loss and optimizer: no row may be wrong, and none may be missing.
NEEDS: dict[str, dict[str, tuple | None]] = {
    **{name: {"loss_type": losses} for name in attrs.fields_dict(ModelParams) if (losses := losses_that_read(name))},
    "eqco_alpha": {"use_eqco_margin": None},
    "use_negative_examples_from_batch": {"loss_type": COMPARE_NEGATIVES},
    "use_negative_examples_from_same_view": {
        "loss_type": tuple(n for n in COMPARE_NEGATIVES if n not in TWO_DISTRIBUTIONS)
    },
    "use_negative_examples_from_queue": {"loss_type": READ_QUEUE},
    **dict.fromkeys(("K", "gather_keys_for_queue"), {QUEUE: None}),
    "teacher_channels": {"teacher": None},
    "teacher_crop_size": {"teacher": None},
    "prototypes_frozen_epochs": {"loss_type": PROTOTYPE_LOSSES},
    "use_both_augmentations_as_queries": {
        LARGE_VIEWS: None,
        "loss_type": (*losses_with(lambda loss: not loss.all_views), CUSTOM_LOSS),
    },
    "queue_from_epoch": {"loss_type": ("swav",), QUEUE: None},
    "center_momentum": {"loss_type": ("dino",)},
    **dict.fromkeys(("m", "use_momentum_schedule"), {"use_lagging_model": None}),
    # losses with a gradient through the keys
    "stop_gradient_of_keys": {
        GRADIENT: None,
        "loss_type": (*COMPARE_NEGATIVES, "vic", "barlow", "fastsiam", CUSTOM_LOSS),
    },
    "use_lagging_model": {"loss_type": (*losses_with(lambda loss: loss.keys), CUSTOM_LOSS)},
    "n_virtual_devices": {"shuffle_batch_norm": None},
    "variance_loss_epsilon": {"loss_type": ("vic",)},
    **{f"{name}_{part}": {f"{name}_warmup_epochs": None} for name in SCHEDULED for part in ("warmup", "warmup_start")},
    **{f"{name}_final": {f"{name}_schedule": ("linear", "cosine")} for name in SCHEDULED},
    **{f"{name}_mlp_last_bias": {f"{name}_mlp_layers": None} for name in HEADS},
    "mlp_last_affine": {LAST_NORM: None},
    "mlp_hidden_dim": {WIDTH: None},
    **dict.fromkeys(("mlp_activation", "mlp_bias", "use_mlp_weight_standardization"), {HIDDEN: None}),
    "mlp_normalization": {NORM: None},
    "prediction_mlp_normalization": {NORM_OF_PREDICTION: None},
    **dict.fromkeys(("online_classifier_lr", "n_classes"), {"online_classifier": None}),
    **{"evaluate_every_n_epochs": {SCORED: None}, "probe_solver": {PROBE: None}},
    "probe_on_training_set": {FITTED: None},
    "transform_s": {JITTER: None, OPEN: None},
    "transform_jitter_probability": {STRENGTH: None},
    **dict.fromkeys(("transform_brightness", "transform_contrast"), {JITTER: None}),
    **dict.fromkeys(("transform_saturation", "transform_hue"), {JITTER: None, COLOR: None}),
    "transform_grayscale_probability": {COLOR: None},
    "transform_blur_probability": {"transform_apply_blur": None},
    **{f"transform_blur_sigma_{of}": {"transform_apply_blur": None, BLUR: None} for of in ("min", "max")},
    "transform_solarize_threshold": {SOLARIZE: None},
    "transform_time_difference_probability": {VIDEOS: None},
    **dict.fromkeys(("video_decoder", "decoding_threads"), {VIDEOS: None}),
    "frames_per_second": {"video_decoder": ("frames",)},
    **{"pack_images": {IMAGE_FILES: None}, "unreadable_images": {FILES: None}, "exif_orientation": {EXIF: None}},
    **{"stem_variant": {LOW_RESOLUTION: None}, "data_seed": {PART_OF_DATA: None}},
    "momentum": {"optimizer_name": ("sgd", "lars")},
    "adam_betas": {"optimizer_name": ("adamw", "adam")},
    **dict.fromkeys(("lars_eta", "grad_clip_lars"), {"optimizer_name": ("lars",)}),
    "lars_warmup_epochs": {"optimizer_name": ("lars",), "warmup_epochs": (None,)},
    "warmup_start_lr": {WARMUP: None},
    "lr_decay_factor": {"lr_schedule": ("steps",)},
    "final_lr_schedule_value": {"lr_schedule": ("cosine", "linear", "steps")},
    "lr_batch_size": {"lr_scaling": None},
    "zero_init_residual": {"encoder_weights": (None,)},
    "held_out_fraction": {"validate_on": ("held_out",)},
}
# rows for a linear classifier as well
OF_CLASSIFIER = ("momentum", "adam_betas", "lars_eta", "lr_batch_size", "held_out_fraction")


def frozen_since(before: set[str], now: set[str]) -> list[str]:
    """Return a line if fewer weights require a gradient than at construction."""
    if not (lost := sorted(before - now)):
        return []
    return [
        f"{len(lost)} of {len(before)} weights no longer require a gradient ({lost[0]}, ...). If you did not freeze "
        "them: load_encoder(encoder=module) and LinearClassifierMethod(encoder=module) freeze their module, so pass a "
        "copy"
    ]


def doubts(params: ModelParams, plan: Plan, loss_type: str, has_own_optimizer: bool = False) -> list[str]:
    """Return lines on the learning rate, on a queue that is filled late, on what is delayed until the training ends,
    on views that are not compared, on settings that were changed without effect, and on a missing teacher, where they
    apply.

    Args:
        loss_type: that of `params`, or CUSTOM_LOSS if a function replaces it.
        has_own_optimizer: whether the user's code builds the optimizer, from whatever settings it reads.
    """
    unused = "" if has_own_optimizer else without_effect(params, changed_by_user(params), loss_type)
    alone = "teacher=None: the student learns from itself. Pass a teacher"
    no_teacher = alone if loss_type == "seed" and params.teacher is None else ""
    fills_queue = value_of(params, QUEUE, loss_type)
    lines = (
        "" if has_own_optimizer else doubt_of_lr(params, plan),
        doubt_of_queue(params, plan) if fills_queue else "",
        doubt_of_epochs(params, plan, loss_type),
        doubt_of_lengths(params, loss_type),
        doubt_of_views(params),
    )
    return [line for line in (*lines, unused, no_teacher) if line]


def doubt_of_views(params: ModelParams) -> str:
    """Return a line on views that no pair of the loss has."""
    if not set(range(params.n_views)).difference(*params.pairs):
        return ""
    return (
        f"n_large_views={params.n_large_views}: of the large views, only the first is compared with the teacher's. Set "
        "use_both_augmentations_as_queries=True, or n_large_views=1"
    )


def doubts_of_classifier(params: Any, requires_gradient: bool) -> list[str]:
    """Return lines on settings of a linear classifier (LinearClassifierMethodParams) that were changed without effect,
    on a learning rate meant for a frozen encoder while it is trained, and on an encoder that stays frozen.

    Args:
        requires_gradient: whether weights of the encoder do.
    """
    p, own = params, defaults(type(params), ("lr", *OF_CLASSIFIER))
    changed = [name for name in OF_CLASSIFIER if getattr(p, name) != own[name]]
    of_frozen = (
        f"lr={p.lr:g} is meant for a frozen encoder and SGD. Set lr, such as 0.1 with sgd and 0.001 with adamw"
        if p.lr == own["lr"] and (p.encoder_lr is not None or p.optimizer_name == "adamw")
        else ""
    )
    frozen = "encoder_lr=None: the encoder stays frozen, although weights of it require a gradient. Set encoder_lr"
    stays_frozen = frozen if requires_gradient and p.encoder_lr is None else ""
    of_training = [name for name in ("activation_checkpointing", "drop_path_rate") if getattr(p, name)]
    lines = [without_effect(p, changed, CUSTOM_LOSS), of_frozen, stays_frozen]
    lines += [
        f"{name}={getattr(p, name)}: no effect on a frozen encoder. Set encoder_lr, or leave it out"
        for name in of_training
        if p.encoder_lr is None
    ]
    return [line for line in lines if line]


def without_effect(params: Any, names: list[str], loss_type: str) -> str:
    """Return a line on those of the settings `names` that have no effect, and on what they need, else ""."""
    useless = {name: why for name in names if (why := lacks(params, name, loss_type))}
    values = ", ".join(f"{name}={getattr(params, name)!r}" for name in useless)
    reasons = "; ".join(f"{name} needs {why}" for name, why in useless.items())
    return f"{values}: no effect with the other settings. {reasons}" if useless else ""


def doubt_of_lr(params: ModelParams, plan: Plan) -> str:
    """Return a line if the learning rate per image is far from those that were tried with this optimizer, else ""."""
    lowest, highest = TRIED_LR[params.optimizer_name]
    lr = plan.lr * REFERENCE_BATCH / plan.global_batch_size
    if lowest / FAR <= lr <= highest * FAR:
        return ""
    near = (highest if lr > highest else lowest) * plan.global_batch_size / REFERENCE_BATCH / plan.lr_factor
    scaled = "" if plan.lr_factor == 1 else f", scaled to {plan.lr:.4g} (lr_scaling={params.lr_scaling!r}),"
    return (
        f"lr={plan.lr / plan.lr_factor:.4g}{scaled} with {plan.global_batch_size} {plan.kind}s per step corresponds to "
        f"lr={lr:.4g} for {REFERENCE_BATCH} {plan.kind}s. Learning rates of {lowest:g} to {highest:g} have been tried "
        f"with optimizer_name={params.optimizer_name!r}. Try lr={near:.2g}"
    )


def doubt_of_queue(params: ModelParams, plan: Plan) -> str:
    """Return a line if the queue has random vectors, as at the start, during much of the training, else ""."""
    images = plan.global_batch_size // (plan.processes if params.gather_keys_for_queue is False else 1)
    keys_of_a_step = images * len({j for _, j in params.pairs})
    filled = math.ceil(params.K / keys_of_a_step)
    if not params.has_queue or params.loss_type in PROTOTYPE_LOSSES or filled <= plan.steps / 10:
        return ""
    better = 2 ** int(math.log2(max(1, plan.steps * keys_of_a_step / 16)))
    return (
        f"K={params.K}: the queue has random vectors until step {filled} of {plan.steps}, and little is learned until "
        f"then (docs/results.md). Try K={better}, or more epochs"
    )


def doubt_of_lengths(params: ModelParams, loss_type: str) -> str:
    """Return a line if the loss falls without end as projections get longer, else ""."""
    if loss_type not in UNBOUNDED or params.use_unit_sphere_projection:
        return ""
    return (
        f"use_unit_sphere_projection=False: loss_type={loss_type!r} falls without end as projections get longer. Set "
        "it to True"
    )


def doubt_of_epochs(params: ModelParams, plan: Plan, loss_type: str) -> str:
    """Return a line on what the settings delay until the training ends, else ""."""
    delayed = [name for name, losses in SCHEDULED.items() if loss_type in losses]
    consequences = {f"{name}_warmup_epochs": f"{name}={getattr(params, name):g} is never reached" for name in delayed}
    if params.loss_type in PROTOTYPE_LOSSES:
        consequences["prototypes_frozen_epochs"] = "the prototypes never move"
    if params.assigns_over_queue:
        consequences["queue_from_epoch"] = "the queue is never used"
    epochs = plan.steps / plan.steps_per_epoch
    values = {name: getattr(params, name) for name in consequences}
    lines = [f"{name}={value:g}: {consequences[name]}" for name, value in values.items() if value >= epochs]
    where = f"in this training of {epochs_text(epochs)}. Choose fewer, or a longer training"
    return f"{'; '.join(lines)} {where}" if lines else ""


def doubts_of_max_epochs(params: ModelParams, trainer: pl.Trainer) -> list[str]:
    """Return a line if `max_epochs` was set, and the Trainer has another one."""
    is_set = "max_epochs" in changed_by_user(params) and trainer.max_steps == -1
    if not is_set or trainer.max_epochs in (None, -1, params.max_epochs):
        return []
    return [f"max_epochs={params.max_epochs}: no effect, because the Trainer has its own, {trainer.max_epochs}"]


def changed_by_user(params: ModelParams) -> list[str]:
    """Return the settings in which `params` differ from the preset to which they are most similar."""
    preset = attrs.asdict(PRESETS[nearest_preset(params)]())
    return [name for name, value in attrs.asdict(params).items() if preset[name] != value]


def lacks(params: ModelParams, name: str, loss_type: str) -> str:
    """Return what a setting needs to have an effect, as text; "" if it has one."""
    if name == "use_negative_examples_from_queue" and loss_type == CUSTOM_LOSS:
        return ""  # the queue is an argument of the function
    if name.startswith("transform_") and not value_of(params, name, loss_type):
        return ""  # switched off, as it is
    for needed, allowed in NEEDS.get(name, {}).items():
        value = value_of(params, needed, loss_type)
        if not value if allowed is None else value not in allowed:
            return needed if allowed is None else f"{needed}={' or '.join(map(str, allowed))}"
        if more := lacks(params, needed, loss_type):
            return more
    return ""


def value_of(params: ModelParams, name: str, loss_type: str) -> Any:
    if name == QUEUE and loss_type == CUSTOM_LOSS:
        return params.has_queue  # an argument of the function
    if name in DERIVED:
        return DERIVED[name](params)
    return loss_type if name == "loss_type" else getattr(params, name)
