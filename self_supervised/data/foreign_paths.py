"""Paths in the settings of a checkpoint. A checkpoint may be a stranger's: what it names is neither read nor created on
this machine, unless somebody asked for it here. A path is asked for if

1. the caller passes it;
2. it is relative and stays below the current folder, or lies below DATA_PATH;
3. it lies below the folder of the checkpoint's run, or is named by that folder's config.yaml, which train.py wrote.
   Runs hold RUN/pretrained.ckpt and RUN/STAGE/checkpoints/NAME.ckpt; of other checkpoints it is the folder around them.

Lists of the splits are read only where they exist, of a run that was moved in RUN/splits. They are never written.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from self_supervised.data.folders import listed_in
from self_supervised.data.packed import data_path

READ = ("data_path", "video_path_prefix", "splits_path")


class ForeignPath(str):
    """A path that a checkpoint names, and nobody asked for."""


def refuse_foreign(name: str, value: str | None) -> None:
    """Raise ValueError for a path that nobody asked for."""
    if isinstance(value, ForeignPath):
        raise ValueError(
            f"{name}={str(value)!r} is what the checkpoint says, and is not below its folder or DATA_PATH: pass {name} "
            "yourself, to have that or another path used"
        )


def vetted(settings: dict[str, Any], checkpoint: str | Path, given: Collection[str] = ()) -> dict[str, Any]:
    """Settings of a checkpoint whose paths are ForeignPath where nobody asked for them. Its own weights need no
    encoder_weights to start from.

    Args:
        given: names of settings that the caller passes in their place.

    Raises:
        ValueError: class_to_idx names a file, which no checkpoint of ours does.
    """
    run = run_of(checkpoint)
    found = {**settings, "encoder_weights": None}
    for name in READ:
        if isinstance(value := settings.get(name), str) and not asked_for(value, name, run):
            found[name] = ForeignPath(value)
    lists = found.get("splits_path")
    if lists is not None and (isinstance(lists, ForeignPath) or not Path(lists).expanduser().is_dir()):
        found["splits_path"] = kept_lists(run) or ForeignPath(lists)
    classes = () if "class_to_idx" in given else settings.get("class_to_idx") or ()
    if not all(re.search(r"=-?\d+$", str(entry)) for entry in classes):
        raise ValueError(f"class_to_idx={classes!r} of {checkpoint} names a file, which is not read: pass class_to_idx")
    return found


def vetted_start(started_from: str | None, checkpoint: str | Path) -> str | None:
    """Starting weights that a checkpoint names: a published encoder's name as it is, a file as a path."""
    if started_from is None or not os.path.isabs(started_from):  # train.py and the methods keep absolute paths
        return started_from
    return started_from if asked_for(started_from, "encoder_weights", run_of(checkpoint)) else ForeignPath(started_from)


def run_of(checkpoint: str | Path) -> Path:
    """The folder of the run to which a checkpoint belongs."""
    folder = Path(checkpoint).expanduser().resolve().parent
    run = folder.parent.parent
    return run if folder.name == "checkpoints" and (kept_lists(run) or config_of(run)) else folder


def kept_lists(run: Path) -> str | None:
    """The lists that a run took along."""
    return str(run / "splits") if "train" in dict(listed_in(run / "splits")) else None


def asked_for(value: str, name: str, run: Path) -> bool:
    """Whether a path, or pattern of shards, is that of the run's config.yaml, or each of its parts is near."""
    told = config_of(run).get(name)
    same = isinstance(told, str) and os.path.abspath(os.path.expanduser(told)) == os.path.abspath(value)
    return told == value or same or all(is_near(part, run) for part in value.split("::"))


def config_of(run: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        found = None
    return found if isinstance(found, dict) else {}


def is_near(pattern: str, run: Path) -> bool:
    """Whether everything that a pattern can name lies below the current folder, DATA_PATH or the folder of the run."""
    literal = os.path.expanduser(re.split(r"[{*?\[]", pattern)[0])
    if ".." in re.split(r"[/{},]", pattern) or pattern.startswith("{"):
        return False
    if not os.path.isabs(literal):
        return True
    if Path(literal).is_relative_to(data_path().absolute()):
        return True
    holds_home = Path.home().is_relative_to(run)  # a file that lies there makes no run of it
    return not holds_home and Path(os.path.realpath(literal)).is_relative_to(run)
