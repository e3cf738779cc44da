"""Directory of a run, whose files suffice to read, compare and repeat it.

config.yaml     resolved settings, for `self-supervised train --config config.yaml`; and, as a comment, what they mean
command.txt     the command, and every command that resumed the run
run.json        time, versions, git commit and machine of each of these commands, id for trackers, number of the
                first epoch in CSV files
parameters.txt  learning rate, momentum and weight decay of each parameter
log.txt         messages, warnings and errors
results.json    scores
pretraining/    metrics.csv, throughput.csv, TensorBoard's events, checkpoints/
linear/         the same of the linear stage
splits/         lists of the images in each split, if they were drawn at random

A run that is made in Python has config.yaml, run.json, results.json and metrics.csv in the directory of its logger
(record.TrainingRecord).
"""

import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from pytorch_lightning import loggers
from pytorch_lightning.utilities import rank_zero_only
from rich.text import Text

from self_supervised.data.folders import SETTINGS as SETTINGS_OF_LISTS
from self_supervised.safe_files import atomic_write, rows_of, to_json, write_rows

LIBRARIES = ("self-supervised", "torch", "torchvision", "pytorch-lightning", "scikit-learn", "numpy")
LATER_SCORES = ("trained encoder", "test set", "linear classifier")  # keys of scores in results.json; any other: before
EFFECTIVE = "\n# Effective settings, in words (not read by --config):\n#\n"  # starts the comment in config.yaml
Kind = TypeVar("Kind", dict, list)
LOG = logging.getLogger("self_supervised")  # writes only to log.txt: `say` and warnings print themselves
LOG.setLevel(logging.INFO)
LOG.propagate = False
LOG_SOURCES = ("", LOG.name, "pytorch_lightning", "lightning_fabric")  # the named three do not propagate to the root


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of this library and of those that it builds on, and the git commit of this code.

    The commit is None if this file is not tracked by a repository, as in site-packages; "+changes" is appended to it if
    tracked files were changed.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        commit = git("rev-parse", "HEAD")
        if git("status", "--porcelain", "--untracked-files=no"):
            commit += "+changes"
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"python": platform.python_version(), **{name: version_of(name) for name in LIBRARIES}, "commit": commit}


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it runs from its sources without being installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def as_typed(arguments: Sequence[str]) -> str:
    """Return the command line that made `sys.argv`."""
    program = Path(arguments[0]).name
    start = ["python", "-m", "self_supervised"] if program == "__main__.py" else [program]
    return shlex.join([*start, *arguments[1:]])


@rank_zero_only
def begin_run_folder(out: Path, config: str, arguments: Sequence[str], resumes: bool = False, **facts: Any) -> None:
    """Write config.yaml, command.txt and run.json of a run that starts or resumes. Changed settings are printed.

    Args:
        arguments: command line; empty: the run is made in Python and has no command.txt.
        resumes: trackers continue the run of the previous start.
        facts: what run.json says of this start in addition.
    """
    out.mkdir(parents=True, exist_ok=True)
    old = settings_of_run(out)
    new = yaml.safe_load(config)
    keep_edited(out / "config.yaml")
    changed = [f"{name} {old.get(name)} -> {new.get(name)}" for name in new if old and old.get(name) != new.get(name)]
    if changed:
        begins = "resumes" if resumes or not arguments else "starts over"
        say(f"{out} {begins} with changed settings: {', '.join(changed)}")
    atomic_write(out / "config.yaml", config)
    if arguments:
        commands = out / "command.txt"
        before = text_of_file(commands) if commands.is_file() else ""
        atomic_write(commands, before + as_typed(arguments) + "\n")
        if new.get("splits_path") == str((out / "splits").resolve()):
            (out / "splits").mkdir(exist_ok=True)
    starts = starts_of(out)
    continues = resumes and starts and not is_copy(out, starts[-1])
    run_id = starts[-1].get("id") if continues else os.urandom(8).hex()
    begun = {"id": run_id, "directory": os.path.realpath(out), "first epoch": first_epoch(out)}
    facts = {**begun, **machine_facts(), **facts}
    atomic_write(out / "run.json", to_json([*starts, facts], indent=2))


def is_copy(out: Path, last: dict[str, Any]) -> bool:
    """Return whether the directory of the latest start still has that run, so that `out` was copied, not moved."""
    before = Path(last.get("directory", out)) / "run.json"
    if not before.is_file() or before.samefile(out / "run.json"):
        return False
    return any(start.get("id") == last.get("id") for start in starts_of(before.parent))


def keep_edited(config: Path) -> None:
    """Copy a config.yaml that was written or edited by hand, before it is overwritten."""
    if not config.is_file():
        return
    text = text_of_file(config)
    settings = text.partition(EFFECTIVE)[0]
    if yaml.safe_dump(yaml.safe_load(settings), sort_keys=False) != settings:  # not as `command_line.to_yaml` writes it
        kept = config.with_name(f"config_by_hand_{time.strftime('%Y%m%d_%H%M%S')}.yaml")
        atomic_write(kept, text)
        say(f"{config} was edited by hand. A copy is in {kept.name}.")


def settings_of_run(out: Path) -> dict[str, Any]:
    """Return the content of config.yaml, or {} if there is no file.

    Raises:
        ValueError: the file is corrupt.
    """
    return content_of(out / "config.yaml", yaml.safe_load, dict)


def settings_to_compare(out: Path) -> dict[str, Any]:
    """Return the settings of a run, without `splits_path` if its lists were drawn: by this run, or by the one whose
    config.yaml it was given."""
    settings = settings_of_run(out)
    lists = Path(settings.get("splits_path") or "none")
    drawn = lists.name == "splits" and any(out.glob("splits/*.txt")) or (lists / SETTINGS_OF_LISTS).is_file()
    return {**settings, "splits_path": None} if drawn else settings


def effective_of(out: Path) -> dict[str, Any]:
    """Return the effective settings in config.yaml, or {} if it has none; see `settings_of_run`."""

    def read(text: str) -> Any:
        lines = text.partition(EFFECTIVE)[2].splitlines()
        return yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines)) or {}

    return content_of(out / "config.yaml", read, dict)


def results_of(out: Path) -> dict[str, Any]:
    """Return the content of results.json, with NaN where a score is null; see `settings_of_run`."""

    def with_nan(value: Any) -> Any:
        is_scores = isinstance(value, dict)
        return {name: math.nan if number is None else number for name, number in value.items()} if is_scores else value

    return {name: with_nan(value) for name, value in content_of(out / "results.json", json.loads, dict).items()}


def baseline_of(results: dict[str, Any]) -> str | None:
    """Return the key in results.json of the encoder's scores before the training, such as "random encoder"."""
    return next((name for name, value in results.items() if isinstance(value, dict) and name not in LATER_SCORES), None)


def starts_of(out: Path) -> list[dict[str, Any]]:
    """Return the content of run.json, or [] if there is no file; see `settings_of_run`."""
    starts = content_of(out / "run.json", json.loads, list)
    if not all(isinstance(start, dict) for start in starts):
        raise ValueError(f"{out / 'run.json'}: must be a list of objects. Correct the file, or move it away.")
    return starts


def file_of(out: Path, name: str) -> Path:
    """Return the path of a file of a run. A run that is made in Python has no pretraining/; its files are one up."""
    return out / (name if (out / "pretraining").is_dir() else name.removeprefix("pretraining/"))


def advice_without_run(folder: Path) -> str:
    """Return the advice for a directory that is not that of a run."""
    if (folder / "metrics.csv").is_file():
        return "Only trainings of SelfSupervisedMethod are recorded. `self-supervised curves` draws other metrics.csv."
    near = sorted(folder.glob("*/run.json"))
    named = f"such as {near[-1].parent}" if near else "--out of the command, or log_dir of the logger in Python"
    return f"Pass the directory of a run, {named}."


def first_epoch(out: Path) -> int:
    """Return the number of the first epoch in the CSV files of a run.

    It is 1, and epoch 0 is the untrained encoder. Earlier versions wrote Lightning's count, 0 for the first epoch. Runs
    that they began are resumed with that count, so that each file has only one.
    """
    first = next(iter(starts_of(out)), {"first epoch": 1})
    return first.get("first epoch", 0)


def content_of(path: Path, parse: Callable[[str], Any], kind: type[Kind]) -> Kind:
    """Return the parsed content of a file of a run, or an empty `kind` if there is no file.

    Raises:
        ValueError: the file is corrupt, or is not of this kind.
    """
    if not path.is_file():
        return kind()
    text = text_of_file(path)
    try:
        content = parse(text)
    except (ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: cannot be read ({reason}). Correct the file, or move it away.") from error
    if not isinstance(content, kind):
        expected = "names and values" if kind is dict else "a list"
        raise ValueError(f"{path}: must hold {expected}. Correct the file, or move it away.")
    return content


def text_of_file(path: Path) -> str:
    """Return the text of a file. Raises ValueError if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text ({error}). Correct the file, or move it away.") from error


def machine_facts() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "versions": versions(),
        "machine": {"system": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "gpus": gpus,
    }


# ---- log.txt ----


class LogFile(logging.FileHandler):
    """Handler that skips what a full disk does not take: the error that ends the run says it in one line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):
            super().close()


@contextmanager
def logged(path: Path) -> Iterator[None]:
    """Also write messages of Lightning and of this library, warnings, and an error that ends the block to a file."""
    if rank_zero_only.rank != 0:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    sources = [logging.getLogger(name) for name in LOG_SOURCES]
    show = warnings.showwarning

    def show_and_log(message: Any, category: type, *args: Any, **kwargs: Any) -> None:
        show(message, category, *args, **kwargs)  # logging.captureWarnings would hide warnings in the terminal
        file, line = args[:2]
        LOG.warning("%s: %s (%s, line %d)", category.__name__, message, file, line)

    for source in sources:
        source.addHandler(handler)
    warnings.showwarning = show_and_log
    try:
        yield
    except Exception:
        LOG.exception("ended by an error")
        raise
    finally:
        warnings.showwarning = show
        for source in sources:
            source.removeHandler(handler)
        handler.close()


@rank_zero_only
def say(text: str) -> None:
    """Print a text, and write it to log.txt while that is open."""
    print(text)
    LOG.info("%s", Text.from_ansi(text).plain)


def is_score_row(row: dict[str, str], start: str = "valid_") -> bool:
    """Return whether a row of metrics.csv has scores only, of a validation (or of the test)."""
    names = {name for name, value in row.items() if value} - {"epoch", "step"}
    return bool(names) and all(name.startswith(start) for name in names)


def has_scores(path: Path, epoch: int, n_steps: int) -> bool:
    """Return whether a metrics.csv has a row of scores of this epoch after all `n_steps`. The number in such a row is
    that of the last step, or of the one that would follow."""
    of_epoch = [row for row in rows_of(path)[1] if is_score_row(row) and row.get("epoch") == str(epoch)]
    return any(int(row["step"]) >= n_steps - 1 for row in of_epoch)


def rows_to_keep(rows: list[dict[str, str]], n_steps: int, counts_from_1: bool) -> list[dict[str, str]]:
    """Return the rows of metrics.csv of the first `n_steps`.

    Scores at the end of a training have the number of the step that would follow. They are kept if there are no others
    of their epoch, and no later steps of it, after which they were computed. In runs that count epochs from 0, their
    epoch has the number of the next one, and they are not kept.
    """
    kept = [row for row in rows if int(row["step"]) < n_steps]
    later = [row for row in rows if int(row["step"]) >= n_steps and not is_score_row(row, "test_")]
    others = [row for row in kept if is_score_row(row)] + [row for row in later if not is_score_row(row)]
    epochs = {row.get("epoch") for row in others}
    last = [
        row for row in later if int(row["step"]) == n_steps and is_score_row(row) and row.get("epoch") not in epochs
    ]
    return kept + (last if counts_from_1 else [])


def csv_logger(out: Path, name: str, first_step: int) -> loggers.CSVLogger:
    """Return a logger that continues metrics.csv at `first_step`. Lightning's own logger would delete earlier rows; and
    those in the file, if it is killed while it adds a column."""
    path = out / name / "metrics.csv"
    kept = out / name / "metrics.kept.csv"
    logger = loggers.CSVLogger(out, name=name, version="")
    header = []
    if rank_zero_only.rank != 0:
        return logger
    if kept.is_file() and not path.is_file():  # an earlier process was killed before the last lines of this function
        kept.replace(path)
    if first_step > 0 and path.is_file():
        header, rows = rows_of(path)
        write_rows(kept, header, rows_to_keep(rows, first_step, first_epoch(out) == 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*logs directory .* exists")
        experiment = logger.experiment
    if header:
        kept.replace(path)
        experiment.metrics_keys = header
    experiment._rewrite_with_new_header = partial(add_columns, path)
    return logger


def add_columns(file: Path, columns: list[str]) -> None:
    """Write the rows of a CSV file anew, with these columns. Those that a row lacks are empty."""
    write_rows(file, columns, rows_of(file)[1])
