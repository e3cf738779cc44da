"""Validated attrs fields. An error names the field, the value and what is allowed."""

from collections.abc import Iterable
from functools import partial

from attrs import field, fields

WHOLE = (int, int | None)


def check_number(attribute, value) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{attribute.name}={value!r} must be a number")
    if attribute.type in WHOLE and not isinstance(value, int):
        raise ValueError(f"{attribute.name}={value!r} must be a whole number")


def number(default, at_least: float | None = None, above: float | None = None, at_most: float = float("inf")):
    """A numeric field within bounds; None passes where it is the default."""

    def check(_, attribute, value):
        if value is None and default is None:
            return
        check_number(attribute, value)
        too_low = value < at_least if above is None else value <= above
        if too_low or not value <= at_most:
            bounds = f"at least {at_least}" if above is None else f"above {above}"
            bounds += f" and at most {at_most}" if at_most < float("inf") else ""
            raise ValueError(f"{attribute.name}={value!r} must be {bounds}")

    return field(default=default, validator=check)


def choice(default, choices: Iterable):
    def check(_, attribute, value):
        if value not in choices:
            raise ValueError(f"{attribute.name}={value!r} is unknown: choose one of {', '.join(map(str, choices))}")

    return field(default=default, validator=check)


positive = partial(number, above=0)
non_negative = partial(number, at_least=0)
fraction = partial(number, at_least=0, at_most=1)


def check_types(settings) -> None:
    """Refuse values of another kind than a field's annotation where nothing else would notice."""
    for attribute in fields(type(settings)):
        value, kind = getattr(settings, attribute.name), attribute.type
        if kind is bool and not isinstance(value, bool):
            raise ValueError(f"{attribute.name}={value!r} must be True or False")
        if kind in (str, str | None) and not isinstance(value, kind):
            raise ValueError(f"{attribute.name}={value!r} must be a string")
        if kind == list[str] and not (isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)):
            raise ValueError(f"{attribute.name}={value!r} must be a list of strings")
