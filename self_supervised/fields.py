"""Fields of settings classes (attrs) with validation, and presets: rows of settings with a name.

An error names the field, its value and what is allowed.
"""

import difflib
import inspect
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import Any, Generic, NoReturn, ParamSpec, TypeVar, get_args

import numpy as np
from attrs import Attribute, Factory, field, fields, fields_dict
from attrs.exceptions import FrozenInstanceError

SMALLEST, LARGEST = 1e-12, 1e9  # outside these limits float32 overflows or underflows sooner or later
PerView = float | list[float] | None
WholePerView = int | list[int] | None
WHOLE = (int, int | None, list[int], WholePerView)  # annotations that allow whole numbers only
HIGHEST_OPTIONS = {"lr": 1000, "lr_mult": 1e6, "momentum": 1, "weight_decay": 1000, "weight_decay_mult": 1e6}
OPTION_KEYS = ("pattern", *HIGHEST_OPTIONS, "lars_exclude")  # keys of a row of parameter_options


# ---- Numbers ----


def number(
    default: float | None,
    at_least: float = 0,
    above: float | None = None,
    by: float = SMALLEST,
    at_most: float = LARGEST,
) -> Any:
    """Return a field for a number from `at_least`, or from `above + by`, to `at_most`.

    None is allowed if it is the default.
    """
    lowest = at_least if above is None else above + by

    def check(_: Any, attribute: Attribute, value: Any) -> None:
        if value is None and default is None:
            return
        check_number(attribute, value)
        if not lowest <= value <= at_most:  # nan is refused, too
            low = f"at least {lowest:g}" if above is None or above < value < lowest else f"above {above}"
            raise ValueError(f"{attribute.name}={value!r} must be {low} and at most {at_most:.10g}")

    return field(default=default, converter=plain, validator=check)


positive = partial(number, above=0)
non_negative = partial(number, at_least=0)
fraction = partial(number, at_least=0, at_most=1)


def numbers(
    default: tuple[float, ...] = (), at_least: float = 0, at_most: float = LARGEST, length: int | None = None
) -> Any:
    """Return a field for a list of numbers, which may be empty only if the default is.

    Args:
        length: how many there are; None: any number.
    """

    def check(_: Any, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, list) or (default and not value) or len(value) != (length or len(value)):
            raise ValueError(f"{attribute.name}={value!r} must be a list of {f'{length} ' if length else ''}numbers")
        check_each(attribute, value, at_least, at_most)

    return field(factory=lambda: list(default), converter=plain, validator=check)


betas = partial(numbers, (0.9, 0.999), at_most=0.999999, length=2)  # of Adam, which needs numbers below 1


def per_view(default: float | None, at_least: float = 0, at_most: float = 1) -> Any:
    """Return a field for one number for all views, or a list with one number per view.

    None is allowed, also within a list, if it is the default. The length of the list is checked together with the
    number of views (`model_params.value_for_view`).
    """

    def check(_: Any, attribute: Attribute, value: Any) -> None:
        each = value if isinstance(value, list) else [value]
        check_each(attribute, [one for one in each if one is not None or default is not None], at_least, at_most)

    return field(default=default, converter=plain, validator=check)


def check_each(attribute: Attribute, values: list, at_least: float, at_most: float) -> None:
    for value in values:
        check_number(attribute, value)
        if not at_least <= value <= at_most:  # nan is refused, too
            raise ValueError(f"{attribute.name}={value!r} must be at least {at_least:g} and at most {at_most:.10g}")


def check_number(attribute: Attribute, value: Any) -> None:
    """Raise ValueError unless `value` is a number, and a whole number if the field's annotation says so."""
    is_whole = attribute.type in WHOLE
    if isinstance(value, bool) or not isinstance(value, int if is_whole else int | float):
        wanted = "a whole number" if is_whole else "a number"
        if attribute.type in (PerView, WholePerView):
            wanted += ", or a list with one per view"
        raise ValueError(f"{attribute.name}={value!r} must be {wanted}")


def plain(value: Any) -> Any:
    """Return settings with Python's own numbers and strings.

    NumPy's numbers and subclasses of str could not be loaded from a checkpoint with `weights_only=True`.
    """
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


# ---- Paths, choices and other types ----


def path() -> Any:
    """Return a field for the path of a file or directory. The default is None."""

    def check(_: Any, attribute: Attribute, value: Any) -> None:
        if value == "":  # an environment variable that is not set
            raise ValueError(f"{attribute.name}='' is empty. Pass a path, or leave it out.")

    return field(default=None, converter=expanded, validator=check)


def as_path(given: str | Path) -> Path:
    """Return a path in which `~` is replaced by the home directory (a shell does not replace it after `=`). A name like
    `~nobody`, of no user, stays."""
    return Path(os.path.expanduser(given))


def expanded(value: Any) -> Any:
    """Return a path as text, with `~` replaced by the home directory.

    The text may also be a pattern, a name, or multiple paths joined by "::". A subclass of str keeps its type
    (`foreign_paths.ForeignPath`). Anything but text and paths is returned as it is.
    """
    if not isinstance(value, str | Path):
        return value
    kind = type(value) if isinstance(value, str) else str
    return kind("::".join(map(os.path.expanduser, str(value).split("::"))))


def choice(default: str | bool | None, choices: Collection) -> Any:
    """Return a field for one of `choices`. The programs' help lists them (runs/command_line.py).

    A name that is added to a table later, such as a data set to DATASETS, is accepted too.
    """

    def check(_: Any, attribute: Attribute, value: Any) -> None:
        if not isinstance(value, str | bool | None) or value not in choices:
            raise ValueError(f"{attribute.name}={value!r} is unknown: choose one of {', '.join(map(str, choices))}")

    return field(default=default, validator=check, metadata={"choices": tuple(choices)})


def check_types(settings: Any) -> None:
    """Raise ValueError if a value is not of its field's annotated type: bool, str, or list of str."""
    for attribute in fields(type(settings)):
        value = getattr(settings, attribute.name)
        kinds = get_args(attribute.type) or (attribute.type,)
        or_none = ", or None" if type(None) in kinds else ""
        if bool in kinds and str not in kinds and not isinstance(value, attribute.type):
            raise ValueError(f"{attribute.name}={value!r} must be True or False{or_none}")
        if attribute.type in (str, str | None) and not isinstance(value, attribute.type):
            raise ValueError(f"{attribute.name}={value!r} must be a string")
        is_list = attribute.type == list[str] or (attribute.type == list[str] | None and value is not None)
        if is_list and not (isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)):
            raise ValueError(f"{attribute.name}={value!r} must be a list of strings")


def own_lists(settings: Any) -> None:
    """Replace lists by copies: those of a preset, or of settings that were copied, could be changed through them."""
    for name in fields_dict(type(settings)):
        if isinstance(value := getattr(settings, name), list):
            object.__setattr__(settings, name, plain(value))  # settings are frozen


def defaults(kind: type, names: Iterable[str]) -> dict[str, Any]:
    """Return the default values of these fields of an attrs class."""
    values = {}
    for name in names:
        default = fields_dict(kind)[name].default
        values[name] = default.factory() if isinstance(default, Factory) else default
    return values


def changed(settings: Any) -> dict[str, Any]:
    """Return the fields in which settings differ from the defaults of their class."""
    kind = type(settings)
    plain_defaults = defaults(kind, fields_dict(kind))
    values = {name: getattr(settings, name) for name in plain_defaults}
    return {name: value for name, value in values.items() if value != plain_defaults[name]}


def suggestion(name: str, names: Iterable[str], start: str = "", otherwise: str = "") -> str:
    """Return ' Did you mean --lr?' with the names that are spelled like `name`.

    If there are none, these are names that have its initials as a word (learning_rate: lr), and the name that equals
    them alone if there is one.

    Args:
        start: text before each name, such as "--".
        otherwise: result if no name is near.
    """
    lower = {known.lower(): known for known in names}
    name = name.lower()
    alike = [lower[known] for known in difflib.get_close_matches(name, lower, n=3, cutoff=0.6)]
    initials = "".join(word[0] for word in name.split("_") if word)
    short = [known for known in lower if initials in known.split("_")]
    short = [initials] if initials in lower else sorted(short, key=lambda one: (not one.startswith(initials), len(one)))
    suggested = alike or [lower[known] for known in short[:3]]
    return f" Did you mean {', '.join(start + one for one in suggested)}?" if suggested else otherwise


def first_of(names: Sequence[str], most: int) -> str:
    """Return the first names as text, and how many more there are: "a, b and 3 more"."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"


# ---- Classes of settings, and presets ----

SettingsClass = TypeVar("SettingsClass", bound=type)
Arguments = ParamSpec("Arguments")
Settings = TypeVar("Settings")


def readable(kind: SettingsClass) -> SettingsClass:
    """Return a frozen attrs class with a short repr, and with errors that say what to do.

    The repr has the fields that differ from their defaults. The types of the errors are those of attrs: TypeError for
    an unknown field, FrozenInstanceError (an AttributeError) for a change.
    """
    init = kind.__init__
    names = tuple(fields_dict(kind))

    @wraps(init)
    def checked_init(self: Any, *args: Any, **settings: Any) -> None:
        for name in (one for one in settings if one not in names):  # the first one
            otherwise = f" help({kind.__name__}) shows all fields."
            raise TypeError(f"{name}: {kind.__name__} has no such field.{suggestion(name, names, '', otherwise)}")
        init(self, *args, **settings)

    def refuse_change(self: Any, name: str, value: Any) -> NoReturn:
        advice = f"Use attrs.evolve(params, {name}={value!r}), which returns changed settings."
        error = FrozenInstanceError()
        error.args = (f"{name}={value!r}: {kind.__name__} cannot be changed. {advice}",)
        raise error

    def short_repr(self: Any) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in changed(self).items())})"

    kind.__init__ = checked_init
    kind.__setattr__ = refuse_change
    kind.__repr__ = short_repr
    return kind


class Preset(Generic[Arguments, Settings]):
    """Row of settings with a name. It is called like its class: SimCLRParams(lr=0.3).

    Args:
        base: class of settings, or a preset from which this one differs.
        name: name of the variable that holds the preset.
        doc: method and paper, for `help`.
        settings: fields that differ from those of `base`.
    """

    def __init__(self, base: Callable[Arguments, Settings], name: str, doc: str, /, **settings: Any):
        self.kind = base.kind if isinstance(base, Preset) else base
        self.settings = {**(base.settings if isinstance(base, Preset) else {}), **settings}
        self.others = base.others if isinstance(base, Preset) else [base]  # presets that `isinstance` compares
        self.__name__ = name
        rows = "\n".join(f"    {field}={value!r}" for field, value in self.settings.items())
        self.__doc__ = f"{doc}\n\nReturn {self.kind.__name__} with these settings, unless others are passed:\n{rows}"
        of_kind = inspect.signature(self.kind)
        each = (one.replace(default=self.settings.get(one.name, one.default)) for one in of_kind.parameters.values())
        self.__signature__ = of_kind.replace(parameters=[*each], return_annotation=self.kind)

    def __call__(self, *args: Arguments.args, **settings: Arguments.kwargs) -> Settings:
        if args:
            raise TypeError(f"{self.__name__}({args[0]!r}): pass fields by name, such as {self.__name__}(lr=0.3).")
        return self.kind(**{**self.settings, **settings})

    def __instancecheck__(self, params: Any) -> bool:
        """Return whether no other preset of the table is nearer to these settings, which do not know their preset.

        The class itself is a preset, too: every ModelParams is an instance of MoCoV2Params.
        """
        if not isinstance(params, self.kind):
            return False
        own = distance(params, self)
        return all(own <= distance(params, other) for other in self.others)

    def __repr__(self) -> str:
        return f"<preset {self.__name__} of {self.kind.__name__}>"


def distance(params: Any, preset: Callable[..., Any]) -> tuple[bool, int]:
    """Return whether settings have another loss than a preset, and the number of fields in which they differ."""
    of_preset = preset()
    differ = [name for name in fields_dict(type(params)) if getattr(params, name) != getattr(of_preset, name)]
    return "loss_type" in differ, len(differ)


class Presets(dict[str, Callable[..., Settings]]):
    """Presets of a class of settings by name. An unknown name is a KeyError that says which names are near."""

    def __init__(self, kind: type[Settings], presets: dict[str, Callable[..., Settings]]):
        super().__init__(presets)
        self.kind = kind
        for preset in presets.values():
            if isinstance(preset, Preset):
                preset.others = list(presets.values())

    def __missing__(self, name: str) -> NoReturn:
        near = suggestion(str(name), self, otherwise=f" Choose one of {', '.join(self)}.")
        raise KeyError(f"preset={name}: unknown preset.{near}")

    def settings_of(self, given: Any) -> Settings:
        """Return settings that are passed as such, as a dict, as a preset or its name, or as None for the defaults.

        Raises:
            KeyError: there is no preset with this name.
            TypeError: it is none of these.
        """
        if given is None or isinstance(given, dict):
            return self.kind(**(given or {}))
        chosen = self[given] if isinstance(given, str) else given
        if isinstance(chosen, Preset | partial) or chosen is self.kind:
            chosen = chosen()
        if not isinstance(chosen, self.kind):
            raise TypeError(
                f"params: {type(chosen).__name__} is not {self.kind.__name__}. Pass {self.kind.__name__}, a dict of "
                f"its fields, a preset, or the name of one: {', '.join(self)}."
            )
        return chosen


# ---- Options of single parameters ----


def check_parameter_options(_: Any, attribute: Attribute, value: Any) -> None:
    """Raise ValueError unless all rows of `parameter_options` are valid. This is the validator of that field."""
    if not isinstance(value, list | tuple) or not all(isinstance(row, dict) for row in value):
        keys = ", ".join(OPTION_KEYS)
        raise ValueError(f"{attribute.name}={value!r} must be a list of dictionaries with the keys {keys}")
    for row in value:
        for message in errors_of_options(row):
            raise ValueError(f"{attribute.name}: {row} {message}")


def errors_of_options(row: dict[str, Any]) -> Iterable[str]:
    """Yield what is wrong with a row of `parameter_options`, as the predicate of a sentence about it."""
    if unknown := [key for key in row if key not in OPTION_KEYS]:
        meant = "".join(suggestion(str(key), OPTION_KEYS) for key in unknown)
        yield f"has unknown keys {unknown}.{meant} The keys are {', '.join(OPTION_KEYS)}"
    if not isinstance(row.get("pattern"), str):
        yield "needs a pattern: a regular expression for names of parameters"
    try:
        re.compile(row["pattern"])
    except re.error as error:
        yield f"has a pattern that is not a valid regular expression ({error}). Escape a literal dot as \\."
    for key in row.keys() & HIGHEST_OPTIONS.keys():
        is_number = isinstance(row[key], int | float) and not isinstance(row[key], bool)
        if not is_number or not 0 <= row[key] <= HIGHEST_OPTIONS[key]:  # nan is refused, too
            yield f"must have a number of at least 0 and at most {HIGHEST_OPTIONS[key]:g} as {key}"
    if not isinstance(row.get("lars_exclude", False), bool):
        yield "must have True or False as lars_exclude"
    for name in ("lr", "weight_decay"):
        if {name, f"{name}_mult"} <= row.keys():
            yield f"has both {name} and {name}_mult, which are mutually exclusive. Remove one of them"
    if len(row) < 2:
        yield f"has no option. Add one of {', '.join(OPTION_KEYS[1:])}"
