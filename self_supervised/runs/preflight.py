"""Checks before a run, for errors in its data that would otherwise appear after hours of training."""

import warnings

import attrs
import torch
from torch.utils.data import DataLoader

from model_params import (
    ALL_VIEW_LOSSES,
    HEADS,
    LABEL_LOSSES,
    PROTOTYPE_LOSSES,
    SCHEDULED,
    EncoderAndDataParams,
    ModelParams,
    has_schedule,
)
from self_supervised import distributed, losses, multi_view_losses
from self_supervised.data import data_sets, loading
from self_supervised.data.class_labels import UNLABELED, lacking
from self_supervised.data.facts import n_classes, require_labels
from self_supervised.data.files import MOST_SKIPPED
from self_supervised.data.image_files import ImageFiles
from self_supervised.evaluation import validation
from self_supervised.fields import first_of
from self_supervised.linear_params import LinearClassifierMethodParams
from self_supervised.program import bar
from self_supervised.runs.earlier_run import temporary_lists
from self_supervised.runs.run_options import RunOptions
from self_supervised.setting_groups import FROM_PRETRAINING
from self_supervised.training.fit_checks import refuse_constant_heads
from self_supervised.training.milestones import refuse_unknown
from self_supervised.training.online_classifier import accuracies
from self_supervised.training.precision import refuse_half_precision

TOY = torch.eye(4)  # features


def linear_settings(options: RunOptions, params: ModelParams) -> dict:
    """Return the settings that a run passes to its linear stage. A data set smaller than one batch on each process is
    one batch."""
    settings = {"lr": options.linear_lr, "lr_scaling": "linear", "seed": params.seed}
    n_images = len(data_sets.get_dataset(params, params.dataset.train_splits))
    one_batch = attrs.fields(LinearClassifierMethodParams).batch_size.default * processes_of(options)
    if params.dataset.is_custom or n_images < one_batch:
        settings["drop_last_batch"] = None
    return settings


def processes_of(options: RunOptions) -> int:
    """Return the number of processes of a run, which may not have started yet; 1 if only the Trainer will know it."""
    return max(options.n_processes, distributed.world_size())


def check_run(options: RunOptions, params: ModelParams, decode: bool = False) -> None:
    """Open all data sets that the run will read, from the first batch to the last score of the linear stage.

    Args:
        decode: also decode each image file, which takes about as long as an epoch. Videos take too long.

    Raises:
        ValueError: the loss lacks a teacher or labels; a metric of save_best is not logged; the heads or the precision
            cannot train; a split is empty, smaller than one batch, or lacks the labels that the linear stage needs.
        FileNotFoundError: a split is missing.
    """
    with temporary_lists(params) as params:
        if params.loss_type == "seed" and params.teacher is None:
            raise ValueError(
                "teacher=None: loss_type='seed' distills a teacher. Pass --teacher, a file, a run or a name."
            )
        reads_labels = params.loss_type in LABEL_LOSSES
        if reads_labels and data_sets.get_dataset(params, params.dataset.pretraining_splits).labels.max() < 0:
            raise ValueError(
                f"loss_type={params.loss_type!r} needs labels, but no image has one. Choose labeled images, or simclr."
            )
        for wanted in options.save_best:
            refuse_unknown(wanted, metric_names(options, params))
        refuse_constant_heads(params)
        if params.use_lagging_model:
            refuse_half_precision(options.precision, params.m)
        check_images(params, options.accumulate_grad_batches, processes_of(options))
        check_fractions(params, options)
        if options.linear_epochs:
            settings = {name: getattr(params, name) for name in FROM_PRETRAINING} | linear_settings(options, params)
            check_labels(params)
            linear = LinearClassifierMethodParams(**settings)
            unread_loader(linear, params.dataset.train_splits, True, 1, processes_of(options))
        if decode:
            check_files(params, with_classifier=options.linear_epochs > 0)


def metric_names(options: RunOptions, params: ModelParams) -> set[str]:
    """Return the names of all metrics that a run logs. Losses and evaluations are computed on toy features."""
    p = params
    names = {*losses.cosines(TOY, TOY), *toy_loss(p)} - {"loss"}
    names |= {"step_train_loss", "m", "T", "lr", *(name for name in SCHEDULED if has_schedule(p, name))}
    parts = [
        "model",
        *(f"{head}_model" for head in HEADS),
        *(["prototypes"] if p.loss_type in PROTOTYPE_LOSSES else []),
    ]
    if p.online_classifier:
        names |= {"online_train_loss", "online_train_acc1"}
        parts.append("online_classifier")
    if options.log_gradient_norms:
        names |= {f"grad_norm_{part}" for part in parts}
    scored = options.limit_val_batches != 0 and p.is_evaluated and p.evaluate_every_n_epochs <= p.max_epochs
    return names | names_of_scores(p) if scored else names


def toy_loss(params: ModelParams) -> losses.Scalars:
    if params.loss_type in ALL_VIEW_LOSSES:
        return multi_view_losses.get_loss_of_views(params, (0,))(*TOY.expand(2, 2, -1, -1))
    return losses.get_loss(params, labels=torch.arange(len(TOY)))(TOY, TOY, TOY)


def names_of_scores(params: ModelParams) -> set[str]:
    p = params
    labels = toy_labels(p, evaluated_splits(p)[0])
    train = (TOY, toy_labels(p, p.dataset.train_splits)) if p.probe_on_training_set else None
    classifier = torch.nn.Linear(4, 2) if p.online_classifier else None
    return {*validation.epoch_scores(p.evaluations, TOY, labels, train), *accuracies(classifier, TOY, labels)}


def toy_labels(params: ModelParams, splits: tuple[str, ...]) -> torch.Tensor:
    """Return labels of TOY that lack what the labels of the images lack."""
    if params.dataset.multi_label:
        return torch.full((4,), UNLABELED)
    labels = data_sets.get_dataset(params, splits).labels
    known = labels[labels >= 0]  # as probes do
    lack = lacking([known if len(known) else labels])
    return torch.tensor({"no labels": [UNLABELED] * 4, "a single class": [0] * 4, "": [0, 0, 1, 1]}[lack])


def check_images(params: ModelParams, accumulated: int = 1, processes: int | None = None) -> None:
    """Open the images of pretraining and of its evaluations.

    Args:
        accumulated: number of batches per step.
        processes: their number, if they have not started yet.

    Raises:
        ValueError: there are fewer images than a batch on each process, or `global_batch_size` cannot be divided.
    """
    unread_loader(params, params.dataset.pretraining_splits, True, accumulated, processes)
    for splits in evaluated_splits(params):
        data_sets.get_dataset(params, splits)


def evaluated_splits(params: ModelParams) -> list[tuple[str, ...]]:
    info = params.dataset
    evaluated = [info.scored_splits, info.test_splits]
    evaluated += [info.train_splits] if params.probe_on_training_set else []
    return list(dict.fromkeys(evaluated)) if params.is_evaluated else []


def check_files(params: ModelParams, with_classifier: bool) -> None:
    """Decode all image files of a run, and warn of those that cannot be read; ValueError if they stop the run."""
    info = params.dataset
    readers = attrs.evolve(params, unreadable_images="skip", pack_images=False)
    of_classifier = [info.train_splits, info.test_splits] if with_classifier else []
    every: dict[str, None] = {}  # path of each image; splits may share images
    unreadable: dict[str, tuple[ImageFiles, int]] = {}
    for splits in dict.fromkeys([info.pretraining_splits, *evaluated_splits(params), *of_classifier]):
        dataset = data_sets.get_dataset(readers, splits)
        if not isinstance(dataset, ImageFiles):
            continue
        with bar() as progress:
            for _ in progress.track(loading.get_loader(readers, dataset, training=False), description="decoding"):
                pass
        every |= dict.fromkeys(path for path, _ in dataset.files)
        indices = dataset.unreadable.nonzero().flatten().tolist()
        unreadable |= {dataset.files[i][0]: (dataset, i) for i in indices}
    named = list(unreadable)
    for position, (path, (dataset, i)) in enumerate(list(unreadable.items())[:MOST_SKIPPED]):
        named[position] = f"{path} ({dataset.why_unreadable(i)})"
    problem = f"{len(unreadable):,} of {len(every):,} images cannot be read: {first_of(named, MOST_SKIPPED)}"
    if unreadable and params.unreadable_images == "stop":
        raise ValueError(f"unreadable_images='stop': {problem}. Fix or remove them, or set unreadable_images='skip'.")
    if unreadable:
        warnings.warn(f"{problem}. They will be skipped.", stacklevel=2)


def check_fractions(params: ModelParams, options: RunOptions) -> None:
    """Raise ValueError if a fraction of the batches is less than one batch, which Lightning refuses later."""
    parts = [("limit_train_batches", params.dataset.pretraining_splits, True)]
    parts += [("limit_val_batches", splits, False) for splits in evaluated_splits(params)[:1]]
    for name, splits, training in parts:
        limit = getattr(options, name)
        if isinstance(limit, float):
            n = len(unread_loader(params, splits, training, options.accumulate_grad_batches, processes_of(options)))
            if 0 < limit * n < 1:
                raise ValueError(
                    f"{name}={limit}: less than one of {n} batches. Choose a larger fraction, or a number of batches."
                )


def unread_loader(
    params: EncoderAndDataParams, splits: tuple[str, ...], training: bool, accumulated: int, processes: int | None
) -> DataLoader:
    """Return the loader of the splits, without workers and packs: no image is decoded yet."""
    params = attrs.evolve(params, num_data_workers=0, pack_images=False)
    dataset = data_sets.get_dataset(params, splits)
    return loading.get_loader(params, dataset, training, accumulated, processes=processes)


def check_labels(params: EncoderAndDataParams) -> None:
    """Raise ValueError unless each image of the training and test sets has one label, of at least two classes."""
    require_labels(n_classes(params), params)
    sets = (params.dataset.train_splits, params.dataset.test_splits)
    train, test = (data_sets.get_dataset(params, splits).labels for splits in sets)
    for labels in (train, test):
        require_labels(1 + int(labels.min()), params)
    if lacking([train]):
        raise ValueError(
            f"dataset_name={params.dataset_name!r}: its training images have a single class, and a classifier needs "
            "two. Choose linear_epochs=0, or images of more classes."
        )
