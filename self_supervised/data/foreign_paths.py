"""Foreign paths: paths in a checkpoint's settings that nobody requested on this machine.

A checkpoint may come from a stranger, so foreign paths are neither read nor created. A path is requested if

1. the caller passes it,
2. it is relative and stays below the current directory, or lies below DATA_PATH, or
3. it lies below the directory of the checkpoint's run, or is in the config.yaml there, which train.py wrote. The run of
   RUN/pretrained.ckpt and RUN/STAGE/checkpoints/NAME.ckpt is RUN; that of other checkpoints is their directory.

A checkpoint's lists of splits are read only if they exist, and never written. A run's own lists are read from
RUN/splits, also if the run was moved.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from self_supervised.data.file_search import data_path
from self_supervised.data.folders import listed_in
from self_supervised.fields import as_path
from self_supervised.safe_files import file_hash
from self_supervised.setting_groups import EARLIER_DEFAULTS, PATH_FIELDS


class ForeignPath(str):
    """A path in a checkpoint's settings that nobody requested."""


def refuse_foreign(name: str, value: str | None) -> None:
    """Raise ValueError if the value of the field `name` is a foreign path."""
    if isinstance(value, ForeignPath):
        raise ValueError(
            f"{name}={str(value)!r}: this path comes from the checkpoint, and is neither below the checkpoint's "
            f"directory nor below DATA_PATH. Pass {name} to use this path or another one."
        )


def vetted(settings: dict[str, Any], checkpoint: str | Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of a checkpoint, with foreign paths marked as ForeignPath, and with EARLIER_DEFAULTS.

    `encoder_weights` becomes None, since the checkpoint has its own weights.

    Args:
        given: names of the settings that the caller replaces.

    Raises:
        ValueError: class_to_idx names a file, which no checkpoint of this library does.
    """
    run = run_of(checkpoint)
    marked = {**EARLIER_DEFAULTS, **settings, "encoder_weights": None}
    for name in (*PATH_FIELDS, "teacher"):
        if isinstance(value := settings.get(name), str) and not asked_for(value, name, run):
            marked[name] = ForeignPath(value)
    lists = marked.get("splits_path")
    own = kept_lists(run)
    are_own = own and lists and Path(lists).name == "splits"  # another run may have taken the place of a moved run
    if lists is not None and (are_own or isinstance(lists, ForeignPath) or not as_path(lists).is_dir()):
        marked["splits_path"] = own or ForeignPath(lists)
    classes = () if "class_to_idx" in given else settings.get("class_to_idx") or ()
    if not all(re.search(r"=-?\d+$", str(entry)) for entry in classes):
        raise ValueError(
            f"class_to_idx={classes!r} in {checkpoint} names a file, which is not read. Pass class_to_idx."
        )
    return marked


def vetted_start(started_from: str | None, checkpoint: str | Path) -> str | None:
    """Return the starting weights that a checkpoint names: the name of a published encoder, or a path.

    A foreign path becomes a ForeignPath.
    """
    if started_from is None or not os.path.isabs(started_from):  # train.py and the methods store absolute paths
        return started_from
    return started_from if asked_for(started_from, "encoder_weights", run_of(checkpoint)) else ForeignPath(started_from)


def refuse_changed(source: str, known_hash: str | None) -> None:
    """Raise OSError if a file is not the one from which the training started."""
    if known_hash is not None and Path(source).is_file() and file_hash(Path(source)) != known_hash:
        raise OSError(f"{source} has changed since then. Pass starting_weights to compare with it all the same.")


def run_of(checkpoint: str | Path) -> Path:
    """Return the directory of the run to which a checkpoint belongs."""
    folder = as_path(checkpoint).resolve().parent
    run = folder.parent.parent
    return run if folder.name == "checkpoints" and (kept_lists(run) or config_of(run)) else folder


def kept_lists(run: Path) -> str | None:
    """Return the directory of the split lists in a run's directory; None if there are none."""
    return str(run / "splits") if "train" in dict(listed_in(run / "splits")) else None


def asked_for(value: str, name: str, run: Path) -> bool:
    """Return whether a path or pattern of shards is requested.

    It is if it is the value of `name` in the run's config.yaml, or a file in that directory (encoder_weights may be the
    directory of a run), or if each of its parts satisfies `is_near`.
    """
    configured = config_of(run).get(name)
    paths = (os.path.abspath(value), os.path.dirname(os.path.abspath(value)))
    same = isinstance(configured, str) and os.path.abspath(os.path.expanduser(configured)) in paths
    return configured == value or same or all(is_near(part, run) for part in value.split("::"))


def config_of(run: Path) -> dict[str, Any]:
    """Return the content of a run's config.yaml; {} if there is none, or none that can be read."""
    try:
        content = yaml.safe_load((run / "config.yaml").read_text("utf-8")) if (run / "config.yaml").is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return content if isinstance(content, dict) else {}


def is_near(pattern: str, run: Path) -> bool:
    """Return whether everything that a pattern can match lies below the current directory, DATA_PATH or the run."""
    literal = os.path.expanduser(re.split(r"[{*?\[]", pattern)[0])
    if ".." in re.split(r"[/{},]", pattern) or pattern.startswith("{") or "://" in pattern:
        return False
    if not os.path.isabs(literal):
        return True
    if Path(literal).is_relative_to(data_path().absolute()):
        return True
    holds_home = Path.home().is_relative_to(run)  # a checkpoint in the home directory does not make it a run
    return not holds_home and Path(os.path.realpath(literal)).is_relative_to(run)
