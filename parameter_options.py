"""What the optimizer does with each parameter: one table, from which its groups and the printed list both come.

parameter_options=[{"pattern": "projection_model", "lr_mult": 10.0}, {"pattern": r"\\.bias$", "weight_decay": 0.0}]
"""

import difflib
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from attrs import frozen
from torch import nn

import lars
import layers

if TYPE_CHECKING:
    from model_params import ModelParams

HIGHEST = {"lr": 1000, "lr_mult": 1e6, "momentum": 1, "weight_decay": 1000, "weight_decay_mult": 1e6}
ONLINE = "online_classifier."  # its parameters' names
KEYS = ("pattern", *HIGHEST, "lars_exclude")


@frozen
class Row:
    """What one parameter gets."""

    name: str
    shape: tuple[int, ...]
    lr: float  # the highest, before `lr_scaling`
    momentum: float  # of sgd and lars
    weight_decay: float  # the first, if it has a schedule
    adapted: bool  # by LARS
    layer_factor: float  # of `lr`, by `layer_decay`

    @property
    def group(self) -> tuple:
        return (self.lr, self.momentum, self.weight_decay, self.adapted)


def check(_: Any, attribute: Any, value: Any) -> None:
    """Validator of the field."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{attribute.name}={value!r} must be a list of dictionaries with the keys {', '.join(KEYS)}")
    for row in value:
        for message in wrong(row):
            raise ValueError(f"{attribute.name}: {row} {message}")


def wrong(row: dict[str, Any]) -> Iterable[str]:
    if unknown := [key for key in row if key not in KEYS]:
        near = [f" (or {n})" for key in unknown for n in difflib.get_close_matches(str(key), KEYS, 1)]
        yield f"has unknown keys {unknown}{''.join(near)}: choose from {', '.join(KEYS)}"
    if not isinstance(row.get("pattern"), str):
        yield "needs a pattern, a regular expression of parameters' names"
    try:
        re.compile(row["pattern"])
    except re.error as error:
        yield f"has a pattern that is no regular expression ({error}): mend it, a literal dot is \\."
    for key in row.keys() & HIGHEST.keys():
        is_number = isinstance(row[key], int | float) and not isinstance(row[key], bool)
        if not is_number or not 0 <= row[key] <= HIGHEST[key]:  # nan is not, either
            yield f"must have for {key} a number of at least 0 and at most {HIGHEST[key]:g}"
    if not isinstance(row.get("lars_exclude", False), bool):
        yield "must have True or False for lars_exclude"
    for name in ("lr", "weight_decay"):
        if {name, f"{name}_mult"} <= row.keys():
            yield f"says {name} in two ways: leave one of {name} and {name}_mult out"
    if len(row) < 2:
        yield f"sets nothing: add one of {', '.join(KEYS[1:])}"


def table(module: nn.Module, params: "ModelParams") -> list[Row]:
    """One row for each trainable parameter of `module`, in its order; its encoder is `module.model`.

    A parameter starts with `lr` (times `layer_decay` for each stage of the encoder from its own to the heads, as in
    BEiT, https://arxiv.org/abs/2106.08254), `momentum` and `weight_decay`; if it matches
    `exclude_matching_parameters_from_lars`, it has no weight decay and is not adapted. Then come the rows of
    `parameter_options` whose pattern is found in its name (`re.search`), in their order: what a row says of the rate,
    the momentum, the decay or the adaptation replaces what was said before. ..._mult is of what the parameter started
    with. The online classifier has settings of its own, and neither decay nor adaptation.

    Raises:
        ValueError: a pattern matches no trainable parameter.
    """
    p = params
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    check_matches(p.parameter_options, [name for name in named if not name.startswith(ONLINE)])
    excluded = lars.parameter_groups(module, p.exclude_matching_parameters_from_lars)[1]
    factors = layer_factors(module.model, p.layer_decay)
    rows = []
    for name, parameter in named.items():
        if name.startswith(ONLINE):
            rows.append(Row(name, tuple(parameter.shape), p.online_classifier_lr, p.momentum, 0.0, False, 1.0))
            continue
        factor = factors.get(name, 1.0)
        lr, decay = p.lr * factor, 0.0 if name in excluded else p.weight_decay
        found = {"lr": lr, "momentum": p.momentum, "weight_decay": decay, "lars_exclude": name in excluded}
        for option in p.parameter_options:
            if re.search(option["pattern"], name):
                found |= resolved(option, lr, decay)
        adapted = not found.pop("lars_exclude")
        rows.append(Row(name, tuple(parameter.shape), adapted=adapted, layer_factor=factor, **found))
    return rows


def resolved(option: dict[str, Any], lr: float, weight_decay: float) -> dict[str, Any]:
    """One row of `parameter_options` without pattern and ..._mult."""
    started = {"lr_mult": lr, "weight_decay_mult": weight_decay}
    values = {key: value for key, value in option.items() if key != "pattern"}
    return {key.removesuffix("_mult"): started[key] * v if key in started else v for key, v in values.items()}


def layer_factors(encoder: nn.Module, layer_decay: float) -> dict[str, float]:
    """Of the rates of the encoder's parameters, by their names beside the heads."""
    if layer_decay == 1:
        return {}
    stages = reversed(layers.stages(encoder).values())
    return {f"model.{name}": layer_decay**depth for depth, stage in enumerate(stages, start=1) for name in stage}


def check_matches(options: list[dict[str, Any]], names: list[str]) -> None:
    for option in options:
        pattern = option["pattern"]
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern.replace("\\", ""), names, 3, cutoff=0.3) or names[:3]
            raise ValueError(
                f"parameter_options: the pattern {pattern!r} matches none of {len(names)} trainable parameters; some "
                f"are {', '.join(near)}"
            )


def groups(rows: list[Row], named: dict[str, nn.Parameter], params: "ModelParams") -> list[dict[str, Any]]:
    """The optimizer's: parameters that get the same are stepped together. First those without and with exclusion that
    have no options of their own, even if there are none, because checkpoints of the optimizer count groups."""
    p = params
    found = {(p.lr, p.momentum, p.weight_decay, True): [], (p.lr, p.momentum, 0.0, False): []}
    for row in rows:
        found.setdefault(row.group, []).append(row.name)
    names = ("lr", "momentum", "weight_decay", "adapt")
    plain = len(found) == 2
    return [
        {"params": [named[name] for name in members], **dict(zip(names, key, strict=True))}
        | ({} if plain else {"name": members[0] if members else "(none)"})
        for key, members in found.items()
    ]


def printed(rows: list[Row]) -> str:
    """The table in words and numbers, one line a parameter."""
    width = max((len(row.name) for row in rows), default=0)
    lines = [f"{'parameter':<{width}} {'shape':>18} {'lr':>9} {'layer':>7} {'momentum':>8} {'decay':>9} LARS"]
    for row in rows:
        shape = " x ".join(map(str, row.shape)) or "1"
        numbers = f"{row.lr:>9.4g} {row.layer_factor:>7.4g} {row.momentum:>8.4g} {row.weight_decay:>9.4g}"
        lines.append(f"{row.name:<{width}} {shape:>18} {numbers} {'yes' if row.adapted else 'no'}")
    return "\n".join(lines)
