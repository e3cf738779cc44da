"""Optimizations that must not change results: images on the device, compiled encoders, no waiting for the device."""

import copy

import numpy as np
import pytest
import torch
from attrs import evolve
from conftest import TinyEncoder
from torch.utils._python_dispatch import TorchDispatchMode

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, loading
from self_supervised.data.packed import ImagesOnDevice
from self_supervised.numerics import generator
from self_supervised.views import augmentations, tensor_ops
from self_supervised.views.augmentations import draw_crops, draw_operations


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in model.state_dict().values()])


# ---- images on the device ----


@pytest.mark.parametrize("drop_last", [True, False])
def test_images_on_the_device_come_in_the_same_batches(small, drop_last):
    params = small(batch_size=100, drop_last_batch=drop_last)
    dataset = data_sets.get_dataset(params, params.dataset.train_splits)
    mapped = loading.get_loader(params, dataset, training=True)
    resident = loading.get_loader(evolve(params, data_on_device=True), dataset, training=True)
    assert isinstance(resident.dataset, ImagesOnDevice) and len(resident) == len(mapped)
    for epoch in range(2):
        for loader in (mapped, resident):
            loader.sampler.set_epoch(epoch)
        for (x, y), (images, labels) in zip(mapped, resident, strict=True):
            assert torch.equal(x, images) and torch.equal(y, labels) and images.dtype == torch.uint8
    resident.load_state_dict({"epoch": 1, "batches": 5})  # resumes within an epoch
    _, *rest = [labels for _, labels in mapped][4:]
    assert all(torch.equal(a, b) for a, (_, b) in zip(rest, resident, strict=True))


@pytest.mark.filterwarnings("ignore:collapse")
def test_training_is_the_same_with_images_on_the_device(small, trainer):
    models = [SelfSupervisedMethod(small(data_on_device=on_device, evaluations=[])) for on_device in (None, True)]
    for model in models:
        trainer().fit(model)
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_image_files_cannot_be_kept_on_the_device(small, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    folder = tmp_path / "imagenet" / "train" / "one"
    folder.mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "a.png")
    params = small(dataset_name="imagenet", data_on_device=True)
    with pytest.raises(ValueError, match="data_on_device=True: only built-in data sets"):
        loading.get_loader(params, data_sets.get_dataset(params, ("train",)), training=False)


# ---- compiled ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from PyTorch's compiler
@pytest.mark.filterwarnings("ignore:collapse")
def test_compiled_training_equals_eager_and_leaves_no_trace_in_checkpoints(small, trainer, tmp_path):
    tiny = TinyEncoder()
    settings = [small(torch_compile=on, evaluations=[]) for on in (False, True)]
    eager, compiled = (SelfSupervisedMethod(p, encoder=copy.deepcopy(tiny)) for p in settings)
    for model in (eager, compiled):
        fit = trainer(max_steps=3)
        fit.fit(model)
        fit.save_checkpoint(tmp_path / "checkpoint.ckpt", weights_only=False)
    assert compiled.model._compiled_call_impl is not None and eager.model._compiled_call_impl is None
    assert list(eager.state_dict()) == list(compiled.state_dict())
    assert (weights(eager) - weights(compiled)).abs().max() < 1e-4
    again = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "checkpoint.ckpt", encoder=TinyEncoder())
    assert torch.equal(weights(again), weights(compiled))
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "checkpoint.ckpt", encoder=TinyEncoder())
    assert torch.equal(weights(linear.model), weights(compiled.model))


def drawn(n: int, size: int, view: ViewSettings) -> tuple[torch.Tensor, torch.Tensor]:
    rng = generator(size)
    draws = {**draw_crops(rng, n, size, size, view), **draw_operations(rng, n, view)}
    images = torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), np.uint8, endpoint=False))
    return images, torch.from_numpy(tensor_ops.to_matrix(draws))


@pytest.mark.slow
def test_a_whole_view_is_one_graph():
    """`torch_compile` needs it on a GPU; here it is tested with a compiler that changes nothing."""
    view = ViewSettings(crop_size=24, solarize_probability=0.2)
    compiled = torch.compile(augmentations.make_normalized_view, fullgraph=True, backend="eager", dynamic=False)
    for n in (8, 5):
        arguments = (*drawn(n, 32, view), view, False, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
        assert torch.equal(compiled(*arguments), augmentations.make_normalized_view(*arguments))


# ---- nothing waits ----


class Waits(TorchDispatchMode):
    """Mode that records every operation whose result the host must wait for."""

    NAMES = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "bincount")

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = args[1] if name in ("index", "index_put", "index_put_") else []
        if name in self.NAMES or any(mask is not None and mask.dtype == torch.bool for mask in masks):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_the_waits_are_seen():
    with Waits() as waits:
        torch.ones(3).sum().item()
        torch.ones(3)[torch.tensor([True, False, True])]
    assert waits.found == ["_local_scalar_dense", "index"]


def test_views_on_tensors_wait_for_nothing():
    view = ViewSettings(crop_size=24, solarize_probability=0.2)
    images, matrix = drawn(8, 32, view)
    with Waits() as waits:
        augmentations.make_normalized_view(images, matrix, view, False, (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert waits.found == []


@pytest.mark.filterwarnings("ignore:collapse")
@pytest.mark.parametrize("name", ["moco_v2", "simclr", "byol", "vicreg", "barlow_twins", "sce", "eqco"])
def test_a_training_step_waits_for_nothing(small, trainer, name):
    """From the views to the updated weights, one value is read per step: the loss, by TrainingMonitor.

    Lightning reads values at its logging steps only.
    """
    model = SelfSupervisedMethod(small(name, evaluations=[], shuffle_batch_norm=name == "moco_v2"))
    waits = Waits()
    optimizer_step = model.optimizer_step  # Lightning calls the forward and the backward pass from within

    def watched(*args, **kwargs):
        with waits:
            optimizer_step(*args, **kwargs)

    model.optimizer_step = watched
    fit = trainer(limit_train_batches=3, log_every_n_steps=100)
    fit.fit(model)
    assert fit.global_step == 3 and waits.found == ["_local_scalar_dense"] * 3
