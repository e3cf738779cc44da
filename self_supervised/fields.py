"""Validated attrs fields. An error names the field, the value and what is allowed."""

import difflib
import os
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from attrs import Factory, field, fields, fields_dict

HIGHEST_OPTIONS = {"lr": 1000, "lr_mult": 1e6, "momentum": 1, "weight_decay": 1000, "weight_decay_mult": 1e6}
OPTION_KEYS = ("pattern", *HIGHEST_OPTIONS, "lars_exclude")  # of a row of parameter_options
WHOLE = (int, int | None, list[int])
SMALLEST, LARGEST = 1e-12, 1e9  # beyond them float32 overflows sooner or later, and nobody means it


def check_number(attribute, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{attribute.name}={value!r} must be a number")
    if attribute.type in WHOLE and not isinstance(value, int):
        raise ValueError(f"{attribute.name}={value!r} must be a whole number")


def number(default, at_least: float = 0, above: float | None = None, by: float = SMALLEST, at_most: float = LARGEST):
    """A numeric field, from `at_least` or `by` above `above`, to `at_most`; None passes where it is the default."""

    def check(_, attribute, value):
        if value is None and default is None:
            return
        check_number(attribute, value)
        if not (at_least if above is None else above + by) <= value <= at_most:  # nan is not, either
            low = f"at least {at_least}" if above is None else f"above {above}"
            low += f", by {by} or more," if isinstance(value, float) and above is not None else ""
            raise ValueError(f"{attribute.name}={value!r} must be {low} and at most {at_most:.10g}")

    return field(default=default, converter=plain, validator=check)


def numbers(default: tuple[float, ...], at_least: float, at_most: float):
    """A list of one number or more."""

    def check(_, attribute, value):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{attribute.name}={value!r} must be a list of numbers")
        for one in value:
            check_number(attribute, one)
            if not at_least <= one <= at_most:
                raise ValueError(f"{attribute.name}={value} must be numbers from {at_least:g} to {at_most:g}")

    return field(factory=lambda: list(default), converter=plain, validator=check)


def per_view(default, at_least: float = 0, at_most: float = 1, whole: bool = False):
    """One number for every view, or a list with one a view; None passes, also within a list, where it is the default.
    How long a list must be, only all settings together say (model_params.py)."""
    kinds, kind = (int, "a whole number") if whole else (int | float, "a number")

    def check(_, attribute, value):
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is None and default is None:
                continue
            if isinstance(one, bool) or not isinstance(one, kinds):
                raise ValueError(f"{attribute.name}={value!r} must be {kind}, or a list with one a view")
            if not at_least <= one <= at_most:
                raise ValueError(f"{attribute.name}={one} must be at least {at_least:g} and at most {at_most:g}")

    return field(default=default, converter=plain, validator=check)


def list_of_numbers(at_least: float = 0, at_most: float = LARGEST):
    """A list of numbers, empty unless given."""

    def check(_, attribute, value):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{attribute.name}={value!r} must be a list of numbers")
        for one in value:
            check_number(attribute, one)
            if not at_least <= one <= at_most:  # nan is not, either
                raise ValueError(f"{attribute.name}={one!r} must be at least {at_least} and at most {at_most:.10g}")

    return field(factory=list, converter=plain, validator=check)


def as_path(given: str | Path) -> Path:
    """A path with the home directory in place of `~`, which a shell leaves behind `=`, and YAML and Python leave."""
    return Path(given).expanduser()


def expanded(value: Any) -> Any:
    """As `as_path`, but the text stays text, of its own kind (foreign_paths.ForeignPath): it may be a pattern, several
    joined by "::", or a name."""
    if not isinstance(value, str | Path):
        return value
    kind = type(value) if isinstance(value, str) else str
    return kind("::".join(map(os.path.expanduser, str(value).split("::"))))


def path():
    """The path of a file or folder, None unless given."""
    return field(default=None, converter=expanded)


def choice(default, choices: Iterable):
    """One of `choices`, which the help of a program shows (runs/command_line.py)."""

    def check(_, attribute, value):
        if not isinstance(value, str | bool | None) or value not in choices:
            raise ValueError(f"{attribute.name}={value!r} is unknown: choose one of {', '.join(map(str, choices))}")

    return field(default=default, validator=check, metadata={"choices": tuple(choices)})


positive = partial(number, above=0)
non_negative = number
fraction = partial(number, at_most=1)


def check_types(settings) -> None:
    """Refuse values of another kind than a field's annotation where nothing else would notice."""
    for attribute in fields(type(settings)):
        value, kind = getattr(settings, attribute.name), attribute.type
        if kind in (bool, bool | None) and not isinstance(value, kind):
            raise ValueError(f"{attribute.name}={value!r} must be True or False{', or None' * (kind is not bool)}")
        if kind in (str, str | None) and not isinstance(value, kind):
            raise ValueError(f"{attribute.name}={value!r} must be a string")
        if kind == list[str] | None and value is None:
            continue
        words = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        if kind in (list[str], list[str] | None) and not words:
            raise ValueError(f"{attribute.name}={value!r} must be a list of strings")


def plain(value: Any) -> Any:
    """Settings without NumPy's numbers and subclasses of str, which a checkpoint that is data only cannot hold."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str(value)  # of a subclass
    return value.item() if isinstance(value, np.generic) else value


def check_parameter_options(_: Any, attribute: Any, value: Any) -> None:
    """Refuse rows of `parameter_options` that are not valid (the validator of that field)."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, dict) for row in value):
        raise ValueError(
            f"{attribute.name}={value!r} must be a list of dictionaries with the keys {', '.join(OPTION_KEYS)}"
        )
    for row in value:
        for message in wrong_in_options(row):
            raise ValueError(f"{attribute.name}: {row} {message}")


def wrong_in_options(row: dict[str, Any]) -> Iterable[str]:
    if unknown := [key for key in row if key not in OPTION_KEYS]:
        near = [f" (or {n})" for key in unknown for n in difflib.get_close_matches(str(key), OPTION_KEYS, 1)]
        yield f"has unknown keys {unknown}{''.join(near)}: choose from {', '.join(OPTION_KEYS)}"
    if not isinstance(row.get("pattern"), str):
        yield "needs a pattern, a regular expression of parameters' names"
    try:
        re.compile(row["pattern"])
    except re.error as error:
        yield f"has a pattern that is no regular expression ({error}): mend it, a literal dot is \\."
    for key in row.keys() & HIGHEST_OPTIONS.keys():
        is_number = isinstance(row[key], int | float) and not isinstance(row[key], bool)
        if not is_number or not 0 <= row[key] <= HIGHEST_OPTIONS[key]:  # nan is not, either
            yield f"must have for {key} a number of at least 0 and at most {HIGHEST_OPTIONS[key]:g}"
    if not isinstance(row.get("lars_exclude", False), bool):
        yield "must have True or False for lars_exclude"
    for name in ("lr", "weight_decay"):
        if {name, f"{name}_mult"} <= row.keys():
            yield f"says {name} in two ways: leave one of {name} and {name}_mult out"
    if len(row) < 2:
        yield f"sets nothing: add one of {', '.join(OPTION_KEYS[1:])}"


def defaults(kind: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the default values of these fields of an attrs class."""
    found = {}
    for name in names:
        default = fields_dict(kind)[name].default
        found[name] = default.factory() if isinstance(default, Factory) else default
    return found
