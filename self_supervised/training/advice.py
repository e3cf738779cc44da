"""Doubts about settings before the first step: a learning rate far from what was tried, and changes without effect."""

from typing import Any

import attrs

from model_params import HEADS, PRESETS, SCHEDULED, ModelParams, nearest_preset
from self_supervised.training.optimizers import Plan, warmup_epochs

# optimizer -> lowest and highest lr for 256 images per step in presets, papers (docs/methods.md) and docs/results.md
TRIED_LR = {"sgd": (0.03, 0.5), "lars": (0.2, 2.4), "adamw": (1.5e-4, 4e-3), "adam": (1.5e-4, 4e-3)}
FAR = 3  # factor beyond these limits from which a learning rate is doubtful
OF_IMAGES = 256  # number of images for which learning rates are compared

CUSTOM = "custom"  # loss_type of a user's own function
SIMILARITIES = ("ce", "bce", "ip", "sce")  # losses that compare a query with negatives
WARMUP, LAST_NORM = "a warm-up", "a normalization after a head"  # see `value_of`
# setting -> {another setting: values with which the first has an effect; None: all but 0, False, None and []}
# tests/training/test_advice.py trains with every loss and optimizer: no row may be wrong, and none may be missing.
NEEDS: dict[str, dict[str, tuple | None]] = {
    "T": {"loss_type": ("ce", "bce", "sce")},
    "eqco_alpha": {"use_eqco_margin": None},
    **{f"use_negative_examples_from_{of}": {"loss_type": SIMILARITIES} for of in ("batch", "queue", "same_view")},
    **dict.fromkeys(("K", "gather_keys_for_queue"), {"use_negative_examples_from_queue": None}),
    **dict.fromkeys(("m", "use_momentum_schedule"), {"use_lagging_model": None}),
    "stop_gradient_of_keys": {"use_lagging_model": (False,)},
    "n_virtual_devices": {"shuffle_batch_norm": None},
    **{f"{term}_loss_weight": {"loss_type": ("vic",)} for term in ("invariance", "variance", "covariance")},
    "variance_loss_epsilon": {"loss_type": ("vic",)},
    "redundancy_loss_weight": {"loss_type": ("barlow",)},
    **{name: {"loss_type": ("sce",)} for name in SCHEDULED},
    **{f"{name}_{part}": {f"{name}_warmup_epochs": None} for name in SCHEDULED for part in ("warmup", "warmup_start")},
    **{f"{name}_final": {f"{name}_schedule": ("linear", "cosine")} for name in SCHEDULED},
    **{f"{name}_mlp_last_bias": {f"{name}_mlp_layers": None} for name in HEADS},
    "mlp_last_affine": {LAST_NORM: None},
    "prediction_mlp_normalization": {"prediction_mlp_layers": None},
    **dict.fromkeys(("online_classifier_lr", "n_classes"), {"online_classifier": None}),
    **dict.fromkeys(("probe_solver", "probe_on_training_set", "evaluate_every_n_epochs"), {"evaluations": None}),
    **{f"transform_blur_{of}": {"transform_apply_blur": None} for of in ("probability", "sigma_min", "sigma_max")},
    "momentum": {"optimizer_name": ("sgd", "lars")},
    **dict.fromkeys(("lars_eta", "grad_clip_lars"), {"optimizer_name": ("lars",)}),
    "lars_warmup_epochs": {"optimizer_name": ("lars",), "warmup_epochs": (None,)},
    "warmup_start_lr": {WARMUP: None},
    "lr_decay_factor": {"lr_schedule": ("steps",)},
    "final_lr_schedule_value": {"lr_schedule": ("cosine", "linear", "steps")},
    "lr_batch_size": {"lr_scaling": None},
}


def doubts(params: ModelParams, plan: Plan, loss_type: str) -> list[str]:
    """Return a line on the learning rate, and one on settings that were changed without effect, where they apply.

    Args:
        loss_type: that of `params`, or CUSTOM if a function replaces it.
    """
    useless = {name: why for name in changed_by_user(params) if (why := lacks(params, name, loss_type))}
    values = ", ".join(f"{name}={getattr(params, name)!r}" for name in useless)
    reasons = "; ".join(f"{name} needs {why}" for name, why in useless.items())
    unused = f"{values}: no effect with the other settings. {reasons}" if useless else ""
    return [line for line in (doubt_of_lr(params, plan), unused) if line]


def doubt_of_lr(params: ModelParams, plan: Plan) -> str:
    """Return a line if the learning rate per image is far from those that were tried with this optimizer, else ""."""
    lowest, highest = TRIED_LR[params.optimizer_name]
    lr = plan.lr * OF_IMAGES / plan.global_batch_size
    if lowest / FAR <= lr <= highest * FAR:
        return ""
    near = (highest if lr > highest else lowest) * plan.global_batch_size / OF_IMAGES
    return (
        f"lr={plan.lr:.4g} with {plan.global_batch_size} {plan.kind} per step is {lr:.4g} per {OF_IMAGES}. With "
        f"optimizer_name={params.optimizer_name!r}, {lowest:g} to {highest:g} was tried. Try lr={near:.2g}"
    )


def changed_by_user(params: ModelParams) -> list[str]:
    """Return the settings in which `params` differ from the preset to which they are most similar."""
    preset = attrs.asdict(PRESETS[nearest_preset(params)]())
    return [name for name, value in attrs.asdict(params).items() if preset[name] != value]


def lacks(params: ModelParams, name: str, loss_type: str) -> str:
    """Return what a setting needs to have an effect, as text; "" if it has one."""
    if name == "use_negative_examples_from_queue" and loss_type == CUSTOM:
        return ""  # the queue is an argument of the function
    for needed, allowed in NEEDS.get(name, {}).items():
        value = value_of(params, needed, loss_type)
        if not value if allowed is None else value not in allowed:
            return needed if allowed is None else f"{needed}={' or '.join(map(str, allowed))}"
        if more := lacks(params, needed, loss_type):
            return more
    return ""


def value_of(params: ModelParams, name: str, loss_type: str) -> Any:
    if name == WARMUP:
        return warmup_epochs(params)
    if name == LAST_NORM:
        return [head for head in HEADS if params.head(head)["last_normalization"]]
    return loss_type if name == "loss_type" else getattr(params, name)
