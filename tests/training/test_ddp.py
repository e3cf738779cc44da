"""Multiple real processes (gloo, CPU) compute the same as one process with the joined batch."""

import contextlib
import copy
import tempfile
from functools import cache

import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
import torchvision
from conftest import LONG, QUIET
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised import distributed
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler

WORLDS, IMAGES, STEPS = (2, 4), 16, 5  # images of the joined batch
BATCH = {"use_negative_examples_from_batch": True}
BOTH_VIEWS = {"use_both_augmentations_as_queries": True}
SMALL_VIEWS = {"n_small_views": 2, "transform_small_crop_size": 8}  # the size of the large views, for one encoder
MICRO = ("moco_v2", "byol", "simclr", "vicreg", "swav", "eqco", "barlow_twins")
# presets with communication of their own
GATHERING = ("barlow_twins", "swav", "dino", "supcon", "nnclr", "lejepa", "visreg", "mmcr")
LIKE_OTHERS = (  # and cases that communicate as others do
    "ce, queue, both views", "eqco, queue", "bce, queue", "sce, small views", "vicreg, small views", "lars",
    "online classifier, lars", "sce, small views, micro-batches", "bce, batch, micro-batches",
    *(f"{name}, micro-batches" for name in MICRO if name not in ("simclr", "swav")),
)  # fmt: skip
CASES = {
    **{name: {"preset": name} for name in PRESETS},
    "ce, batch": {**BATCH, "use_negative_examples_from_queue": False},
    "ce, queue and batch": BATCH,
    "ce, queue, both views": BOTH_VIEWS,
    "eqco, queue": {"use_eqco_margin": True},
    "bce, queue": {"loss_type": "bce"},
    "bce, batch": {"loss_type": "bce", **BATCH, "use_negative_examples_from_queue": False},
    "ip, queue and batch": {"loss_type": "ip", **BATCH},
    "sce, batch": {"preset": "sce", "use_negative_examples_from_queue": False},
    "dclw": {"preset": "dcl", "dcl_sigma": 0.5},
    "shuffled": {"shuffle_batch_norm": True},
    **{f"{name}, small views": {"preset": name, **SMALL_VIEWS} for name in ("sce", "simclr", "vicreg")},
    **{f"{name}, micro-batches": {"preset": name, "micro_batch_size": 3} for name in MICRO},
    "sce, small views, micro-batches": {"preset": "sce", **SMALL_VIEWS, "micro_batch_size": 3},
    "bce, batch, micro-batches": {"loss_type": "bce", **BATCH, "micro_batch_size": 3},
    "distill, its teacher": {"preset": "distill", "teacher": "resnet18.pth", "teacher_crop_size": 32},
    "online classifier": {"online_classifier": True},
    "online classifier, lars": {"preset": "byol", "online_classifier": True, "online_classifier_lr": 2.0},
    "lars": {"optimizer_name": "lars", "exclude_matching_parameters_from_lars": [".bias", ".bn"], "lars_eta": 0.02},
}
SMALL = {
    "dataset_name": "digits", "encoder_arch": "module", "global_batch_size": None, "lr_scaling": None, "lr": 0.05,
    "K": 24, "dim": 6, "mlp_hidden_dim": 12, "warmup_epochs": 0, "seed": 0, "n_large_views": 2, "n_prototypes": 8,
    "prototypes_frozen_epochs": 0, "queue_from_epoch": 0,
    "projection_mlp_hidden_dims": [], "prediction_mlp_hidden_dims": [],
}  # fmt: skip


def cases(world: int) -> list[str]:
    """Return the names of all cases; for four processes without those that gather nothing that others do not."""
    assert set(LIKE_OTHERS) < set(CASES)
    alike = {*PRESETS, *LIKE_OTHERS} - {*GATHERING}
    return [name for name in CASES if world < 4 or LONG > 1 or name not in alike]


def encoder() -> nn.Module:
    """Encoder whose normalization does not look across the batch, like that of the heads."""
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.GroupNorm(2, 8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10)
    return nn.Sequential(*layers, nn.LayerNorm(10))


class Gradients(pl.Callback):
    def __init__(self):
        self.found = None

    def on_before_optimizer_step(self, trainer, module, optimizer):
        if self.found is None:  # a head without layers has no parameters
            self.found = {n: p.grad.clone() for n, p in module.named_parameters() if p.requires_grad}
            self.loss = trainer.callback_metrics["step_train_loss"].clone()


def trainer(world: int, **options) -> pl.Trainer:
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    given = {"max_epochs": 1, "num_sanity_val_steps": 0, **QUIET, **several, **options}
    return pl.Trainer(accelerator="cpu", **given)


class Batches:
    """Loader of fixed batches (a list would be taken for a list of loaders)."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def train_with_a_teacher_at_hand(rank: int, world: int) -> dict:
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        torch.manual_seed(2)
        torch.save(torchvision.models.resnet18().state_dict(), "resnet18.pth")
        return train_every_case(rank, world)


def train_every_case(rank: int, world: int) -> dict:
    """Return, for every case, loss and gradients of the first step and the state after the last one."""
    g = torch.Generator().manual_seed(0)
    share = slice(rank, None, world)
    views = [[torch.randn(IMAGES, 1, 8, 8, generator=g)[share] for _ in range(4)] for _ in range(STEPS)]
    labels = [(torch.arange(IMAGES) * (step + 3) % 11 - 1)[share] for step in range(STEPS)]  # -1: unlabeled
    batches = [(list(v), y) for v, y in zip(views, labels, strict=True)]
    found = {}
    for case in cases(world):
        fields = CASES[case]
        preset = PRESETS[fields.get("preset", "moco_v2")]
        fields = {name: value for name, value in fields.items() if name != "preset"}
        params = preset(**{**SMALL, "mlp_normalization": "ln", "evaluations": [], **fields})
        torch.manual_seed(1)
        model, gradients = SelfSupervisedMethod(params, encoder=encoder()), Gradients()
        trainer(world, callbacks=[gradients]).fit(model, Batches(batches))
        found[case] = {"loss": gradients.loss, "gradients": gradients.found, "state": model.state_dict()}
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(2): what each of two processes found; they train once."""
    return cache(
        lambda world: processes.run(train_with_a_teacher_at_hand, world, tmp_path_factory.mktemp("world"), world)
    )


def assert_close(found: dict, expected: dict, most: float = 1e-5) -> None:
    """Compare to a fraction of the largest value. Some gradients (of biases before a mean is subtracted) are zero but
    for rounding."""
    assert found.keys() == expected.keys()
    largest = max(value.abs().max().item() for name, value in expected.items() if name != "queue.position")
    for name, value in expected.items():
        assert torch.allclose(found[name].double(), value.double(), rtol=most, atol=most * largest), name


@pytest.mark.slow
@pytest.mark.parametrize("world, case", [(world, case) for world in WORLDS for case in cases(world)])
def test_training_equals_one_process_on_the_joined_batch(world, case, trained):
    """DDP averages gradients over processes, so losses of each process's own queries are averaged, too."""
    expected, together = trained(1)[0][case], trained(world)
    average = torch.stack([process[case]["loss"] for process in together]).mean()
    assert average.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    for process in together:
        assert_close(process[case]["gradients"], expected["gradients"])
        # weights, lagging weights, queue after 5 steps, in which the largest slices of VISReg enlarge the rounding of
        # processors without AVX-512
        assert_close(process[case]["state"], expected["state"], 5e-5 if case == "visreg" else 1e-5)
        for name, value in together[0][case]["state"].items():
            assert torch.equal(process[case]["state"][name], value), name
    moved = max(g.abs().max().item() for g in expected["gradients"].values())
    assert moved > 1e-4  # weights did change


# ---- the parts ----


def parts(rank: int, world: int) -> dict:
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=world)
    loader = torch.utils.data.DataLoader(
        range(5), sampler=torch.utils.data.DistributedSampler(range(5), shuffle=False), batch_size=2
    )
    found = {"gathered": distributed.gather(torch.arange(3.0) + 10 * rank)}
    found["evaluated"] = distributed.gather_evaluated(torch.cat(list(loader)), loader)
    found["all of it"] = distributed.gather_evaluated(torch.arange(5), torch.utils.data.DataLoader(range(5)))
    dealt = torch.utils.data.BatchSampler(torch.utils.data.DistributedSampler(range(5), shuffle=False), 2, False)
    of_batches = torch.utils.data.DataLoader(range(5), batch_sampler=dealt)  # as Lightning deals batch samplers
    found["of batches"] = distributed.gather_evaluated(torch.cat(list(of_batches)), of_batches)
    not_dealt = torch.utils.data.DataLoader(range(5), sampler=ResumableSampler(range(5), 1, 0, shuffle=False))
    found["not dealt"] = distributed.gather_evaluated(torch.cat(list(not_dealt)), not_dealt)
    network = nn.BatchNorm1d(2)
    network.running_mean.fill_(rank)
    distributed.share_buffers(network, None)
    found["statistics"] = network.running_mean
    found["from rank zero"] = distributed.on_rank_zero(lambda: {"score": 5.0 + rank})
    found["any"] = distributed.any_process(rank == 1), distributed.any_process(False)
    images = torch.arange(6).float().unsqueeze(1) + 6 * rank
    found["shuffled"], found["seen"] = [], []
    for seed in range(50):
        seen = []
        keys = distributed.shuffled(
            lambda x, seen=seen: seen.append(x) or x * 2, images, (seed, 1), n_virtual_devices=8
        )
        found["shuffled"].append(keys)
        found["seen"].append(seen[0].flatten())
    dist.destroy_process_group()
    return found


@pytest.fixture(scope="module", params=(2, 3))
def found_parts(request, tmp_path_factory):
    return processes.run(parts, request.param, tmp_path_factory.mktemp("parts"), request.param)


def test_gathering(found_parts):
    world = len(found_parts)
    for process in found_parts:
        assert process["gathered"].tolist() == [i + 10 * rank for i in range(3) for rank in range(world)]
        assert process["evaluated"].tolist() == [0, 1, 2, 3, 4]  # each image once, in order
        assert process["all of it"].tolist() == process["of batches"].tolist() == [0, 1, 2, 3, 4]
        assert process["not dealt"].tolist() == [0, 1, 2, 3, 4] and process["statistics"].tolist() == [0, 0]
        assert process["from rank zero"] == {"score": 5.0} and process["any"] == (True, False)


def test_no_key_is_normalized_by_the_batch_of_its_query(found_parts):
    """Equal parts of the images that share batch statistics as keys come from each process."""
    world = len(found_parts)
    partners = set()
    for draw in range(50):
        seen = torch.stack([process["seen"][draw] for process in found_parts])
        assert seen.flatten().sort().values.tolist() == list(range(6 * world))
        for batch in seen:
            counts = np.bincount((batch // 6).long(), minlength=world)
            assert counts.tolist() == [6 // world] * world
            partners |= {tuple(sorted(pair)) for pair in torch.combinations(batch.long()).tolist()}
        for rank, process in enumerate(found_parts):
            own = (torch.arange(6).float().unsqueeze(1) + 6 * rank) * 2
            assert torch.equal(process["shuffled"][draw], own)  # every key is back in its place
    assert len(partners) == 6 * world * (6 * world - 1) // 2  # over time, every image meets every other


def test_without_processes_everything_is_the_identity():
    x = torch.randn(3, 2)
    assert distributed.gather(x) is x and distributed.gather_evaluated(x, None) is x
    assert (distributed.rank(), distributed.world_size()) == (0, 1) and distributed.on_rank_zero(lambda: 3) == 3
    assert distributed.any_process(True) and not distributed.any_process(False)


def test_scores_of_streams_on_several_processes_are_warned_of(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    stream = torch.utils.data.DataLoader(torch.utils.data.ChainDataset([]))
    with pytest.warns(UserWarning, match="from an IterableDataset, and they are not gathered"):
        assert distributed.gather_evaluated(x := torch.randn(3, 2), stream) is x


def drawn_seeds(rank: int, world: int, given: int | None) -> dict:
    """Without a seed, each process draws another one, as in PyTorch since 2.14."""
    torch.manual_seed(rank + 5)
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**{**SMALL, "seed": None}), encoder=encoder())
    stage = LinearClassifierMethod(dataset_name="digits", batch_size=8, seed=given and given + rank, encoder=encoder())
    fit = trainer(world)
    fit.validate(method, verbose=False)  # the random encoder is scored before any training
    first = copy.deepcopy(method.state_dict())
    fit.fit(method)
    try:
        trainer(world).fit(stage)
    except ValueError as error:
        return {"error": str(error)}
    return {"seed": method.params.seed, "hparams": dict(stage.hparams), "first": first, "last": method.state_dict()}


@pytest.mark.slow
def test_processes_share_a_seed_that_is_drawn(tmp_path):
    first, second = processes.run(drawn_seeds, 2, tmp_path, 2, None)
    assert first["seed"] == second["seed"] == 5 == first["hparams"]["seed"] == second["hparams"]["seed"]
    for state in ("first", "last"):
        for name, value in first[state].items():
            is_own = state == "last" and "running" in name  # batch statistics
            assert is_own or torch.equal(value, second[state][name]), name


def test_processes_with_other_seeds_are_refused(tmp_path):
    for found in processes.run(drawn_seeds, 2, tmp_path, 2, 1):
        assert found["error"].startswith("seed differs between processes ([1, 2])")


def other_choices(rank: int, world: int, folder: str) -> list[str]:
    """Let each process choose a precision, whether it resumes, and from which checkpoint."""
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**SMALL, evaluations=[]), encoder=encoder())
    fit = trainer(world, limit_train_batches=1)
    fit.fit(method)
    torch.save(fit._checkpoint_connector.dump_checkpoint(), path := f"{folder}/{rank}.ckpt")
    begin = (
        lambda: trainer(world, precision=("32-true", "bf16-mixed")[rank]).validate(method),
        lambda: trainer(world).fit(method) if rank else trainer(world).validate(method),
        lambda: trainer(world, max_epochs=2).fit(method, ckpt_path=path),
    )
    return [str(pytest.raises(ValueError, one).value) for one in begin]


def test_processes_with_other_precisions_and_checkpoints_are_refused(tmp_path):
    for rank, found in enumerate(processes.run(other_choices, 2, tmp_path, 2, str(tmp_path))):
        for message, name in zip(found, ("precision=", "stage=", f"ckpt_path='{rank}.ckpt'"), strict=True):
            assert message.startswith(name) and "but another process has another one" in message


def wrong_shares(rank: int, world: int) -> list[str]:
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**SMALL, evaluations=[]), encoder=encoder())
    loaders = (
        ResumableDataLoader(images, 8, sampler=ResumableSampler(images, 1, 0)),
        torch.utils.data.DataLoader(images, 8, sampler=torch.utils.data.SubsetRandomSampler(range(32))),
    )
    return [str(pytest.raises(ValueError, trainer(world).fit, method, loader).value) for loader in loaders]


def test_loaders_whose_shares_overlap_are_refused(tmp_path):
    """Otherwise both processes would train on the same images, or on random parts of their own."""
    for of_one, of_own in processes.run(wrong_shares, 2, tmp_path, 2):
        assert of_one.startswith("the loader deals images out to 1 processes, but there are 2")
        assert of_own.startswith("the sampler SubsetRandomSampler draws other indices on each process")


# ---- scores ----


def scores(rank: int, world: int, folder: str) -> dict:
    """500 test images in batches of 33: the sampler repeats some on 3 processes, the last batches are smaller."""
    params = PRESETS["byol"](**{**SMALL, "batch_size": 33})
    torch.manual_seed(1)
    model = SelfSupervisedMethod(params, encoder=encoder())
    fit = trainer(world, limit_train_batches=1)
    if world == 1:
        fit.fit(model)
        fit.save_checkpoint(f"{folder}/example.ckpt")
    model = SelfSupervisedMethod.load_from_checkpoint(f"{folder}/example.ckpt", encoder=encoder())
    found = dict(trainer(world).validate(model, verbose=False)[0])
    torch.manual_seed(2)
    linear = LinearClassifierMethod.from_moco_checkpoint(f"{folder}/example.ckpt", encoder=encoder(), batch_size=33)
    return found | trainer(world).validate(linear, verbose=False)[0]


class SavesWhenValidated(pl.Callback):
    def __init__(self, path: str):
        self.path, self.scores = path, {}

    def on_validation_end(self, trainer, module):
        if not self.scores:
            self.scores = dict(module.latest_scores[1])
            trainer.save_checkpoint(self.path)


def scores_and_those_of_the_checkpoint(rank: int, world: int, folder: str, within_a_step: bool) -> tuple[dict, dict]:
    """Scores after a last step that no validation follows, or of a validation within accumulated batches, and those of
    the checkpoint of that moment, which has the statistics of the first process."""

    def network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8, momentum=0.9), nn.ReLU(), nn.Flatten())

    torch.manual_seed(1)
    model = SelfSupervisedMethod(PRESETS["byol"](**SMALL, evaluations=["knn"], embedding_dim=72), encoder=network())
    saver = SavesWhenValidated(f"{folder}/example.ckpt")
    if within_a_step:
        options = {"limit_train_batches": 2, "val_check_interval": 1, "accumulate_grad_batches": 2}
        trainer(world, callbacks=[saver], **options).fit(model)
    else:
        fit = trainer(world, max_steps=3, max_epochs=-1, check_val_every_n_epoch=5)
        fit.fit(model)
        saver.on_validation_end(fit, model)
    saved = SelfSupervisedMethod.load_from_checkpoint(saver.path, encoder=network())
    return saver.scores, dict(trainer(world).validate(saved, verbose=False)[0])


@pytest.mark.parametrize("within_a_step", [False, True])
def test_scores_are_those_of_the_checkpoint(within_a_step, tmp_path):
    every = processes.run(scores_and_those_of_the_checkpoint, 2, tmp_path, 2, str(tmp_path), within_a_step)
    for scores, of_checkpoint in every:
        assert scores == pytest.approx(of_checkpoint) and len(scores) == 2


@pytest.mark.slow
def test_scores_are_those_of_the_whole_set_on_every_process(tmp_path):
    (expected,) = processes.run(scores, 1, tmp_path / "1", 1, str(tmp_path))
    assert expected["valid_class_acc"] > 20 and 0 < expected["valid_acc1"] < 100 and "valid_rank_me" in expected
    for world in (2, 3):
        found = processes.run(scores, world, tmp_path / str(world), world, str(tmp_path))
        assert all(process == found[0] for process in found)
        assert found[0] == pytest.approx(expected, rel=1e-5)
