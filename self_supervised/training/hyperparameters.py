"""Hyperparameters: those that are passed, a record that cannot be changed, and those in a checkpoint."""

import secrets
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import attrs
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.data import AttributeDict
from torch import nn

from model_params import TWO_DISTRIBUTIONS
from self_supervised.catalogue import DATASETS, OWN_MODULE
from self_supervised.data.facts import Params, with_statistics
from self_supervised.data.foreign_paths import vetted
from self_supervised.fields import Presets, plain
from self_supervised.networks import modules
from self_supervised.setting_groups import EARLIER_DEFAULTS
from self_supervised.training import fit_checks

PLAIN_TYPES = (bool, int, float, str, type(None))
OF_LOADING = ("map_location", "hparams_file", "strict", "weights_only")  # Lightning's, of load_from_checkpoint
SEED_AT_IMPORT = torch.initial_seed()
ParamsLike = Params | Callable[..., Params] | dict[str, Any] | str | None  # what `Presets.settings_of` takes


def resolve(
    presets: Presets[Params], params: ParamsLike[Params], encoder: nn.Module | None, fields: dict[str, Any]
) -> tuple[Params, bool]:
    """Return the complete settings, and whether their seed was drawn.

    With an `encoder`, encoder_arch becomes OWN_MODULE. seed=None becomes the seed of `pl.seed_everything`, or a drawn
    one. Unless both are set, image_mean and image_std are computed if `compute_statistics` says so.

    Args:
        presets: those of the method, with its class of settings.
        params: settings, a dict of them, a preset or its name, or None for the defaults.
        encoder: a module of the user.
        fields: settings that replace those of `params`. `hparams`, the original's name, is an alias of `params`.

    Raises:
        ValueError: both params and hparams are passed.
        KeyError, TypeError: as of `Presets.settings_of`.
    """
    if (hparams := fields.pop("hparams", None)) is not None:
        if params is not None:
            raise ValueError("hparams and params are two names for the same argument. Pass one of them.")
        params = dict(vars(hparams)) if isinstance(hparams, Namespace) else hparams
    modules.require_module(encoder)
    if encoder is not None:
        fields = {**fields, "encoder_arch": OWN_MODULE}
    params = attrs.evolve(presets.settings_of(params), **fields)
    seed_is_drawn = params.seed is None
    if seed_is_drawn:
        params = attrs.evolve(params, seed=session_seed())
    return (with_statistics(params) if params.compute_statistics else params), seed_is_drawn


def session_seed() -> int:
    """Return the seed that the user gave to PyTorch, or if there is none, another one at each call."""
    seed = torch.initial_seed()
    is_drawn = seed == SEED_AT_IMPORT and seed >= 2**32  # PyTorch draws one of 64 bits for each process
    return secrets.randbits(32) if is_drawn else seed % 2**32


class HyperparameterRecord(AttributeDict):
    """Record of a method's settings (`hparams`). It raises ValueError on changes, which would have no effect."""

    def refuse(self, *names: Any, **fields: Any) -> NoReturn:
        named = ", ".join(map(str, [*names, *fields]))
        raise ValueError(
            f"hparams cannot be changed ({named}): they record the settings with which the method was built. Pass "
            "others when you build it: SelfSupervisedMethod(params, lr=0.3), load_from_checkpoint(path, lr=0.3)."
        )

    update = setdefault = pop = popitem = clear = __ior__ = __delitem__ = refuse

    def __setitem__(self, name: str, value: Any) -> None:
        """Accept only the recorded value: Lightning's Tuner sets `method.lr`, and then the record to the same value."""
        if name not in self or self[name] != value:
            self.refuse(name, value)

    __setattr__ = __setitem__

    def __reduce__(self) -> tuple:
        """Copy and pickle all entries at once; the default sets them one by one, which is refused."""
        return type(self), (dict(self),)


def as_data(value: Any) -> Any:
    """Return hyperparameters of a user with text in place of objects, which could not be read as data only."""
    if isinstance(value, Mapping):
        return {as_data(name): as_data(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_data(item) for item in value]
    value = plain(value)  # NumPy's numbers
    return value if type(value) in PLAIN_TYPES else str(value)


def without_objects(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that can be read as data only: no modules, functions and other objects."""

    def is_data(value: Any) -> bool:
        if isinstance(value, dict):
            return all(map(is_data, [*value, *value.values()]))
        return all(map(is_data, value)) if isinstance(value, list) else type(value) in PLAIN_TYPES

    return {name: value for name, value in plain(dict(entries)).items() if is_data(value)}


def other_rates(params: Any, lr: float) -> dict[str, float]:
    """Return the rates that change in proportion to lr: that of a classifier's encoder, and the rates of the schedule's
    ends if they are above another lr."""
    ends = {name: getattr(params, name, 0) for name in ("final_lr_schedule_value", "warmup_start_lr")}
    rates = {name: end for name, end in ends.items() if end > lr}
    if getattr(params, "encoder_lr", None) is not None:
        rates["encoder_lr"] = params.encoder_lr
    return {name: rate * lr / params.lr for name, rate in rates.items()}


def refuse_batch_size(params: Any, value: int) -> None:
    """Raise ValueError if `batch_size` is set, but another setting determines the size of a batch."""
    if params.global_batch_size is not None:
        raise ValueError(
            f"global_batch_size={params.global_batch_size} determines the size of a batch, so batch_size={value} has "
            "no effect. Set global_batch_size=None."
        )


def refuse_replaced(params: Any, built: Any) -> None:
    """Raise ValueError if settings were replaced after the method was built with others, whose networks stay."""
    names = [] if built is None else [field.name for field in attrs.fields(type(built))]
    changed = [name for name in names if getattr(params, name) != getattr(built, name)]
    if changed:
        values = ", ".join(f"{name}={getattr(params, name)!r}" for name in changed)
        raise ValueError(
            f"{values}: not the setting with which the method was built; its networks and hparams still have that. "
            "Build it again: SelfSupervisedMethod(params)."
        )


def overrides_of_checkpoint(
    content: dict[str, Any], path: str | Path, method: type[pl.LightningModule], passed: dict[str, Any]
) -> dict[str, Any]:
    """Return the settings that replace those of a checkpoint, to be passed to Lightning's `load_from_checkpoint`.

    Args:
        content: the checkpoint.
        path: where it lies.
        method: class that loads it. The number of classes is that of its classifier in the file, because the images
            from which it was counted may be gone.
        passed: settings that the caller passes. They win.

    Raises:
        ValueError: the checkpoint is of the other stage, or the settings are passed as a whole.
    """
    for name in ("params", "hparams"):  # a subclass may have such an argument of its own
        if passed.get(name) is not None and fit_checks.is_ours(method.__init__):
            raise ValueError(f"{name}: a checkpoint has its own settings. Pass single fields, such as lr=0.3.")
    settings = content.get("hyper_parameters", {})
    if method.needs_labels and "loss_type" in settings:
        raise ValueError(
            f"{path} is a checkpoint of a pretraining. Call LinearClassifierMethod.from_moco_checkpoint, which takes "
            "its encoder."
        )
    if not method.needs_labels and "classifier.weight" in content["state_dict"]:
        raise ValueError(
            f"{path} is a checkpoint of a linear classifier. Call LinearClassifierMethod.load_from_checkpoint, or "
            "start a pretraining from its encoder: encoder_weights=PATH."
        )
    replaced = dict(vetted(settings, path, passed))
    compares_others = settings.get("loss_type") in TWO_DISTRIBUTIONS or settings.get("use_nearest_keys")
    if compares_others:  # earlier versions took it, and compared other vectors
        replaced["use_negative_examples_from_same_view"] = False
    weight = content["state_dict"].get(f"{method.CLASSIFIER}.weight")
    if weight is not None and len(weight) != packed_classes(settings):
        replaced["n_classes"] = len(weight)
    return {**replaced, **passed}


@contextmanager
def explain_size_mismatch(path: str | Path, method: type[pl.LightningModule], passed: dict[str, Any]) -> Iterator[None]:
    """Say in one line that a checkpoint's tensors do not fit the settings that were `passed`."""
    try:
        yield
    except RuntimeError as error:
        misfit = next((line.strip() for line in str(error).splitlines() if "size mismatch for" in line), None)
        own = {name: value for name, value in passed.items() if name not in OF_LOADING}
        if misfit is None or not own:
            raise
        names = [name if isinstance(value, nn.Module) else f"{name}={value!r}" for name, value in own.items()]
        of_linear = "call from_moco_checkpoint, which makes a new classifier on its encoder"
        of_pretraining = "start a pretraining from its encoder: encoder_weights=PATH"
        raise ValueError(
            f"{', '.join(names)}: {path} does not fit ({misfit}) Pass the settings of its training, or "
            f"{of_linear if method.needs_labels else of_pretraining}."
        ) from error


def use_earlier_defaults(method: Any, content: dict[str, Any]) -> None:
    """Set the fields that a checkpoint lacks, and that were added later, to what was in effect when it was written."""
    lacking = {
        name: value for name, value in EARLIER_DEFAULTS.items() if name not in content.get("hyper_parameters", {})
    }
    if any(getattr(method.params, name) != value for name, value in lacking.items()):
        method.change(**lacking)


def packed_classes(settings: dict[str, Any]) -> int | None:
    """Return the number of classes of a checkpoint's data set if it is packed, and therefore always the same."""
    info = DATASETS.get(settings.get("dataset_name"))
    return None if info is None or not info.is_packed else info.n_classes
