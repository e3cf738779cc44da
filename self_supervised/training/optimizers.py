"""Optimizers with their schedules: what `configure_optimizers` returns."""

from functools import partial
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_warn

from lars import LARS
from model_params import EncoderAndDataParams, ModelParams
from self_supervised.networks.modules import plain_name
from self_supervised.setting_groups import MAKE_GROUPS
from self_supervised.training.plan import Plan
from self_supervised.training.schedules import Fraction, Schedule, pretraining_lr_fraction


def for_pretraining(params: ModelParams, plan: Plan, groups: list[dict]) -> dict:
    """Return what `configure_optimizers` returns for pretraining.

    Args:
        groups: parameter groups with their learning rates before `lr_scaling`, and with `final_weight_decay`.
    """
    late = [epoch for epoch in params.lr_decay_steps if epoch * plan.steps_per_epoch >= plan.steps]
    if late:
        rank_zero_warn(
            f"lr_decay_steps={late} are beyond the {plan.steps} steps of the training: lr does not fall there"
        )
    return with_schedule(params, plan, groups, partial(pretraining_lr_fraction, params, plan))


def with_schedule(params: EncoderAndDataParams, plan: Plan, groups: list[dict], fraction: Fraction) -> dict:
    """Return what `configure_optimizers` returns: an optimizer whose groups follow one schedule.

    At every step, the learning rate of each group is `fraction(step)` of its own, and its weight decay approaches its
    `final_weight_decay`, if it has one.

    Args:
        groups: parameter groups with their learning rates before `lr_scaling`.
        fraction: optimizer step -> fraction of the highest learning rate.
    """
    scaled = [{**omit(group, "final_weight_decay"), "lr": group["lr"] * plan.lr_factor} for group in groups]
    optimizer = get_optimizer(params, scaled, plan.lr)
    pairs = zip(groups, optimizer.param_groups, strict=True)
    final_decays = [group.get("final_weight_decay", built["weight_decay"]) for group, built in pairs]
    schedule = Schedule(optimizer, fraction, plan.steps, final_decays)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def get_optimizer(params: EncoderAndDataParams, groups: list[dict], lr: float) -> torch.optim.Optimizer:
    """Return the optimizer `optimizer_name`, which keeps its own settings when it loads the state of a checkpoint.

    Args:
        groups: parameter groups. LARS adapts the learning rates of all but those with `adapt=False`.
        lr: learning rate of groups without their own.
    """
    p = params
    if p.optimizer_name == "lars":
        optimizer = LARS(groups, lr, p.momentum, p.weight_decay, p.lars_eta, getattr(p, "grad_clip_lars", False))
    elif p.optimizer_name == "sgd":
        groups = [omit(group, "adapt") for group in groups]
        nesterov = getattr(p, "nesterov", False)
        optimizer = torch.optim.SGD(groups, lr, p.momentum, weight_decay=p.weight_decay, nesterov=nesterov)
    else:
        groups = [omit(group, "adapt", "momentum") for group in groups]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[p.optimizer_name]
        optimizer = kind(groups, lr, tuple(map(float, p.adam_betas)), weight_decay=p.weight_decay)
    optimizer.register_load_state_dict_pre_hook(with_own_settings)
    return optimizer


def with_own_settings(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return what the optimizer loads from a checkpoint: the state of each parameter, matched by its name.

    Groups and their settings (learning rate, momentum, weight decay, ...) stay those of the optimizer. PyTorch would
    replace them.

    Raises:
        ValueError: the checkpoint has no names, because it is of an earlier version, and has other groups.
    """
    own = optimizer.state_dict()["param_groups"]
    before = saved["param_groups"]
    state = saved["state"]
    if all("param_names" in group for group in before):
        number_of = dict(
            zip(map(plain_name, concatenated(before, "param_names")), concatenated(before, "params"), strict=True)
        )
        names = zip(map(plain_name, concatenated(own, "param_names")), concatenated(own, "params"), strict=True)
        state = {number: state[number_of[name]] for name, number in names if number_of.get(name) in state}
    elif [len(group["params"]) for group in own] != [len(group["params"]) for group in before]:
        raise ValueError(
            "the checkpoint's optimizer has other parameter groups. Pass the settings of its run that determine them "
            f"({', '.join(MAKE_GROUPS)})."
        )
    return {**saved, "state": state, "param_groups": own}


def concatenated(groups: list[dict], name: str) -> list:
    """Return the items of the lists `name` of all groups, in their order."""
    return [item for group in groups for item in group[name]]


def omit(group: dict, *names: str) -> dict:
    """Return a copy of a group without some of its settings."""
    return {key: value for key, value in group.items() if key not in names}


def groups_text(optimizer: torch.optim.Optimizer) -> str:
    """Return a description of the optimizer's parameter groups, one line each if they have names."""
    groups = optimizer.param_groups
    decays = [g.get("weight_decay") or 0 for g in groups]  # an optimizer of the user may have none
    if not all("name" in group for group in groups):
        sizes = " and ".join(str(len(g["params"])) for g in groups)
        are_by_decay = [decay > 0 for decay in decays] == [True, False]
        return f"parameters{' with and without weight decay' if are_by_decay else ''}: {sizes}"
    rows = ["parameter groups", f"{'':<32} {'tensors':>7} {'highest lr':>10} {'decay':>7}"]
    for g, decay in zip(groups, decays, strict=True):
        lr = g.get("initial_lr", g["lr"])  # a schedule stores the former; None: Adafactor finds its own
        rows.append(f"{g['name']:<32} {len(g['params']):>7} {'-' if lr is None else f'{lr:.3g}':>10} {decay:>7.3g}")
    return "\n".join(rows)
