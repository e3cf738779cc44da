"""What the optimizer does with each parameter: one table, from which its groups and the printed list both come.

parameter_options=[{"pattern": "projection_model", "lr_mult": 10.0}, {"pattern": r"\\.bias$", "weight_decay": 0.0}]
"""

import difflib
import re
from typing import Any

from attrs import frozen
from torch import nn

import lars
from model_params import ModelParams
from self_supervised.catalogue import NORMS_AND_BIASES
from self_supervised.networks import layers

NORMS = ", and '.bn' is for every normalization layer, whatever its name"
ONLINE = "online_classifier."  # its parameters' names


@frozen
class ParameterRow:
    """What one parameter gets."""

    name: str
    shape: tuple[int, ...]
    lr: float  # the highest, before `lr_scaling`
    momentum: float  # of sgd and lars
    weight_decay: float  # the first, if it has a schedule
    final_weight_decay: float
    adapted: bool  # by LARS
    layer_factor: float  # of `lr`, by `layer_decay`

    @property
    def group(self) -> tuple:
        return (self.lr, self.momentum, self.weight_decay, self.final_weight_decay, self.adapted)


def parameter_table(module: nn.Module, params: ModelParams) -> list[ParameterRow]:
    """One row for each trainable parameter of `module`, in its order; its encoder is `module.model`.

    A parameter starts with `lr` (times `layer_decay` for each stage of the encoder from its own to the heads, as in
    BEiT, https://arxiv.org/abs/2106.08254), `momentum` and `weight_decay`; if it matches
    `exclude_matching_parameters_from_lars`, it has no weight decay and is not adapted. Then come the rows of
    `parameter_options` whose pattern is found in its name (`re.search`), in their order: what a row says of the rate,
    the momentum, the decay or the adaptation replaces what was said before. ..._mult is of what the parameter started
    with. A `weight_decay` among them stays what it is; all others follow `final_weight_decay` in proportion. The online
    classifier has settings of its own, and neither decay nor adaptation.

    Raises:
        ValueError: a pattern matches no trainable parameter.
    """
    p = params
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    check_matches(module, p, [name for name in named if not name.startswith(ONLINE)])
    excluded = lars.parameter_groups(module, p.exclude_matching_parameters_from_lars)[1]
    factors = layer_factors(module.model, p.layer_decay)
    rows = []
    for name, parameter in named.items():
        if name.startswith(ONLINE):
            rows.append(
                ParameterRow(name, tuple(parameter.shape), p.online_classifier_lr, p.momentum, 0.0, 0.0, False, 1.0)
            )
            continue
        factor = factors.get(name, 1.0)
        lr, decay = p.lr * factor, 0.0 if name in excluded else p.weight_decay
        found = {"lr": lr, "momentum": p.momentum, "weight_decay": decay, "final_weight_decay": decay * growth(p)}
        found["lars_exclude"] = name in excluded
        for option in p.parameter_options:
            if re.search(option["pattern"], name):
                found |= resolved(option, lr, decay, growth(p))
        adapted = not found.pop("lars_exclude")
        rows.append(ParameterRow(name, tuple(parameter.shape), adapted=adapted, layer_factor=factor, **found))
    return rows


def growth(params: ModelParams) -> float:
    """Of the decay, from the first step to the last."""
    return 1.0 if params.final_weight_decay is None else params.final_weight_decay / params.weight_decay


def resolved(option: dict[str, Any], lr: float, weight_decay: float, growth: float) -> dict[str, Any]:
    """One row of `parameter_options` without pattern and ..._mult."""
    started = {"lr_mult": lr, "weight_decay_mult": weight_decay}
    values = {key: value for key, value in option.items() if key != "pattern"}
    found = {key.removesuffix("_mult"): started[key] * v if key in started else v for key, v in values.items()}
    if "weight_decay" in found:
        found["final_weight_decay"] = found["weight_decay"] * (1.0 if "weight_decay" in option else growth)
    return found


def layer_factors(encoder: nn.Module, layer_decay: float) -> dict[str, float]:
    """Of the rates of the encoder's parameters, by their names beside the heads."""
    if layer_decay == 1:
        return {}
    stages = reversed(layers.stages(encoder).values())
    return {f"model.{name}": layer_decay**depth for depth, stage in enumerate(stages, start=1) for name in stage}


def check_matches(module: nn.Module, params: ModelParams, names: list[str]) -> None:
    options = [option["pattern"] for option in params.parameter_options]
    lost = [("parameter_options", o) for o in options if not any(re.search(o, name) for name in names)]
    for pattern in params.exclude_matching_parameters_from_lars:
        may_be_absent = pattern in NORMS_AND_BIASES  # an encoder may have no norms
        if not may_be_absent and not lars.parameter_groups(module, [pattern])[1]:
            lost.append(("exclude_matching_parameters_from_lars", pattern))
    for field, pattern in lost:
        near = difflib.get_close_matches(pattern.replace("\\", ""), names, 3, cutoff=0.3) or names[:3]
        raise ValueError(
            f"{field}: the pattern {pattern!r} matches none of {len(names)} trainable parameters; some are "
            f"{', '.join(near)}: mend it, or leave it out{NORMS * (field != 'parameter_options')}"
        )


def optimizer_groups(
    rows: list[ParameterRow], named: dict[str, nn.Parameter], params: ModelParams
) -> list[dict[str, Any]]:
    """The optimizer's: parameters that get the same are stepped together. First those without and with exclusion that
    have no options of their own, even if there are none, because checkpoints of the optimizer count groups."""
    p = params
    final = p.weight_decay * growth(p)
    found = {(p.lr, p.momentum, p.weight_decay, final, True): [], (p.lr, p.momentum, 0.0, 0.0, False): []}
    for row in rows:
        found.setdefault(row.group, []).append(row.name)
    names = ("lr", "momentum", "weight_decay", "final_weight_decay", "adapt")
    plain = len(found) == 2
    return [
        {"params": [named[name] for name in members], "param_names": members, **dict(zip(names, key, strict=True))}
        | ({} if plain else {"name": members[0] if members else "(none)"})
        for key, members in found.items()
    ]


def printed(rows: list[ParameterRow], optimizer_name: str) -> str:
    """The table in words and numbers, one line a parameter; of what this optimizer has."""
    cells = {
        "parameter": [row.name for row in rows],
        "shape": [" x ".join(map(str, row.shape)) or "1" for row in rows],
        "lr": [f"{row.lr:.4g}" for row in rows],
        "layer": [f"{row.layer_factor:.4g}" for row in rows],
        "momentum": [f"{row.momentum:.4g}" for row in rows],
        "decay": [f"{row.weight_decay:.4g}" for row in rows],
        "final decay": [f"{row.final_weight_decay:.4g}" for row in rows],
        "LARS": ["yes" if row.adapted else "no" for row in rows],
    }
    missing = {"sgd": ["LARS"], "lars": []}.get(optimizer_name, ["momentum", "LARS"])
    missing += ["final decay"] * all(row.weight_decay == row.final_weight_decay for row in rows)
    columns = [[head, *column] for head, column in cells.items() if head not in missing]
    widths = [max(map(len, column)) for column in columns]
    aligned = [[f"{cell:>{width}}" for cell in column] for column, width in zip(columns[1:], widths[1:], strict=True)]
    names = [f"{name:<{widths[0]}}" for name in columns[0]]
    return "\n".join(" ".join(line) for line in zip(names, *aligned, strict=True))
