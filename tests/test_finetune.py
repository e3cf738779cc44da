"""Fine-tuning, layer-wise learning rates, labeled subsets, held-out validation, and the presets."""

import copy
import math
import re
import shutil
from collections import Counter

import attrs
import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from torch import nn
from torchvision.models import VisionTransformer, resnet18

from lars import LARS
from linear_classifier import LINEAR_PRESETS, LinearClassifierMethod, LinearClassifierMethodParams
from self_supervised.data import data_sets, loading, subsets
from self_supervised.data import packed as packed_data
from self_supervised.data.batches import ResumableDataLoader
from self_supervised.data.packed import ImagesOnDevice
from self_supervised.training import monitor, parameter_groups

LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 5], [200, 100, 30, 4]))


def small_encoder(scale: float = 1.0) -> nn.Module:
    class Scaled(nn.Sequential):
        def forward(self, x):
            return scale * super().forward(x)

    torch.manual_seed(5)
    convolution = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return Scaled(convolution, nn.Sequential(nn.Conv2d(8, 12, 2), nn.ReLU()), nn.Flatten(), nn.Linear(48, 24))


def lars(params) -> LARS:
    vectors, others = ([p for p in params if (p.ndim < 2) == wanted] for wanted in (True, False))
    groups = [{"params": others}, {"params": vectors, "weight_decay": 0.0, "adapt": False}]
    return LARS(groups, 0.1, 0.9, 0.01, eta=0.1)


LARS_FIELDS = {"optimizer_name": "lars", "lars_eta": 0.1, "exclude_matching_parameters_from_lars": [".bias", ".bn"]}


def method(preset=LinearClassifierMethodParams, encoder: nn.Module | None = None, **fields) -> LinearClassifierMethod:
    fields = {"dataset_name": "digits", "batch_size": 64, "lr": 0.1, "seed": 0, **fields}
    return LinearClassifierMethod(preset(**fields), encoder=encoder or small_encoder())


# ---- Labels ----


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1, 0.35, 1.0])
def test_a_fraction_is_one_of_every_class(fraction):
    chosen = subsets.stratified(LABELS, fraction=fraction, seed=3)
    expected = {label: max(1, round(n * fraction)) for label, n in Counter(LABELS.tolist()).items()}
    assert Counter(LABELS[chosen].tolist()) == expected and np.all(np.diff(chosen) > 0)


def test_subsets_of_one_seed_are_nested_and_another_seed_draws_others():
    ones, threes = (subsets.stratified(LABELS, per_class=n, seed=7) for n in (1, 3))
    tenth = subsets.stratified(LABELS, fraction=0.1, seed=7)
    assert Counter(LABELS[threes].tolist()) == {0: 3, 1: 3, 2: 3, 5: 3}
    assert set(ones) < set(threes) and set(threes[LABELS[threes] < 5]) < set(tenth)
    assert set(threes) != set(subsets.stratified(LABELS, per_class=3, seed=8))
    draws = Counter(i for seed in range(2000) for i in subsets.stratified([0] * 5, per_class=2, seed=seed).tolist())
    assert all(abs(n - 800) < 5 * math.sqrt(2000 * 0.4 * 0.6) for n in draws.values()) and len(draws) == 5


def test_what_is_held_out_is_a_part_of_every_class_and_never_all_of_it():
    fit, score = subsets.held_out([*LABELS, 9, -1, -1], 0.1, seed=1)
    assert sorted([*fit, *score]) == list(range(len(LABELS) + 1))  # without the two that have no label
    assert Counter(LABELS[score].tolist()) == {0: 20, 1: 10, 2: 3, 5: 1} and len(LABELS) in fit
    assert set(score) != set(subsets.held_out(LABELS, 0.1, seed=2)[1])


@pytest.mark.parametrize(
    "draw, message",
    [
        (lambda: subsets.stratified(LABELS, per_class=5), "labels_per_class=5 must be from 1 to 4"),
        (lambda: subsets.stratified(LABELS, per_class=5, fraction=0.1), "fraction=0.1 and per_class=5"),
        (lambda: subsets.stratified([-1, -1]), "no image has a label"),
        (lambda: subsets.held_out([0, 1, 2], 0.5), "nothing can be held out from 3 classes .* set validate_on='test'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_a_subset_is_the_same_images_mapped_on_the_device_and_as_files(tmp_path, monkeypatch):
    packed = data_sets.get_dataset(method().params, ("train", "test"))
    chosen = np.array([3, 900, 1296, 1297, 1500, 1796])
    expected = packed.__getitems__(chosen)
    part = packed.subset(chosen)
    for dataset in (part, ImagesOnDevice(part, torch.device("cpu"))):
        found = dataset.__getitems__([5, *range(5)])
        assert all(torch.equal(a.roll(1, 0), b) for a, b in zip(expected, found, strict=True)) and len(dataset) == 6
    assert torch.equal(part.subset([1])[0][0], packed[900][0]) and len(packed) == 1797

    from PIL import Image

    for i in range(6):
        folder = tmp_path / "imagenet" / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (i, 0, 0)).save(folder / f"{i}.png")
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    params = LinearClassifierMethodParams(dataset_name="imagenet", transform_crop_size=16)
    files = data_sets.get_dataset(params, ("train",))
    part = files.subset(np.array([1, 4]))
    assert files.labels.tolist() == [0, 0, 0, 1, 1, 1] and part.labels.tolist() == [0, 1]
    assert [int(image.max()) for image, _ in (part[0], part[1])] == [2, 3] and len(part.skipped()) == 0


def seen(loader: ResumableDataLoader) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in loader for image in images}


@pytest.mark.parametrize("fields, n_train, n_valid", [
    ({}, 1297, 500),
    ({"label_fraction": 0.01}, 10, 500),
    ({"validate_on": "held_out"}, 1167, 130),
    ({"validate_on": "held_out", "held_out_fraction": 0.5, "labels_per_class": 4}, 40, 648),
])  # fmt: skip
def test_the_loaders_hold_what_the_settings_say(fields, n_train, n_valid, trainer, data_path, tmp_path, monkeypatch):
    """With a held-out part, the test set need not exist."""
    if "validate_on" in fields:
        shutil.copytree(data_path / "digits" / "train", tmp_path / "digits" / "train")
        monkeypatch.setenv("DATA_PATH", str(tmp_path))
        monkeypatch.setitem(packed_data.READERS, "digits", None)
    linear, fit = method(drop_last_batch=False, encoder_lr=0.1, **fields), trainer(max_steps=1)
    fit.fit(linear)
    train, valid = fit.train_dataloader, fit.val_dataloaders
    assert abs(len(train.dataset) - n_train) <= 2 and abs(len(valid.dataset) - n_valid) <= 2
    assert not seen(train) & seen(valid)
    again = method(**fields, seed=4)
    assert all(map(np.array_equal, again.split(np.arange(990) % 10), linear.split(np.arange(990) % 10)))


@pytest.mark.parametrize(
    "n, batches", [(10, [10]), (63, [63]), (64, [64]), (66, [64]), (96, [64, 32]), (130, [64] * 2)]
)
def test_a_last_batch_of_a_few_images_is_dropped_but_not_the_only_one(n, batches):
    params = LinearClassifierMethodParams(dataset_name="digits", batch_size=64, seed=0, drop_last_batch=None)
    dataset = data_sets.get_dataset(params, ("train",)).subset(np.arange(n))
    assert [len(labels) for _, labels in loading.get_loader(params, dataset, training=True)] == batches


# ---- Parameter groups and learning rates ----


def beit_layer(name: str, n_blocks: int) -> int:
    """Return BEiT's number of a layer: 0 for patches, class token and positions, then 1 to n_blocks.

    The last norm belongs to the last block.
    """
    if name.startswith(("conv_proj", "class_token", "encoder.pos_embedding")):
        return 0
    found = re.match(r"encoder\.layers\.encoder_layer_(\d+)\.", name)
    return int(found[1]) + 1 if found else n_blocks


def vision_transformer(n_blocks: int = 5) -> nn.Module:
    vit = VisionTransformer(
        image_size=8, patch_size=4, num_layers=n_blocks, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3
    )
    vit.heads = nn.Identity()
    return vit


def test_a_step_of_every_parameter_has_the_rate_of_its_layer(trainer):
    """A step in float64 is w - lr g, with BEiT's learning rates per layer and a batch of twice lr_batch_size."""
    fields = {"in_channels": 3, "lr_scaling": "linear", "lr_batch_size": 32, "momentum": 0.0, "weight_decay": 0.01}
    fields |= {"lr": 0.3, "encoder_lr": 0.2, "layer_decay": 0.6, "exclude_matching_parameters_from_lars": [".bias"]}
    linear = method(encoder=vision_transformer(), **fields)
    linear.augment = lambda images, seed, positions: [images.double() / 255]
    before, gradients = {name: p.detach().double() for name, p in linear.named_parameters()}, {}
    linear.on_before_optimizer_step = lambda _: gradients.update(
        {n: p.grad.clone() for n, p in linear.named_parameters()}
    )
    images, labels = torch.randint(256, (64, 3, 8, 8), dtype=torch.uint8), torch.arange(64) % 10
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), 64)
    trainer(max_steps=1, limit_val_batches=0, precision="64-true").fit(linear, loader)
    for name, parameter in linear.named_parameters():
        rate = 0.6
        if name.startswith("model."):
            rate = 0.4 * 0.6 ** (5 - beit_layer(name.removeprefix("model."), 5))
        decay = 0.0 if name.endswith("bias") else 0.01
        expected = before[name] - rate * (gradients[name] + decay * before[name])
        torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-15)
        assert name == "model.class_token" or gradients[name].abs().sum() > 0


def test_the_stages_of_a_resnet_are_its_stem_and_its_layers():
    encoder = resnet18()
    encoder.fc = nn.Identity()
    stages = parameter_groups.layer_groups(encoder)
    assert list(stages) == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert list(stages["conv1"]) == ["conv1.weight", "bn1.weight", "bn1.bias"]
    assert all(name.startswith(f"{stage}.") for stage in list(stages)[1:] for name in stages[stage])
    assert sum(map(len, stages.values())) == len(list(encoder.parameters()))


def test_every_parameter_is_in_one_stage():
    tied = nn.Linear(6, 6)
    for encoder in (vision_transformer(1), nn.Linear(3, 3), nn.Sequential(tied, nn.ReLU(), tied), nn.Flatten()):
        names = [name for stage in parameter_groups.layer_groups(encoder).values() for name in stage]
        assert sorted(names) == sorted(name for name, _ in encoder.named_parameters())


def test_the_groups_are_told(trainer, monkeypatch):
    said = []
    monkeypatch.setattr(monitor, "rank_zero_info", said.append)
    linear = method(encoder_lr=0.2, layer_decay=0.5, weight_decay=0.1, exclude_matching_parameters_from_lars=[".bn"])
    trainer(max_steps=1).fit(linear)
    lines = "\n".join(said).splitlines()
    rows = [line.split() for line in lines if line.startswith(("classifier ", "model."))]
    assert rows == [
        ["classifier", "2", "0.1", "0.1"],
        ["model.3", "2", "0.2", "0.1"],
        ["model.1.0", "2", "0.1", "0.1"],
        ["model.0.0", "1", "0.05", "0.1"],
        ["model.0.0/no_decay", "2", "0.05", "0"],
    ]


@pytest.mark.parametrize("encoder_lr", [None, 0.05])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_and_statistics_of_the_encoder_move_only_when_asked(encoder_lr, normalize, trainer):
    linear = method(encoder_lr=encoder_lr, normalize_features=normalize)
    before, trained = copy.deepcopy(linear.state_dict()), set()
    linear.on_before_optimizer_step = lambda _: trained.update(
        n for n, p in linear.named_parameters() if p.grad is not None
    )
    trainer(max_steps=2).fit(linear)
    moved = {name for name, value in linear.state_dict().items() if not torch.equal(value, before[name])}
    of_encoder = {name for name in before if name.startswith("model.")}
    assert moved & of_encoder == (of_encoder if encoder_lr else set())
    assert moved - of_encoder == {name for name in before if not name.startswith("model.")}
    assert trained == {name for name, _ in linear.named_parameters() if encoder_lr or name.startswith("classifier.")}
    assert linear.model.training == bool(encoder_lr)


def test_normalized_features_are_z_scores_and_their_scale_does_not_matter(trainer):
    ends = []
    for scale in (1.0, 4096.0):
        linear = method(encoder=small_encoder(scale), normalize_features=True, lr=1.0)
        fit = trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
        fit.fit(linear)
        ends.append({name: float(value) for name, value in fit.callback_metrics.items()})
    assert ends[0] == pytest.approx(ends[1], abs=1.0) and ends[0]["valid_acc1"] > 50
    x = torch.randn(32, 1, 8, 8)
    h = linear.train().model(x).double()
    z = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(linear(x), linear.classifier(z.float()), rtol=1e-4, atol=1e-4)


# ---- Optimizers and schedules ----


@pytest.mark.parametrize("schedule", ["steps", "cosine"])
def test_the_rates_over_the_training(schedule, trainer):
    """Two of ten epochs (two steps each) are warm-up; all groups share a curve. Recorded after each step."""
    linear, rates = method(encoder_lr=0.02, lr_schedule=schedule, warmup_epochs=2, batch_size=64), []
    linear.on_train_batch_end = lambda *_: rates.append([g["lr"] for g in linear.optimizers().param_groups])
    trainer(max_epochs=10, limit_val_batches=0).fit(linear)
    if schedule == "steps":
        shares = [0.5, 0.75] + [1] * 9 + [0.1] * 4 + [0.01] * 5
    else:
        shares = [0.5, 0.75, 1] + [(1 + math.cos(math.pi * i / 16)) / 2 for i in range(17)]
    assert [classifier for classifier, *_ in rates] == pytest.approx([0.1 * share for share in shares])
    assert [stem for *_, stem in rates] == pytest.approx([0.02 * share for share in shares])


@pytest.mark.parametrize("fields, reference", [
    ({"nesterov": True}, lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True)),
    ({"optimizer_name": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1)),
    ({"optimizer_name": "adamw", "adam_betas": [0, 0.9]}, lambda p: torch.optim.AdamW(p, 0.1, (0.0, 0.9), 1e-8, 0)),
    ({**LARS_FIELDS, "weight_decay": 0.01}, lambda p: lars([*p])),
])  # fmt: skip
def test_fine_tuning_is_plain_pytorch(fields, reference, trainer):
    """The steps are those of a loop of five lines on the same float images, with the encoder in train mode."""
    images, labels = torch.randn(4, 32, 1, 8, 8), torch.randint(10, (4, 32))
    linear = method(encoder_lr=0.1, drop_last_batch=False, **fields)
    plain = nn.Sequential(copy.deepcopy(linear.model), copy.deepcopy(linear.classifier)).train()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=None)
    trainer(max_epochs=1, limit_train_batches=4, limit_val_batches=0).fit(linear, batches)
    optimizer = reference(plain.parameters())
    for step, (x, y) in enumerate(zip(images, labels, strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** ((step >= 2.4) + (step >= 3.2))
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        optimizer.step()
    ours = [*linear.model.state_dict().values(), *linear.classifier.state_dict().values()]
    for a, b in zip(ours, plain.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fields, message", [
    ({"label_fraction": 0.1, "labels_per_class": 4}, "label_fraction=0.1 and labels_per_class=4"),
    ({"layer_decay": 0.5}, "layer_decay=0.5 needs .* encoder_lr"),
    ({"layer_decay": 0.0, "encoder_lr": 1}, "layer_decay=0"),
    ({"nesterov": True, "momentum": 0}, "nesterov=True .* momentum above 0"),
    ({"nesterov": True, "optimizer_name": "adamw"}, "nesterov=True .* optimizer_name='sgd'"),
    ({"label_fraction": 0}, "label_fraction=0 must be above 0"),
    ({"validate_on": "train"}, "validate_on='train' is unknown: choose one of test, held_out"),
    ({"encoder_lr": -1}, "encoder_lr=-1 must be above 0"),
])  # fmt: skip
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        LinearClassifierMethodParams(**fields)


def test_more_labels_than_there_are_and_a_batch_of_one_are_explained(trainer):
    with pytest.raises(ValueError, match="labels_per_class=500 must be from 1 to 12"):
        trainer().fit(method(labels_per_class=500))
    fields = {"labels_per_class": 1, "batch_size": 3, "drop_last_batch": False, "normalize_features": True}
    with pytest.raises(ValueError, match="a batch of 1 image has no batch statistics: choose a larger batch_size"):
        trainer(limit_train_batches=1.0).fit(method(**fields))


# ---- Presets ----


@pytest.mark.filterwarnings("ignore:the warm-up of")
@pytest.mark.parametrize("name", LINEAR_PRESETS)
def test_presets_train_save_and_come_back(name, trainer, tmp_path):
    params = LINEAR_PRESETS[name]()
    linear, fit = method(LINEAR_PRESETS[name], lr=params.lr), trainer(max_steps=2, max_epochs=2, limit_val_batches=2)
    fit.fit(linear)
    assert fit.callback_metrics["valid_loss"].isfinite() and 0 <= fit.callback_metrics["valid_acc1"] <= 100
    fit.save_checkpoint(tmp_path / "linear.ckpt")
    again = LinearClassifierMethod.load_from_checkpoint(tmp_path / "linear.ckpt", encoder=small_encoder()).eval()
    x = torch.randn(5, 1, 8, 8)
    assert torch.equal(again(x), linear.eval()(x))
    assert again.params == attrs.evolve(linear.params, embedding_dim=24)


def test_presets_are_the_published_numbers():
    """The numbers are those printed in the papers, at their batch sizes."""
    one, ten = (LINEAR_PRESETS[f"semi_supervised_{n}"](global_batch_size=4096) for n in (1, 10))
    assert one.lr * 4096 / one.lr_batch_size == pytest.approx(0.8) and one.encoder_lr == one.lr  # SimCLR, B.5
    assert (one.max_epochs, ten.max_epochs, one.weight_decay, one.warmup_epochs) == (60, 30, 0, 0)
    moco, sgd, tuned = (LINEAR_PRESETS[name]() for name in ("linear_moco", "linear_sgd", "fine_tune"))
    assert (moco.lr, moco.max_epochs, moco.lr_schedule, moco.weight_decay) == (30, 100, "steps", 0)
    assert (sgd.lr, sgd.max_epochs, sgd.lr_schedule, sgd.lr_scaling) == (0.1, 90, "cosine", "linear")
    assert (tuned.lr, tuned.layer_decay, tuned.warmup_epochs, tuned.max_epochs) == (1e-3, 0.75, 5, 100)
    assert tuned.weight_decay == 0.05
    assert tuned.encoder_lr == pytest.approx(tuned.lr * tuned.layer_decay)  # the head is one layer above the encoder


# ---- Compiled, and on multiple processes ----


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # from PyTorch's compiler
def test_compiled_fine_tuning_equals_eager(trainer, monkeypatch):
    """Graphs and gradients are captured but not compiled to code, which would take a minute."""
    ends, compile = [], nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: compile(module, backend="aot_eager"))
    for compiled in (False, True):
        linear = method(encoder_lr=0.05, normalize_features=True, torch_compile=compiled)
        trainer(max_steps=3).fit(linear)
        assert (linear.model._compiled_call_impl is not None) == compiled
        ends.append(linear.state_dict())
    assert ends[0].keys() == ends[1].keys()
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def tuned(rank: int, world: int) -> dict:
    """Return the weights after three steps on 32 images, without views and batch norm, which depend on processes."""
    torch.manual_seed(2)
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 16)
    )
    linear = method(encoder=encoder, encoder_lr=0.05, layer_decay=0.5, label_fraction=0.1, batch_size=32 // world)
    linear.augment = lambda images, seed, positions: [images / 255]
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    fit = pl.Trainer(accelerator="cpu", max_steps=3, num_sanity_val_steps=0, **QUIET, **several)
    fit.fit(linear)
    return {**linear.state_dict(), "valid": fit.validate(linear, verbose=False)[0]["valid_loss"]}


@pytest.mark.slow
def test_two_processes_tune_the_encoder_as_one(tmp_path):
    (expected,) = processes.run(tuned, 1, tmp_path / "1", 1)
    for found in processes.run(tuned, 2, tmp_path / "2", 2):
        assert found.pop("valid") == pytest.approx(expected["valid"], rel=1e-5)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
