"""Learning rate, momentum and weight decay of each parameter: one table, from which the optimizer's groups are made and
which can be printed.

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
from self_supervised.networks import modules

Parameters = dict[str, nn.Parameter]  # name in the encoder -> parameter
FEWEST_GROUPS = 4  # of layers, if the encoder can be divided into that many
ONLINE = "online_classifier."  # prefix of the names of the online classifier's parameters


@frozen
class ParameterRow:
    """Optimizer settings of one parameter."""

    name: str
    shape: tuple[int, ...]
    lr: float  # highest learning rate, before `lr_scaling`
    momentum: float  # used by sgd and lars
    weight_decay: float  # at the first step
    final_weight_decay: float  # at the last step
    adapted: bool  # whether LARS adapts its learning rate
    layer_factor: float  # factor that `layer_decay` contributes to `lr`

    @property
    def group(self) -> tuple:
        """Settings that the parameters of one group share."""
        return (self.lr, self.momentum, self.weight_decay, self.final_weight_decay, self.adapted)


def parameter_table(module: nn.Module, params: ModelParams) -> list[ParameterRow]:
    """Return one row per trainable parameter of `module`, in the module's order. Its encoder is `module.model`.

    1. A parameter starts with `lr`, `momentum` and `weight_decay`. In the encoder, `lr` is multiplied by `layer_decay`
       once for each stage from its own to the last (BEiT, https://arxiv.org/abs/2106.08254).
    2. If it matches `exclude_matching_parameters_from_lars`, it has no weight decay and is not adapted.
    3. Each row of `parameter_options` whose pattern is found in its name (`re.search`) replaces the values that it
       contains, in the order of the rows. `lr_mult` and `weight_decay_mult` multiply the values of steps 1 and 2.

    A `weight_decay` of `parameter_options` is constant; all other weight decays follow `final_weight_decay` in
    proportion. The online classifier has a learning rate of its own, no weight decay, and is not adapted.

    Raises:
        ValueError: a pattern matches no trainable parameter.
    """
    p = params
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    check_matches(p, [name for name in named if not name.startswith(ONLINE)])
    excluded = lars.split_by_patterns(module, p.exclude_matching_parameters_from_lars)[1]
    factors = layer_factors(module.model, p.layer_decay)
    rows = []
    for name, parameter in named.items():
        if name.startswith(ONLINE):
            rows.append(
                ParameterRow(name, tuple(parameter.shape), p.online_classifier_lr, p.momentum, 0.0, 0.0, False, 1.0)
            )
            continue
        factor = factors.get(name, 1.0)
        lr = p.lr * factor
        decay = 0.0 if name in excluded else p.weight_decay
        values = {"lr": lr, "momentum": p.momentum, "weight_decay": decay, "final_weight_decay": decay * growth(p)}
        values["lars_exclude"] = name in excluded
        for option in p.parameter_options:
            if re.search(option["pattern"], name):
                values |= resolved(option, lr, decay, growth(p))
        adapted = not values.pop("lars_exclude")
        rows.append(ParameterRow(name, tuple(parameter.shape), adapted=adapted, layer_factor=factor, **values))
    return rows


def growth(params: ModelParams) -> float:
    """Return the final weight decay as a multiple of the first one."""
    return 1.0 if params.final_weight_decay is None else params.final_weight_decay / params.weight_decay


def resolved(option: dict[str, Any], lr: float, weight_decay: float, growth: float) -> dict[str, Any]:
    """Return the values that a row of `parameter_options` sets, with ..._mult applied to a parameter's first values."""
    started = {"lr_mult": lr, "weight_decay_mult": weight_decay}
    values = {key: value for key, value in option.items() if key != "pattern"}
    settings = {key.removesuffix("_mult"): started[key] * v if key in started else v for key, v in values.items()}
    if "weight_decay" in settings:
        settings["final_weight_decay"] = settings["weight_decay"] * (1.0 if "weight_decay" in option else growth)
    return settings


def layer_factors(encoder: nn.Module, layer_decay: float) -> dict[str, float]:
    """Return the factors of the learning rates of the encoder's parameters, by their names in the method."""
    if layer_decay == 1:
        return {}
    groups = reversed(layer_groups(encoder).values())
    return {f"model.{name}": layer_decay**depth for depth, group in enumerate(groups, start=1) for name in group}


def layer_groups(encoder: nn.Module) -> dict[str, Parameters]:
    """Return the encoder's parameters in groups from input to output, by the name of each group's first module.

    The groups are the encoder's children, in the order of their definition. While there are fewer than FEWEST_GROUPS,
    the largest child is replaced by its own children: a ResNet is divided into its stem and layer1 to layer4, a vision
    transformer into its patch embedding and every block. A part that has only vectors (a norm) belongs to the group
    before it; parameters of a replaced module itself (class token, position embedding) belong to the first group.
    """
    parts = [("", encoder)]
    while len(groups := joined_parts(parts)) < FEWEST_GROUPS and (
        openable := [part for part in parts if can_be_opened(part[1])]
    ):
        largest = max(openable, key=lambda part: modules.n_parameters(part[1]))
        name, module = largest
        at = parts.index(largest)
        parts[at : at + 1] = [(f"{name}.{child}".lstrip("."), part) for child, part in module.named_children()]
    grouped = {name for group in groups.values() for name in group}
    rest = {name: parameter for name, parameter in encoder.named_parameters() if name not in grouped}
    first = next(iter(groups), "")
    return {**groups, first: {**rest, **groups.get(first, {})}}


def joined_parts(parts: list[tuple[str, nn.Module]]) -> dict[str, Parameters]:
    """Return the parameters of each part that has any. Parts of vectors only join the part before them, and parameters
    that two parts share belong to the first."""
    joined = {}
    seen = set()
    for name, module in parts:
        own = {f"{name}.{leaf}".lstrip("."): p for leaf, p in module.named_parameters() if id(p) not in seen}
        seen |= set(map(id, own.values()))
        if joined and all(parameter.ndim < 2 for parameter in own.values()):
            joined[next(reversed(joined))] |= own
        elif own:
            joined[name] = own
    return joined


def can_be_opened(module: nn.Module) -> bool:
    """Return whether at least half of the parameters are those of children. Attention, for example, stays whole."""
    return 2 * sum(map(modules.n_parameters, module.children())) > modules.n_parameters(module)


def check_matches(params: Any, names: list[str]) -> None:
    """Raise ValueError if a pattern of the settings, of pretraining or of a classifier, matches none of the parameters
    `names`. '.bn' and '.bias' may match nothing."""
    options = [option["pattern"] for option in getattr(params, "parameter_options", [])]
    lost = [("parameter_options", o) for o in options if not any(re.search(o, name) for name in names)]
    for pattern in params.exclude_matching_parameters_from_lars:
        may_be_absent = pattern in NORMS_AND_BIASES  # an encoder may have no norms
        if not may_be_absent and not any(pattern in f".{name}" for name in names):
            lost.append(("exclude_matching_parameters_from_lars", pattern))
    for field, pattern in lost:
        near = difflib.get_close_matches(pattern.replace("\\", ""), names, 3, cutoff=0.3) or names[:3]
        hint = "" if field == "parameter_options" else ". '.bn' matches every normalization layer, whatever its name"
        raise ValueError(
            f"{field}: the pattern {pattern!r} matches none of {len(names)} parameters; some are "
            f"{', '.join(near)}. Fix the pattern, or leave it out{hint}"
        )


def optimizer_groups(
    rows: list[ParameterRow], named: dict[str, nn.Parameter], params: ModelParams
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: parameters with the same settings are stepped together.

    The first two groups always exist, even if they are empty, because checkpoints of earlier versions know groups by
    number: parameters with the default settings, and those that are excluded from weight decay and adaptation.
    """
    p = params
    final = p.weight_decay * growth(p)
    grouped = {(p.lr, p.momentum, p.weight_decay, final, True): [], (p.lr, p.momentum, 0.0, 0.0, False): []}
    for row in rows:
        grouped.setdefault(row.group, []).append(row.name)
    names = ("lr", "momentum", "weight_decay", "final_weight_decay", "adapt")
    plain = len(grouped) == 2
    return [
        {"params": [named[name] for name in members], "param_names": members, **dict(zip(names, key, strict=True))}
        | ({} if plain else {"name": members[0] if members else f"(none {number})"})
        for number, (key, members) in enumerate(grouped.items())
    ]


def printed(rows: list[ParameterRow], optimizer_name: str, lr_scaling: str | None = None) -> str:
    """Return the table as text, one line per parameter, with the columns that concern this optimizer."""
    lr = "lr" if lr_scaling is None else "lr before lr_scaling"
    cells = {
        "parameter": [row.name for row in rows],
        "shape": [" x ".join(map(str, row.shape)) or "1" for row in rows],
        lr: [f"{row.lr:.4g}" for row in rows],
        "layer": [f"{row.layer_factor:.4g}" for row in rows],
        "momentum": [f"{row.momentum:.4g}" for row in rows],
        "decay": [f"{row.weight_decay:.4g}" for row in rows],
        "final decay": [f"{row.final_weight_decay:.4g}" for row in rows],
        "LARS": ["yes" if row.adapted else "no" for row in rows],
    }
    missing = {"sgd": ["LARS"], "lars": []}.get(optimizer_name, ["momentum", "LARS"])
    if all(row.weight_decay == row.final_weight_decay for row in rows):
        missing = [*missing, "final decay"]
    columns = [[head, *column] for head, column in cells.items() if head not in missing]
    widths = [max(map(len, column)) for column in columns]
    aligned = [[f"{cell:>{width}}" for cell in column] for column, width in zip(columns[1:], widths[1:], strict=True)]
    names = [f"{name:<{widths[0]}}" for name in columns[0]]
    return "\n".join(" ".join(line) for line in zip(names, *aligned, strict=True))
