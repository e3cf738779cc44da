"""Values on the command line: how the text of an option becomes the value of a field, and lists."""

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

import attrs
import jsonargparse
import yaml

from_yaml = jsonargparse.get_loader("yaml")


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types that an annotation allows: (float, list[float]) for float | list[float]."""
    return (kind,) if get_origin(kind) is list else get_args(kind) or (kind,)


def takes_list(kind: Any) -> bool:
    return any(get_origin(one) is list for one in alternatives(kind))


def type_text(attribute: attrs.Attribute) -> str:
    """Return the choices of a field, or the names of its types, as the help shows them."""
    choices = attribute.metadata.get("choices")
    if choices is None:
        words = {bool: "true|false", int: "integer", float: "number", str: "text", NoneType: "none"}
        choices = [words.get(kind, "list") for kind in alternatives(attribute.type)]
    return "|".join(text(choice) for choice in choices)


def text(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def reader(kind: Any) -> Callable[[Any], Any]:
    """Return the function that turns an argument into a value for a field of this type. The field validates it."""
    kinds = alternatives(kind)

    def read(given: Any) -> Any:
        if not isinstance(given, str):  # from a configuration file, or a default
            return given
        if given.lower() in ("none", "null"):
            return [] if kind == list[str] else None
        if kind in (str, str | None):
            return given
        if list[str] in kinds and not given.startswith("["):
            if kind == list[str] or all("=" in word for word in given.split(",")):  # class_to_idx may be a file
                return items()(given)
        elif takes_list(kind) and not given.startswith("[") and ("," in given or not {int, float} & {*kinds}):
            given = f"[{given}]"
        if int in kinds and re.fullmatch(r"0\d+", given):
            return int(given)  # octal in YAML
        try:
            value = from_yaml(given)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"{given!r} is not valid YAML") from error
        if isinstance(value, list):
            return [None if one in ("none", "None") else one for one in value]
        is_whole = isinstance(value, float) and float not in kinds and value.is_integer()  # 1e2
        return int(value) if is_whole else value

    return read


# ---- Lists, whose items are separated by blanks or by commas ----


def items(read: Callable[[str], Any] = str, separator: str = ",") -> Callable[[str], list[Any]]:
    """Return the function that reads a list from one text, which may be in brackets.

    Args:
        read: function that reads an item.
        separator: regular expression.
    """

    def read_items(given: str) -> list[Any]:
        inside = given[1:-1] if given.startswith("[") and given.endswith("]") else given
        return [read(word.strip()) for word in re.split(separator, inside) if word.strip()]

    return read_items


class ListOption(argparse.Action):
    """Option of argparse that reads its values, joined by commas, with its `type`."""

    def __init__(self, *args: Any, type: Callable[[str], Any], **options: Any):
        super().__init__(*args, nargs="+", **options)
        self.read = type

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        try:
            setattr(namespace, self.dest, self.read(",".join(value.strip(",") for value in values)))
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise argparse.ArgumentError(self, str(error)) from error


def with_joined_lists(arguments: Sequence[str], options: Collection[str]) -> list[str]:
    """Return the arguments with each list as one of them: --evaluations knn rank_me as --evaluations=knn,rank_me.

    Args:
        options: those that take lists.
    """
    joined: list[str] = []
    for argument in arguments:
        before = joined[-1] if joined else ""
        is_value = re.match(r"-+[^\d.]", argument) is None  # -1 and -.5 are values
        if is_value and before.partition("=")[0] in options:
            joined[-1] = f"{before.rstrip(',')}{',' if '=' in before else '='}{argument}"
        else:
            joined.append(argument)
    return joined


def list_options(*kinds: type) -> set[str]:
    """Return the options of all fields of attrs classes that take lists."""
    fields: Iterable[attrs.Attribute] = [attribute for kind in kinds for attribute in attrs.fields(kind)]
    return {f"--{attribute.name}" for attribute in fields if takes_list(attribute.type)}
