"""Command lines of the programs, and the parser of `self-supervised train`, which has every setting.

`train` is parsed by jsonargparse rather than tyro; both were tried on these classes. jsonargparse is argparse with
YAML: a group of options per section, `true` and `[1.0, 0.1]` as values, --config. tyro reads comments by itself, but
takes a section's heading for the comment of its first field, makes one group per class, and rejects these values.
Presets are not its sub-commands, which reject our flat configuration files and a command line without a preset.
"""

import argparse
import ast
import inspect
import io
import itertools
import shutil
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import attrs
import jsonargparse
import yaml
from attrs import asdict

from model_params import LOSSES, PRESETS, EncoderAndDataParams, ModelParams
from self_supervised import recipes
from self_supervised.fields import changed, expanded, plain, suggestion
from self_supervised.runs.run_options import RUN_OPTION_NAMES, RunOptions
from self_supervised.runs.values import (
    ListOption,
    from_yaml,
    list_options,
    reader,
    takes_list,
    text,
    type_text,
    with_joined_lists,
)

COMMAND_OPTIONS = (
    "out",
    "resume",
    "dry_run",
    "fit_memory",
    "preview",
    "print_config",
)  # do not change what a run computes
COMMON = (  # the commonest options, which the help of a preset shows first
    "dataset_name", "data_path", "encoder_arch", "batch_size", "max_epochs", "lr", "seed", "out", "dry_run",
)  # fmt: skip
CHECKPOINT = "checkpoint, directory of a run, weights file, or name of a published encoder (docs/weights.md)"
FEATURES = "file of embeddings that `self-supervised embed` wrote"
FOLDER = "directory of the features' images, if it has moved"
DEVICE = "cpu, cuda, cuda:1, mps; default: a GPU if there is one"
LAGGING = "use the lagging encoder (EMA, momentum encoder, DINO's teacher) instead of the trained one"
USAGE = "self-supervised train PRESET [options]"
EXAMPLE = "self-supervised train vicreg --recipe digits"
VALUES = "Values are YAML: 0.3, true, none. Separate list items by spaces or commas: knn rank_me or knn,rank_me"
SEE_HELP = " See --help for all names."


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of `self-supervised NAME`, whose help shows the module's docstring unchanged."""
    formatter = argparse.RawDescriptionHelpFormatter
    return CommandParser(
        prog=f"self-supervised {name}", description=description, formatter_class=formatter, allow_abbrev=False
    )


class CommandParser(argparse.ArgumentParser):
    """Parser that reports errors in one line, and a misspelled option before one that is missing because of it."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        known = [option for action in self._actions for option in action.option_strings]
        given = sys.argv[1:] if args is None else args
        for word in itertools.takewhile(lambda word: word != "--", given):
            name = word.partition("=")[0]
            if name.startswith("--") and name not in known:
                near = suggestion(name.lstrip("-"), [one.lstrip("-") for one in known], "--", SEE_HELP)
                fail(f"unknown option {name}.{near}")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        fail(message if message.endswith((".", "?")) else f"{message}. See --help.")


# ---- Help texts of fields ----


@cache
def field_comments(kind: type) -> dict[str, tuple[str, str]]:
    """Return (heading of its section, comment after it or directly above it) for every field of an attrs class.

    A heading is a comment on its own line after an empty line. Before the first heading, the first sentence of the
    docstring is used.
    """
    descriptions = {}
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
            previous_end = node.end_lineno
            if not isinstance(node, ast.AnnAssign):
                continue
            if own_lines and not lines[own_lines[0] - 2].strip():
                heading = comments[own_lines.pop(0)][0]
            above = " ".join(comments[n][0] for n in own_lines)
            descriptions[node.target.id] = (heading, comments.get(node.end_lineno, (above, False))[0])
    return descriptions


def add_fields(parser: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Add options for fields of EncoderAndDataParams, read as by `self-supervised train`. The parsed namespace lacks
    options that were not passed."""
    fields = attrs.fields_dict(EncoderAndDataParams)
    comments = field_comments(EncoderAndDataParams)
    for name in names:
        kind = fields[name].type
        options = {"type": reader(kind), "default": argparse.SUPPRESS, "metavar": type_text(fields[name])}
        options |= {"action": ListOption, "metavar": "ITEM"} if takes_list(kind) else {}
        parser.add_argument(f"--{name}", help=comments[name][1].replace("%", "%%"), **options)


# ---- The parser of `self-supervised train` ----


class TrainParser(jsonargparse.ArgumentParser):
    """Parser that reports errors in one line, and suggests names for unknown ones."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = str(ex or message)
        if message.lower().startswith("unrecognized arguments: "):
            given = message.split(": ")[1].split()[0].split("=")[0]
            name = given.lstrip("-")
            near = suggestion(name, known_names(), "--", SEE_HELP)
            message = f"unknown {'argument' if given == name else 'option'} {given}.{near}"
            if given in PRESETS:
                message = f"{given} is a preset. Pass exactly one, as the first argument."
        fail(message)


def fail(message: str) -> NoReturn:
    """Print an error in one line and exit with status 2."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def known_names() -> tuple[str, ...]:
    return *RUN_OPTION_NAMES, *(attribute.name for attribute in attrs.fields(ModelParams))


def train_parser(preset: str, recipe: str | None = None) -> TrainParser:
    """Return the parser of all options, with the values of a preset, or of its recipe, as defaults."""
    tried = ", ".join(recipes.tried_with(preset)) or "none"
    about = f"{wrapped(f'Preset {preset}: {differences(preset)}')}\nRecipes (--recipe NAME): {tried}\n{wrapped(VALUES)}"
    about += f"\nDefaults below: recipe {recipe}" if recipe else ""
    settings = recipes.recipe(preset, recipe) if recipe else PRESETS[preset]()
    # print_config=None: ours prints the validated settings. allow_abbrev: `parse` does not recognize --conf as --config
    parser = TrainParser(
        usage=USAGE, description=about, formatter_class=Formatter, print_config=None, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE", help="YAML file as --print_config writes it; options override it"
    )
    parser.add_argument("--preset", default=preset, help=argparse.SUPPRESS)  # accepts the key of a configuration file
    pairs = [
        (kind, attribute) for kind in (RunOptions(recipe=recipe), settings) for attribute in attrs.fields(type(kind))
    ]
    groups: dict[str, Any] = {}
    for defaults, attribute in sorted(pairs, key=lambda pair: place_in_help(pair[1].name)):
        heading, comment = field_comments(type(defaults))[attribute.name]
        heading = "common options" if attribute.name in COMMON else heading
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        default = getattr(defaults, attribute.name)
        groups[heading].add_argument(
            f"--{attribute.name}",
            type=reader(attribute.type),
            default=default,
            metavar=type_text(attribute),
            help=f"{comment} (default: {text(default)})".strip().replace("%", "%%"),
            **({"nargs": "?", "const": True} if attribute.type is bool else {}),
        )
    return parser


def place_in_help(name: str) -> int:
    return COMMON.index(name) if name in COMMON else len(COMMON)


class Formatter(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=44)


def differences(preset: str) -> str:
    """Return the settings in which a preset differs from the defaults, as text."""
    return ", ".join(f"{name} {text(value)}" for name, value in changed(PRESETS[preset]()).items()) or "the defaults"


def families() -> str:
    """Return the presets with their papers, by the families of their losses, as text."""
    listing = ""
    for family in dict.fromkeys(loss.family for loss in LOSSES.values()):
        names = [name for name, preset in PRESETS.items() if LOSSES[preset().loss_type].family == family]
        # "The defaults are": ModelParams is the preset moco_v2
        docs = {name: (PRESETS[name].__doc__ or "").split("\n\n")[0].split("The defaults are ")[-1] for name in names}
        lines = (f"  {name:14}{' '.join(doc.split())}" for name, doc in docs.items())
        listing += "\n".join(["", "", family, *(wrapped(line, " " * 16) for line in lines)])
    return listing


def wrapped(words: str, indent: str = "") -> str:
    return textwrap.fill(words, shutil.get_terminal_size().columns - 2, subsequent_indent=indent)


# ---- Parsing a command ----


def parse(arguments: Sequence[str]) -> tuple[str, RunOptions, ModelParams]:
    """Return (preset, options, settings) of a command line. An error ends the program with one line and status 2."""
    arguments = list(arguments)
    given = arguments.pop(0) if arguments and not arguments[0].startswith("-") else None
    if given is None and (not arguments or {"-h", "--help"} & set(arguments)):
        about = f"    {EXAMPLE}\n\nPRESET --help lists its settings and all options. Presets:{families()}"
        print(f"usage: {USAGE}\n\n{about}")
        raise SystemExit(0 if arguments else 2)
    file, recipe, others = split_config(arguments)
    preset = preset_of(given, file)
    if file and recipe:
        fail(f"recipe={recipe}: {file} has settings, too. Pass --recipe or --config, or write recipe into the file.")
    config = [f"--config={file}"] if file else []
    recipe = recipe or (settings_in(file).get("recipe") if file else None)
    if recipe is not None and not isinstance(recipe, str):
        fail(f"recipe={recipe!r}: must be a name, such as digits.")
    others = with_joined_lists(others, list_options(RunOptions, ModelParams))
    try:
        values = train_parser(preset, recipe).parse_args(config + others).as_dict()  # options override the file
        if values["preset"] != preset:
            fail(f"preset={values['preset']}: the preset is {preset}. Leave --preset out; it is the first argument.")
        lists = [a.name for kind in (RunOptions, ModelParams) for a in attrs.fields(kind) if a.type == list[str]]
        values |= {name: [] for name in lists if values[name] is None}  # null in a file, as none on the command line
        options = RunOptions(**{name: values[name] for name in RUN_OPTION_NAMES})
        return preset, options, PRESETS[preset](**{a.name: values[a.name] for a in attrs.fields(ModelParams)})
    except ValueError as error:
        fail(str(error))


def split_config(arguments: Sequence[str]) -> tuple[str | None, str | None, list[str]]:
    """Return the configuration file of --config and the recipe of --recipe, or None, and the other arguments."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    files.add_argument("--config", action="append", type=expanded, default=[])
    files.add_argument("--recipe")
    try:
        options, others = files.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        fail(str(error))
    if len(options.config) > 1:
        fail("--config was given twice. Pass one file.")
    return (options.config or [None])[0], options.recipe, others


def preset_of(given: str | None, file: str | None) -> str:
    """Return the preset: the first argument, or that of the configuration file. The file's names are checked here."""
    written = settings_in(file).get("preset") if file else None
    if given and written and given != written:
        fail(f"preset={given}: {file} has preset={written}. Leave one of them out.")
    preset = str(given or written or fail(f"preset is missing. Pass one as the first argument: {', '.join(PRESETS)}."))
    if preset not in PRESETS:
        fail(f"preset={preset}: unknown preset.{suggestion(preset, PRESETS, otherwise=SEE_HELP)}")
    return preset


def settings_in(file: str) -> dict[str, Any]:
    """Return the content of a configuration file, all of whose names are known."""
    path = Path(file)
    if not path.is_file():
        fail(f"config={path}: there is no such file.")
    try:
        content = from_yaml(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        fail(f"config={path}: not valid YAML: {error}")
    if not isinstance(content, dict):
        fail(f"config={path}: has no settings. Write one `name: value` per line.")
    for name in set(content) - {"preset", *known_names()}:
        fail(f"config={path}: unknown setting {name}.{suggestion(str(name), known_names(), '--', SEE_HELP)}")
    return content


def to_yaml(preset: str, options: RunOptions, params: ModelParams) -> str:
    """Return everything that determines a run, as YAML that --config reads."""
    assert set(COMMAND_OPTIONS) <= set(RUN_OPTION_NAMES)
    run = {name: value for name, value in asdict(options).items() if name not in COMMAND_OPTIONS}
    return yaml.safe_dump(plain({"preset": preset, **run, **attrs.asdict(params)}), sort_keys=False)
