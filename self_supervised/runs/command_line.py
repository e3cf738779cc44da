"""Every field of ModelParams and RunOptions as an option of a program.

Parsed by jsonargparse rather than tyro; both were tried on these classes. jsonargparse is argparse with YAML: a group
of options for each section, `true` and `[1.0, 0.1]` as values, --config. tyro reads comments by itself, but takes a
section's heading for the comment of its first field, makes one group of a class, and refuses `true` and `[1.0, 0.1]`.
"""

import argparse
import ast
import difflib
import importlib.util
import inspect
import io
import re
import shutil
import sys
import textwrap
import tokenize
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin

import attrs
import jsonargparse
import yaml
from attrs import asdict, field, fields, frozen
from rich.progress import MofNCompleteColumn, Progress

from model_params import PRESETS, EncoderAndDataParams, ModelParams
from self_supervised.fields import check_types, choice, expanded, non_negative, number, path, positive


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of `self-supervised NAME`, whose help is the module's docstring as it stands."""
    formatter = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(
        prog=f"self-supervised {name}", description=description, formatter_class=formatter, allow_abbrev=False
    )


def in_one_line(name: str) -> str:
    """The name of a class, run or file as a picture can show it: without line breaks, and without the characters that
    no font has (control characters; bytes of a file's name that are not text)."""
    shown = " ".join(name.split())
    return "".join("\ufffd" if unicodedata.category(one) in ("Cc", "Cs") else one for one in shown)


def label(name: str, longest: int = 160) -> str:
    """For matplotlib, which reads text between dollar signs as a formula, and leaves names with _ out of legends."""
    shown = in_one_line(name)
    shown = (shown if len(shown) <= longest else f"{shown[: longest - 1]}…").replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def bar() -> Progress:
    return Progress(*Progress.get_default_columns(), MofNCompleteColumn())


# ---- How a run is carried out and where it is kept. What it computes is in ModelParams ----


LOGGERS = {"tensorboard": "tensorboard", "csv": None, "wandb": "wandb", "mlflow": "mlflow"}  # name -> package it needs
OF_THE_TRAINER = (
    "precision", "devices", "num_nodes", "strategy", "accumulate_grad_batches", "sync_batchnorm", "max_time",
    "limit_train_batches", "log_every_n_steps", "deterministic",
)  # fmt: skip
OF_THE_COMMAND = ("out", "resume", "dry_run", "preview", "print_config")  # do not make another run


@frozen(kw_only=True)
class RunOptions:
    """The programs' options."""

    # instead of a run
    dry_run: bool = False  # build everything, train two steps, validate one batch, print a summary; leaves no files
    preview: str | None = path()  # draw the first images and their views into this PNG
    print_config: bool = False  # print the settings as YAML, as --config reads them

    # the run
    out: str | None = path()  # its folder; none: runs/PRESET_DATASET
    resume: str | None = path()  # auto: from the newest good checkpoint of --out, if any; else a checkpoint
    logger: list[str] = field(factory=lambda: ["tensorboard"])  # of tensorboard, wandb, mlflow; csv is always there
    log_gradient_norms: bool = False  # grad_norm_PART at every logged step

    # checkpoints
    checkpoint_every_n_steps: int = positive(1000)  # and after every epoch; the newest two stay, to resume from
    save_best: list[str] = field(factory=list)  # best_NAME.ckpt; lowest of a loss, else highest; or NAME:min, NAME:max
    save_every_n_epochs: int | None = positive(None)  # epoch_N.ckpt, which stay

    # the linear classifier
    linear_epochs: int = non_negative(0)  # train LinearClassifierMethod this long afterwards
    linear_lr: float = positive(30.0)  # meant for 256 images in one optimizer step

    # the Trainer
    precision: str = choice("32-true", ("32-true", "16-mixed", "bf16-mixed"))  # of numbers: mixed, for GPUs
    devices: int | str | list[int] = "auto"  # how many, or which
    num_nodes: int = positive(1)  # machines
    strategy: str = "auto"  # ddp, ddp_find_unused_parameters_true, fsdp, ...
    accumulate_grad_batches: int = positive(1)  # batches of one optimizer step
    sync_batchnorm: bool = False  # batch statistics over all processes
    max_time: str | None = None  # DD:HH:MM:SS, after which the training ends as if it were finished
    limit_train_batches: int | float | None = number(None, above=0)  # of an epoch: whole: batches; else: share
    log_every_n_steps: int = positive(50)  # rows of metrics.csv; choose fewer where an epoch has fewer
    deterministic: bool = False  # algorithms with the same bits every time, or an error; slower

    def __attrs_post_init__(self):
        check_types(self)
        for name in self.logger:
            if name not in LOGGERS:
                raise ValueError(f"logger={name!r} is unknown: choose of {', '.join(LOGGERS)}")
            if LOGGERS[name] and importlib.util.find_spec(LOGGERS[name]) is None:
                raise ValueError(f"logger={name!r} needs a package that is not installed: pip install {LOGGERS[name]}")
        for wanted in self.save_best:
            if ":" in wanted and wanted.split(":")[1] not in ("min", "max"):
                raise ValueError(f"save_best={wanted!r} must be the name of a figure, NAME:min or NAME:max")
        if self.max_time is not None and not re.fullmatch(r"\d+(:\d\d){3}", self.max_time):
            raise ValueError(f"max_time={self.max_time!r} must be DD:HH:MM:SS: 00:10:00:00 for ten hours")
        share = self.limit_train_batches
        if isinstance(share, float) and share > 1:
            raise ValueError(f"limit_train_batches={share} is no share: give a whole number of batches, or at most 1.0")

    def of_the_trainer(self) -> dict[str, Any]:
        """Arguments of pl.Trainer."""
        return {name: getattr(self, name) for name in OF_THE_TRAINER}

    def of_the_run(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in OF_THE_COMMAND}


RUN_OPTION_NAMES = tuple(attribute.name for attribute in fields(RunOptions))


# ---- Every field of ModelParams and RunOptions as an option of a program ----


from_yaml = jsonargparse.get_loader("yaml")
USAGE = "self-supervised train PRESET [options]"
VALUES = "Values are YAML: 0.3, true, none, [1.0, 0.1]. In lists of words the brackets may be left out: knn,rank_me"


# ---- what the source says of a field ----


@cache
def field_comments(kind: type) -> dict[str, tuple[str, str]]:
    """Of each field: (the heading of its section, the comment behind or directly above it).

    A heading is a comment of its own line after an empty one; before the first, it is the docstring's first sentence.
    """
    found = {}
    for owner in reversed([base for base in kind.__mro__ if attrs.has(base)]):
        source = inspect.cleandoc("\n" + inspect.getsource(owner))
        comments = {
            token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT
        }
        lines = source.splitlines()
        heading = owner.__doc__.split(".")[0]
        previous_end = 0
        for node in ast.parse(source).body[0].body:
            own_lines = [n for n in range(previous_end + 1, node.lineno) if n in comments and comments[n][1]]
            is_heading = bool(own_lines) and not lines[own_lines[0] - 2].strip()
            above = " ".join(comments[n][0] for n in own_lines)
            previous_end = node.end_lineno
            if not isinstance(node, ast.AnnAssign):
                continue
            heading = above if is_heading else heading
            behind = comments.get(node.end_lineno, ("", False))[0]
            found[node.target.id] = (heading, behind or ("" if is_heading else above))
    return found


def type_text(attribute: attrs.Attribute) -> str:
    """For the help: what may be given."""
    choices = attribute.metadata.get("choices")
    if choices is None:
        kinds = get_args(attribute.type) or (attribute.type,)
        kinds = (attribute.type,) if get_origin(attribute.type) is list else kinds
        words = {bool: "true|false", int: "whole", float: "number", str: "text", NoneType: "none"}
        choices = [words.get(kind, "list") for kind in kinds]
    return "|".join(text(choice) for choice in choices)


def text(value: Any) -> str:
    """As it is written on the command line."""
    if isinstance(value, list):
        return f"[{', '.join(map(text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def reader(kind: Any) -> Callable[[Any], Any]:
    """What is given for a field of this type -> its value. Whether it is allowed, the field says."""

    def read(given: Any) -> Any:
        if not isinstance(given, str):  # from a configuration file, or a default
            return given
        if given.lower() in ("none", "null"):
            return [] if kind == list[str] else None
        if kind in (str, str | None):
            return given
        if kind == list[str] and not given.startswith("["):
            return given.split(",")
        try:
            value = from_yaml(given)
        except yaml.YAMLError as error:
            raise argparse.ArgumentTypeError(f"{given!r} is no YAML") from error
        if isinstance(value, list):
            return [None if one in ("none", "None") else one for one in value]
        return value

    return read


def add_fields(parser: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Options for fields of EncoderAndDataParams, read as train.py reads them; none is there that was not given."""
    fields = attrs.fields_dict(EncoderAndDataParams)
    told = field_comments(EncoderAndDataParams)
    for name in names:
        options = {"type": reader(fields[name].type), "default": argparse.SUPPRESS, "metavar": "VALUE"}
        parser.add_argument(f"--{name}", help=told[name][1].replace("%", "%%"), **options)


# ---- the parser ----


class Parser(jsonargparse.ArgumentParser):
    """Errors in one line; unknown names with those that may have been meant."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = str(ex or message)
        if message.lower().startswith("unrecognized arguments: "):
            given = message.split(": ")[1].split()[0].split("=")[0]
            name = given.lstrip("-")
            unknown = f"unknown {'argument' if given == name else 'option'} {given}.{meant(name)}"
            message = f"{given} is a preset: one is needed, as the first argument" if given in PRESETS else unknown
        fail(message)


def fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def known_names() -> tuple[str, ...]:
    return *RUN_OPTION_NAMES, *(attribute.name for attribute in attrs.fields(ModelParams))


def meant(name: str, names: Sequence[str] | None = None, start: str = "--") -> str:
    """' Did you mean --lr?': names that are spelled alike, or that have its initials (learning_rate: lr) as a word."""
    names = names or known_names()
    name = name.lower()
    lower = {known.lower(): known for known in names}
    alike = [lower[known] for known in difflib.get_close_matches(name, lower, n=3, cutoff=0.6)]
    initials = "".join(word[0] for word in name.split("_") if word)
    short = [known for known in names if initials in known.lower().split("_")]
    found = (alike or sorted(short, key=lambda known: (not known.lower().startswith(initials), len(known))))[:3]
    return f" Did you mean {', '.join(start + one for one in found)}?" if found else " --help lists all"


def parser(preset: str) -> Parser:
    """Of all options, with this preset's values as defaults."""
    about = f"{wrapped(f'{preset}: {differences(preset)}')}\n{VALUES}"
    # print_config=None: ours prints what was validated. allow_abbrev: `parse` would not know --conf for --config
    built = Parser(usage=USAGE, description=about, formatter_class=Formatter, print_config=None, allow_abbrev=False)
    built.add_argument("--config", action="config", metavar="FILE", help="YAML of --print_config; options win")
    built.add_argument("--preset", default=preset, help=argparse.SUPPRESS)  # of a configuration file
    groups = {}
    for defaults in (RunOptions(), PRESETS[preset]()):
        for attribute in attrs.fields(type(defaults)):
            heading, comment = field_comments(type(defaults))[attribute.name]
            if heading not in groups:
                groups[heading] = built.add_argument_group(heading)
            default = getattr(defaults, attribute.name)
            groups[heading].add_argument(
                f"--{attribute.name}",
                type=reader(attribute.type),
                default=default,
                metavar=type_text(attribute),
                help=f"{comment} (default: {text(default)})".strip().replace("%", "%%"),
                **({"nargs": "?", "const": True} if attribute.type is bool else {}),
            )
    return built


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44)


def changed(settings: Any) -> dict[str, Any]:
    """Return the fields in which settings differ from the defaults of their class."""
    plain = attrs.asdict(type(settings)())
    return {name: value for name, value in attrs.asdict(settings).items() if value != plain[name]}


def differences(preset: str) -> str:
    """What a preset sets, in which it differs from the defaults."""
    return ", ".join(f"{name} {text(value)}" for name, value in changed(PRESETS[preset]()).items()) or "the defaults"


def wrapped(words: str, indent: str = "") -> str:
    return textwrap.fill(words, shutil.get_terminal_size().columns - 2, subsequent_indent=indent)


# ---- a command ----


def parse(arguments: Sequence[str]) -> tuple[str, RunOptions, ModelParams]:
    """(preset, options, settings). What is wrong ends the program with one line and status 2."""
    arguments = list(arguments)
    given = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if given is None and (not arguments or {"-h", "--help"} & set(arguments)):
        print(f"usage: {USAGE}\n\nPRESET --help shows every option. Presets, and the settings that make them:\n")
        print("\n".join(wrapped(f"{name:14}{differences(name)}", " " * 14) for name in PRESETS))
        raise SystemExit(0 if arguments else 2)
    config = [arguments.pop(at) for at in option_at(arguments, "--config")]
    config = [f"--config={expanded(one.removeprefix('--config='))}" for one in config if one != "--config"]
    if option_at(arguments, "--config"):
        fail("--config is there twice: give one file")
    preset = preset_of(given, config)
    found = parser(preset).parse_args(config + arguments).as_dict()  # the file first: options win
    try:
        options = RunOptions(**{name: found[name] for name in RUN_OPTION_NAMES})
        return preset, options, PRESETS[preset](**{a.name: found[a.name] for a in attrs.fields(ModelParams)})
    except ValueError as error:
        fail(str(error))


def option_at(arguments: list[str], name: str) -> list[int]:
    """Where to pop an option and its value; empty if it is not there."""
    for at, argument in enumerate(arguments):
        if argument == name or argument.startswith(f"{name}="):
            return [at] if "=" in argument else [at, at]
    return []


def preset_of(given: str | None, config: list[str]) -> str:
    """The first argument, or what the configuration file says."""
    written = None
    if config:
        path = Path(config[-1].removeprefix("--config="))
        if not path.is_file():
            fail(f"config={path} is no file")
        try:
            content = from_yaml(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            fail(f"config={path} is no YAML: {error}")
        if not isinstance(content, dict):
            fail(f"config={path} holds no settings")
        for name in set(content) - {"preset", *known_names()}:
            fail(f"{path}: unknown setting {name}.{meant(name)}")
        written = content.get("preset")
    if given and written and given != written:
        fail(f"preset={given} contradicts {written} in {config[-1]}: leave one of them out")
    preset = given or written or fail(f"which preset? the first argument must be one of {', '.join(PRESETS)}")
    return preset if preset in PRESETS else fail(f"unknown preset {preset}.{meant(preset, tuple(PRESETS), '')}")


def to_yaml(preset: str, options: RunOptions, params: ModelParams) -> str:
    """Everything that makes this run, as --config reads it."""
    assert not set(OF_THE_COMMAND) - set(RUN_OPTION_NAMES)
    return yaml.safe_dump({"preset": preset, **options.of_the_run(), **attrs.asdict(params)}, sort_keys=False)
