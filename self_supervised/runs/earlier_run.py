"""The earlier start of a run: where it is, the checkpoint from which it is resumed, and its lists of splits."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
from pytorch_lightning.utilities import rank_zero_info

from model_params import ModelParams
from self_supervised import distributed
from self_supervised.data import custom, data_sets
from self_supervised.data.folders import listed_in, settings_of_lists
from self_supervised.data.foreign_paths import config_of, kept_lists, run_of
from self_supervised.fields import as_path
from self_supervised.runs.run_options import RunOptions
from self_supervised.safe_files import remove
from self_supervised.training import checkpoints, hyperparameters, resuming

CHECKPOINTS = ("*.ckpt", "*/checkpoints/*.ckpt")  # of a run; no other run overwrites them
OF_TRAINING = ("precision", "gradient_clip_val", "limit_train_batches", "sync_batchnorm")  # no effect after a training
OF_ITS_FILES = ("save_best", "save_every_n_epochs")  # likewise, if they are passed


# ---- Where the earlier start is ----


def has_checkpoints(out: Path) -> bool:
    return any(file for pattern in CHECKPOINTS for file in out.glob(pattern))


def run_to_resume(out: Path, resume: str | None) -> Path | None:
    """Return the directory of the run that is resumed; None if there is none yet."""
    if resume == "auto":
        return out.resolve() if has_checkpoints(out) else None
    return (Path(resume).resolve() if Path(resume).is_dir() else run_of(resume)) if resume else None


def newest_of_stage(out: Path, name: str) -> Path | None:
    """Return the newest checkpoint of a stage, or pretrained.ckpt of a finished pretraining whose step_*.ckpt were
    deleted."""
    newest = checkpoints.newest(out / name / "checkpoints")
    finished = out / "pretrained.ckpt"
    return finished if newest is None and name == "pretraining" and finished.is_file() else newest


# ---- From which checkpoint a stage is resumed ----


def resume_point(
    given: str | None, out: Path, name: str, method: pl.LightningModule, trainer: pl.Trainer, options: RunOptions
) -> tuple[Path | None, int]:
    """Return (checkpoint, its optimizer steps) from which a stage resumes, or (None, 0).

    Args:
        given: a checkpoint; the directory of a run, for its newest one; "auto", for the newest of `out`; None.
        options: those of the run. The linear stage follows them even if they have changed.

    Raises:
        ValueError: the method or its Trainer cannot resume from it, or the run has no checkpoint.
    """
    path = Path(given) if given else None
    if given == "auto":
        path = newest_of_stage(out, name)
    elif path is not None and path.is_dir():
        path = newest_of_stage(path, name)
        if path is None:
            raise ValueError(f"resume={given!r}: this directory has no checkpoint. Pass the directory of a run.")
    if path is None:
        return None, 0
    content = checkpoints.read_checkpoint(path)
    method.on_load_checkpoint(content)  # translates earlier names, as Lightning does before it loads
    hyperparameters.use_earlier_defaults(method, content)
    try:
        checkpoints.refuse_going_back(out / name / "checkpoints", content["global_step"], "Resume from it")
        resuming.refuse_unresumable(content, method, trainer)
        steps, images = content.get("steps"), resuming.images_of_a_step(method.params, trainer)
        other_steps = steps is not None and steps["images"] != images  # such as on another number of processes
        too_late = resuming.changed_too_late(content, method, trainer)
        if name == "pretraining" and resuming.has_ended(content, trainer):
            too_late |= changed_options(config_of(run_of(path)), options)
            refuse_fewer_linear_epochs(out, options)
        changed = ", ".join(f"{k}={v!r}" for k, v in too_late.items())
        if name == "linear" and (other_steps or changed):
            start_over(out / name)
            return None, 0
        resuming.refuse_other_steps(steps, {"images": images})
        if changed:
            raise ValueError(
                f"{changed}: the training is complete. Choose more max_epochs, or more max_time if that ended it, to "
                "continue with other settings."
            )
    except ValueError as error:
        reason = str(error).removesuffix(".")
        if name == "linear":
            reason = reason.replace("max_epochs", "linear_epochs")
        raise ValueError(f"{reason}, or choose another --out (resume={given!r}: {path}).") from error
    return path, content["global_step"]


def is_written(path: Path, step: int) -> bool:
    """Return whether the file is a checkpoint after that many optimizer steps. It is then left alone: `evaluate` and
    `embed` know an encoder by the hash of its file, which would change even with the same weights."""
    with suppress(OSError, ValueError):  # it is absent, or damaged
        return checkpoints.read_checkpoint(path).get("global_step") == step
    return False


def absolute(weights: str | None) -> str | None:
    """Return the absolute path if the weights are a file or a run, so that config.yaml serves in other directories."""
    return os.path.abspath(weights) if weights and os.path.exists(weights) else weights


def weights_of_start(out: Path, resume: str | None) -> str | None:
    """Return the weights from which the resumed run began, as its config.yaml names them."""
    run = run_to_resume(out, resume)
    return config_of(run).get("encoder_weights") if run else None


def changed_options(before: dict[str, Any], options: RunOptions) -> dict[str, Any]:
    """Return {name: value} of the options of a training that differ from those in the config.yaml of its start."""
    now = {name: getattr(options, name) for name in OF_TRAINING}
    now |= {name: value for name in OF_ITS_FILES if (value := getattr(options, name))}
    return {name: value for name, value in now.items() if before.get(name, value) != value}


def refuse_fewer_linear_epochs(out: Path, options: RunOptions) -> None:
    """Raise ValueError, before any file is written, if the linear stage of a complete pretraining is longer already."""
    newest = newest_of_stage(out, "linear") if options.linear_epochs else None
    done = 0 if newest is None else resuming.epochs_done(checkpoints.read_checkpoint(newest))
    if done > options.linear_epochs:
        raise ValueError(
            f"linear_epochs={options.linear_epochs}: the linear classifier has already been trained for {done}. Choose "
            "more"
        )


def start_over(folder: Path) -> None:
    """Delete the files of a stage."""
    distributed.any_process(False)  # waits until all processes have read them
    distributed.on_rank_zero(lambda: shutil.rmtree(folder))


# ---- Lists of splits ----


@contextmanager
def temporary_lists(params: ModelParams) -> Iterator[ModelParams]:
    """Yield settings that write lists of splits to a temporary directory unless the run has lists already: a run that
    fails its checks must not leave any."""
    kept = custom.folder_of_lists(params)
    if not params.dataset.is_custom or (kept is not None and listed_in(kept)):
        yield params
        return
    with tempfile.TemporaryDirectory(prefix=custom.TEMPORARY) as folder:
        yield attrs.evolve(params, splits_path=folder)


def with_resumed_lists(params: ModelParams, out: Path, resume: str | None) -> ModelParams:
    """Return the settings with the lists of splits of the resumed run, which are also found if it was moved, unless
    other lists are passed, or other images with another run than OUT."""
    run = run_to_resume(out, resume)
    if not (run and params.dataset.is_custom):
        return params
    before = config_of(run)
    images_before, images = (os.path.abspath(path or "") for path in (before.get("data_path"), params.data_path))
    has_other_images = before and run != out.resolve() and images != images_before
    lists = before.get("splits_path")
    if params.splits_path not in (None, lists) or has_other_images:
        return params
    candidates = [lists, kept_lists(run)]
    if lists and Path(lists).name == "splits":  # those of the run itself, whose old place another run may have taken
        candidates.reverse()
    existing = (lists for lists in candidates if lists and as_path(lists).is_dir())
    return attrs.evolve(params, splits_path=next(existing, params.splits_path))


def refuse_new_lists(params: ModelParams, out: Path, resume: str) -> None:
    """Raise ValueError if a resumed run would draw new splits of its images, so that images on which it was trained
    would be validated on. The lists of its earlier starts are gone, or lie elsewhere.

    Args:
        params: with the lists that `with_resumed_lists` has found.
    """
    run = run_to_resume(out, resume)
    before = config_of(run) if run else {}
    same = os.path.abspath(before.get("data_path") or "") == os.path.abspath(params.data_path or "")
    if not (params.dataset.is_custom and before.get("splits_path") and same):
        return
    with temporary_lists(params) as drawn:
        if drawn is params:  # the lists are there
            return
        data_sets.get_dataset(drawn, params.dataset.pretraining_splits)
        if (settings_of_lists(Path(drawn.splits_path)) or {}).get(custom.DRAWN_KEY):
            raise ValueError(
                f"splits_path={params.splits_path or before['splits_path']!r}: there are no lists of the splits of the "
                "resumed run, and new ones would mix images of training and test. Pass --splits_path with these lists, "
                "or start a new run with another --out."
            )


def refuse_outdated_lists(params: ModelParams) -> None:
    """Raise ValueError if the lists of `splits_path`, drawn now, would be others: images were added."""
    with tempfile.TemporaryDirectory(prefix=custom.TEMPORARY) as folder:
        drawn = attrs.evolve(params, splits_path=folder)
        data_sets.get_dataset(drawn, drawn.dataset.pretraining_splits)
        now, before = ({f.name: f.read_text() for _, f in listed_in(Path(p.splits_path))} for p in (drawn, params))
    if now != before:
        raise ValueError("there are other images now")


def with_lists(params: ModelParams, out: Path, resume: str | None) -> ModelParams:
    """Return the settings with the `splits_path` of a run: as `with_resumed_lists`, else OUT/splits. Lists there that
    do not fit the settings or images are drawn again if the run that drew them ended before its first checkpoint.

    Raises:
        ValueError: the lists were drawn with other settings.
    """
    params = with_resumed_lists(params, out, resume)
    if not params.dataset.is_custom:
        return params
    is_ours = params.splits_path is None
    own = (out / "splits").resolve()
    lists = str(own) if is_ours else os.path.abspath(os.path.expanduser(params.splits_path))  # from any directory
    params = attrs.evolve(params, splits_path=lists)
    can_be_drawn_again = is_ours and settings_of_lists(own) and config_of(out) and not has_checkpoints(out)
    try:
        if custom.has_written(params) and can_be_drawn_again:
            data_sets.get_dataset(params, params.dataset.pretraining_splits)  # raises if an image is missing
            refuse_outdated_lists(params)
    except ValueError as error:
        if not can_be_drawn_again:
            raise
        if distributed.is_first_process():
            rank_zero_info(f"{own}: drawn again, because {error}")
            remove(own)
    return params
