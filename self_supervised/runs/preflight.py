"""Checks before a run, for errors in its data that would otherwise appear after hours of training."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import attrs

from linear_classifier import FROM_PRETRAINING, LinearClassifierMethodParams
from model_params import EncoderAndDataParams, ModelParams
from self_supervised.data import custom, loading
from self_supervised.data.folders import listed_in
from self_supervised.data.loading import n_classes, require_labels
from self_supervised.runs.command_line import RunOptions


def linear_settings(options: RunOptions, params: ModelParams) -> dict:
    """Return the settings that a run passes to its linear stage. A data set smaller than one batch is one batch."""
    settings = {"lr": options.linear_lr, "lr_scaling": "linear", "seed": params.seed}
    n_images = len(loading.get_dataset(params, params.dataset.train_splits))
    if params.dataset.is_custom or n_images < attrs.fields(LinearClassifierMethodParams).batch_size.default:
        settings["drop_last_batch"] = None
    return settings


def check_run(options: RunOptions, params: ModelParams) -> None:
    """Open all images that the run will read, from the first batch to the last score of the linear stage.

    Raises:
        ValueError: a split is empty, smaller than one batch, or lacks the labels that the linear stage needs.
        FileNotFoundError: a split is missing.
    """
    with temporary_lists(params) as params:
        check_images(params, options.accumulate_grad_batches)
        if options.linear_epochs:
            settings = {name: getattr(params, name) for name in FROM_PRETRAINING} | linear_settings(options, params)
            check_labels(params)
            check_batches(LinearClassifierMethodParams(**settings), params.dataset.train_splits)


@contextmanager
def temporary_lists(params: ModelParams) -> Iterator[ModelParams]:
    """Yield settings that write lists of splits to a temporary directory unless the run has lists already: a run that
    fails its checks must not leave any."""
    kept = custom.folder_of_lists(params)
    if not params.dataset.is_custom or (kept is not None and listed_in(kept)):
        yield params
        return
    with tempfile.TemporaryDirectory() as folder:
        yield attrs.evolve(params, splits_path=folder)


def check_images(params: ModelParams, accumulated: int = 1) -> None:
    """Open the images of pretraining and of its evaluations. `accumulated` is the number of batches per step."""
    info = params.dataset
    check_batches(params, info.pretraining_splits, accumulated)
    if not params.is_evaluated:
        return
    evaluated = [info.validation_splits or info.test_splits, info.test_splits]
    if params.probe_on_training_set:
        evaluated.append(info.train_splits)
    for splits in dict.fromkeys(evaluated):
        loading.get_dataset(params, splits)


def check_batches(params: EncoderAndDataParams, splits: tuple[str, ...], accumulated: int = 1) -> None:
    """Raise ValueError unless one process has enough images to train on. Multiple processes need at least as many."""
    params = attrs.evolve(params, num_data_workers=0)  # no image is decoded yet
    loading.get_loader(params, loading.get_dataset(params, splits), training=True, accumulated=accumulated)


def check_labels(params: EncoderAndDataParams) -> None:
    """Raise ValueError unless each image of the training and test sets has one label."""
    require_labels(n_classes(params), params)
    for splits in (params.dataset.train_splits, params.dataset.test_splits):
        require_labels(1 + int(loading.get_dataset(params, splits).labels.min()), params)
