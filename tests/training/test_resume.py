"""A run that is killed at any moment and resumed ends bit-identical to an uninterrupted one."""

import copy
import json
import os
import random
import shutil
import signal
import time
from itertools import pairwise
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import LONG, QUIET, SMALL
from pytorch_lightning.loggers import Logger
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.training import checkpoints, resuming
from self_supervised.training.checkpoints import Checkpoints, newest
from self_supervised.training.milestones import EveryNEpochs

MOMENTS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_train_epoch_end", "on_save_checkpoint",
)  # fmt: skip


class Killer(pl.Callback):
    """Callback that kills the first process at the n-th moment: a call of a hook, or a write of a checkpoint."""

    def __init__(self, at: int | None, rank: int):
        self.at, self.count = at if rank == 0 else None, 0
        replace, fsync = os.replace, os.fsync
        checkpoints.os.replace = lambda *args: (self.moment(), replace(*args), self.moment())
        checkpoints.os.fsync = lambda descriptor: (self.moment(), fsync(descriptor))
        for name in MOMENTS:
            setattr(self, name, lambda *args, **kwargs: self.moment())

    def moment(self):
        self.count += 1
        if self.count == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


class Figures(Logger):
    """Logger that writes every metric, to the last bit, to the disk at once."""

    name = version = None

    def __init__(self, path):
        self.path = path

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if torch.distributed.is_initialized() and torch.distributed.get_rank():
            return
        with open(self.path, "a") as file:
            for name, value in metrics.items():
                file.write(json.dumps([step, name, float(value).hex()]) + "\n")


def figures(folder: Path) -> dict:
    """Return the last value of each metric: those logged after the checkpoint of a resumed run were logged again."""
    lines = (folder / "figures.jsonl").read_text().splitlines()
    return {(step, name): value for step, name, value in map(json.loads, lines)}


def small_encoder() -> nn.Module:
    """Encoder with dropout, which draws from torch's own generator."""
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
    return nn.Sequential(*layers, nn.Linear(72, 10))


def build(kind: str, folder: str):
    """Return a method and the options of its Trainer."""
    common = {**SMALL, "dataset_name": "digits", "dim": 8, "K": 40, "lr": 0.1}
    if kind == "linear":
        return LinearClassifierMethod.from_moco_checkpoint(f"{folder}/example.ckpt", encoder=small_encoder()), {}
    if kind == "fine-tuning":
        fields = {"encoder_lr": 0.05, "lr": 0.1, "layer_decay": 0.5, "normalize_features": True, "label_fraction": 0.2}
        fields |= {"validate_on": "held_out", "lr_schedule": "cosine", "batch_size": 24}
        path, encoder = f"{folder}/example.ckpt", small_encoder()
        return LinearClassifierMethod.from_moco_checkpoint(path, encoder=encoder, **fields), {}
    if kind == "own loader":
        return SelfSupervisedMethod(PRESETS["simclr"](**common), encoder=small_encoder()), {}
    if kind == "files":  # decoded by workers
        fields = {
            **common,
            "dataset_name": "imagenet",
            "transform_crop_size": 16,
            "num_data_workers": 2,
            "batch_size": 4,
        }
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        return SelfSupervisedMethod(PRESETS["moco_v2"](**fields), encoder=encoder), {}
    if kind == "byol, accumulated":
        fields = {**common, "evaluate_every_n_epochs": 2, "mlp_normalization": "br", "optimizer_name": "lars"}
        method = SelfSupervisedMethod(PRESETS["byol"](**fields), encoder=small_encoder())
        return method, {"accumulate_grad_batches": 2}
    fields = {**common, "shuffle_batch_norm": True, "use_momentum_schedule": True, "optimizer_name": "adamw"}
    fields |= {"use_both_augmentations_as_queries": True, "lr": 0.001, "mlp_normalization": "bn"}
    fields |= {"gather_keys_for_queue": False} if kind == "own queues" else {}
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**fields), encoder=small_encoder())
    return method, {"val_check_interval": 4}


def train(rank: int, kind: str, world: int, folder: str, kill_at: int | None) -> int:
    """Train three epochs of eight batches, or the rest of them. Return the number of moments passed."""
    torch.manual_seed(3)
    method, options = build(kind, str(Path(folder).parent))
    killer = Killer(kill_at, rank)
    size = {"max_epochs": 3, "limit_train_batches": 8, "limit_val_batches": 3, "num_sanity_val_steps": 1}
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    callbacks = [Checkpoints(f"{folder}/run", every_n_steps=2), killer]
    logger = {"logger": Figures(f"{folder}/figures.jsonl"), "log_every_n_steps": 1}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **{**QUIET, **logger, **size, **several, **options})
    images = torch.randint(256, (128, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loader = (
        ResumableDataLoader(images, 16, sampler=ResumableSampler(images, 1, 0), num_workers=1)
        if kind == "own loader"
        else None
    )
    trainer.fit(method, loader, ckpt_path=newest(f"{folder}/run"))
    if rank == 0:
        optimizer = trainer.optimizers[0].state_dict()
        torch.save({"method": method.state_dict(), "optimizer": optimizer}, f"{folder}/final.pt")
    return killer.count


def equal(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, digits_path):
    """Return a folder with what a kind of run needs besides the digits: images in class folders, a checkpoint."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("resume")
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            place = digits_path / "imagenet" / split / label
            place.mkdir(parents=True, exist_ok=True)
            for i in range(20):
                pixels = torch.randint(256, (24 + i, 30, 3), generator=rng, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(place / f"{i}.png")
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**SMALL), encoder=small_encoder())
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(method)
    trainer.save_checkpoint(folder / "example.ckpt")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, world, n_kills",
    [
        ("moco", 1, 8),
        ("byol, accumulated", 1, 6),
        ("files", 1, 3),
        ("linear", 1, 3),
        ("fine-tuning", 1, 3),
        ("own loader", 1, 2),
        ("moco", 2, 4),
        ("own queues", 2, 2),
    ],
)
def test_resumed_runs_equal_the_uninterrupted_one(kind, world, n_kills, folder_of, data_path):
    """A run is killed and resumed at up to four moments, which are spread over its whole length."""
    place = folder_of / f"{kind} {world}".replace(", ", "_")
    n_moments = processes.run(train, world, place, kind, world, str(place), None)[0]
    expected, logged = torch.load(place / "final.pt"), figures(place)
    assert n_moments > 60 and len(logged) > 60
    moments = sorted(random.Random(LONG).sample(range(1, n_moments), n_kills * LONG))
    n_runs = -(-len(moments) // 4)
    for first in range(n_runs):
        run, kills = folder_of / f"{place.name}_{first}", moments[first::n_runs]
        for before, kill in pairwise([0, *kills]):
            codes = processes.join(processes.launch(train, world, run, kind, world, str(run), kill - before))
            assert codes[0] == -signal.SIGKILL, (run / "output_0.txt").read_text()
        processes.run(train, world, run, kind, world, str(run), None)
        assert equal(torch.load(run / "final.pt"), expected), kills
        assert figures(run) == logged, (kills, set(figures(run).items()) ^ set(logged.items()))


def slow_run(rank: int, world: int, folder: str) -> None:
    class Slowly(pl.Callback):
        def on_train_batch_start(self, *args):
            Path(folder, f"started_{rank}").touch()
            time.sleep(0.05)

    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1000, limit_train_batches=8, limit_val_batches=0, **QUIET, **several,
        callbacks=[Checkpoints(f"{folder}/run", every_n_steps=None), Slowly()],
    )  # fmt: skip
    trainer.fit(build("moco", folder)[0])


@pytest.mark.parametrize("world, to, number", [(1, [0], "SIGTERM"), (2, [0, 1], "SIGTERM"), (2, [1], "SIGUSR1")])
def test_a_signal_saves_and_ends_the_run_cleanly(world, to, number, tmp_path):
    """SIGTERM, and the signal that SLURM sends before the time limit, to all processes or to one."""
    queued = tmp_path / "queued"
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {queued}\n')
    scontrol.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "123", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    running = processes.launch(slow_run, world, tmp_path, world, str(tmp_path), variables=slurm)
    while not all((tmp_path / f"started_{rank}").exists() for rank in range(world)):
        assert all(process.is_alive() for process in running)
        time.sleep(0.05)
    time.sleep(0.3)
    for rank in to:
        os.kill(running[rank].pid, getattr(signal, number))
    assert processes.join(running, timeout=200) == [0] * world, (tmp_path / "output_0.txt").read_text()
    saved = checkpoints.read_checkpoint(newest(tmp_path / "run"))
    assert saved["global_step"] > 0
    assert "Error" not in (tmp_path / "output_0.txt").read_text()
    assert queued.exists() == (number == "SIGUSR1") and (not queued.exists() or queued.read_text() == "requeue 123\n")


def signalled_outside_training(rank: int, folder: str) -> tuple[int, bool]:
    """Send a signal while the encoder is scored before and after its training, as train.py does."""

    class Signal(pl.Callback):
        def on_validation_start(self, trainer, module):
            os.kill(os.getpid(), signal.SIGUSR1)

        def on_test_batch_start(self, *_):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGUSR1)
    callbacks = [Checkpoints(f"{folder}/run"), Signal()]
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, max_epochs=9, **QUIET)
    method = build("moco", folder)[0]
    trainer.validate(method, verbose=False)
    restored = signal.getsignal(signal.SIGUSR1) == before
    with pytest.raises(SystemExit):
        trainer.fit(method)
    steps = trainer.global_step
    with pytest.raises(SystemExit):  # at the end of the test, when every batch was seen
        trainer.test(method, verbose=False)
    return steps, restored and trainer.test_loop.batch_progress.is_last_batch


def test_a_signal_before_or_after_training_ends_the_run(tmp_path):
    """Lightning itself would, under SLURM, save a file in the working directory from which later runs would start."""
    assert processes.run(signalled_outside_training, 1, tmp_path, str(tmp_path)) == [(1, True)]
    assert newest(tmp_path / "run").name == "step_000000001.ckpt" and not list(Path.cwd().glob("*.ckpt"))


def other_ways(rank: int, folder: str) -> dict:
    """Run trainings that end in other ways than by SIGKILL, and leave their files."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise KeyError("of the user's own making")

    def fit(*callbacks, **options):
        size = {"max_epochs": 1, "limit_train_batches": 9, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**QUIET, **size, **options})
        trainer.fit(build("byol, accumulated", folder)[0])
        return trainer

    found, answered = {}, []
    signal.signal(signal.SIGTERM, lambda *_: answered.append("by the user"))
    try:
        fit(Checkpoints(f"{folder}/a"), Stop())
    except KeyError:
        signal.raise_signal(signal.SIGTERM)
        found["SIGTERM was answered"] = answered
    fit(Checkpoints(f"{folder}/b"), fast_dev_run=True)
    found["fast_dev_run"] = newest(f"{folder}/b")
    found["overfit"] = fit(overfit_batches=2).global_step
    often = {"limit_val_batches": 1, "val_check_interval": 3, "check_val_every_n_epoch": None}
    steps = fit(Checkpoints(f"{folder}/c", 1, keep=99), **often)
    found["saved"] = sorted(int(path.stem[5:]) for path in Path(f"{folder}/c").glob("*.ckpt"))
    return found | {"steps": steps.global_step}


def test_other_ways_to_end_a_run(tmp_path):
    assert processes.run(other_ways, 1, tmp_path, str(tmp_path)) == [
        {
            "SIGTERM was answered": ["by the user"],
            "fast_dev_run": None,
            "overfit": 2,
            "saved": [1, 2, 4, 5, 7, 8, 9],
            "steps": 9,
        }
    ]


# ---- resumed with other settings ----


class Seen(pl.Callback):
    """Callback that records the settings of every parameter at each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, *args):
        groups = trainer.optimizers[0].param_groups
        settings = [{k: v for k, v in group.items() if k not in ("params", "param_names", "name")} for group in groups]
        self.steps.append({name: s for g, s in zip(groups, settings, strict=True) for name in g["param_names"]})


def epochs(method, folder, end: int, loader=None, callbacks=(), **options):
    """Train up to epoch `end` from the newest checkpoint in the folder. Return the Trainer and what was recorded."""
    size = {"max_epochs": end, "limit_train_batches": 4, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    seen = Seen()
    callbacks = [Checkpoints(folder, every_n_steps=3), seen, *callbacks]
    fit = pl.Trainer(accelerator="cpu", callbacks=callbacks, **{**size, **QUIET, **options})
    fit.fit(method, loader, ckpt_path=newest(folder))
    return fit, seen.steps


def pretraining(optimizer_name="sgd", **fields) -> SelfSupervisedMethod:
    common = {**SMALL, "dim": 8, "K": 40, "lr": 0.1, "evaluations": []}
    return SelfSupervisedMethod(
        PRESETS["moco_v2"](**{**common, "optimizer_name": optimizer_name, **fields}), encoder=small_encoder()
    )


def linear_stage(optimizer_name="sgd", **fields) -> LinearClassifierMethod:
    fields = {"dataset_name": "digits", "batch_size": 16, "seed": 0, "lr": 0.1, **fields}
    return LinearClassifierMethod(optimizer_name=optimizer_name, encoder=small_encoder(), **fields)


OPTION = {"pattern": "projection", "lr_mult": 0.1, "weight_decay": 0.2}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "optimizer", "changed"),
    [
        (pretraining, "sgd", {"lr": 0.01}),
        (pretraining, "sgd", {"lr": 0.01, "lr_scaling": "sqrt", "lr_schedule": "linear", "warmup_epochs": 1.5}),
        (pretraining, "sgd", {"weight_decay": 0.02, "momentum": 0.5}),
        (pretraining, "lars", {"lars_eta": 0.02, "grad_clip_lars": True, "lr": 0.3}),
        (pretraining, "lars", {"exclude_matching_parameters_from_lars": [".bias", ".bn"]}),
        (pretraining, "adam", {"lr": 0.001, "weight_decay": 0.02}),
        (pretraining, "adamw", {"adam_betas": [0.5, 0.9]}),
        (pretraining, "adamw", {"final_weight_decay": 0.1}),
        (pretraining, "adamw", {"parameter_options": [OPTION], "layer_decay": 0.5}),
        (pretraining, "sgd", {"K": 40, "T": 0.5, "m": 0.9, "seed": 4}),
        (linear_stage, "sgd", {"lr": 0.01, "momentum": 0.5, "weight_decay": 0.1, "nesterov": True}),
        (linear_stage, "lars", {"lars_eta": 0.02, "lr_schedule": "cosine", "lr_scaling": "linear"}),
        (linear_stage, "adamw", {"encoder_lr": 0.01, "layer_decay": 0.5, "weight_decay": 0.1}),
    ],
)
def test_changed_settings_take_effect_from_the_first_step(build, optimizer, changed, tmp_path):
    """Settings equal those of a run that had them from its start; the optimizer's state continues."""
    before, _ = epochs(build(optimizer), tmp_path / "run", 1)
    _, expected = epochs(build(optimizer, **changed), tmp_path / "whole", 2)
    saved = checkpoints.read_checkpoint(newest(tmp_path / "run"))["optimizer_states"][0]
    names = [name for group in saved["param_groups"] for name in group["param_names"]]
    method, states = build(optimizer, **changed), []
    known = dict(method.named_parameters())
    note = pl.callbacks.LambdaCallback(
        on_train_start=lambda fit, _: states.extend(
            copy.deepcopy(fit.optimizers[0].state[known[name]]) for name in names
        )
    )
    _, seen = epochs(method, tmp_path / "run", 2, callbacks=[note])
    assert seen == expected[4:] and before.global_step == 4
    assert equal(states, [saved["state"][i] for i in range(len(names))])


@pytest.mark.slow
@pytest.mark.parametrize("ends", [(2, 3), (3, 5, 4), (1, 3, 2)])
def test_a_run_of_another_length_has_the_learning_rates_of_that_length(ends, tmp_path):
    """A run is extended, extended twice, or shortened again."""
    fields = {"warmup_epochs": 0.5, "final_weight_decay": 0.1}
    done = 0
    for end in ends:
        _, whole = epochs(pretraining(**fields), tmp_path / f"{end}", end)
        if end < done:
            with pytest.raises(ValueError, match="max_epochs"):
                epochs(pretraining(**fields), tmp_path / "run", end)
            continue
        _, seen = epochs(pretraining(**fields), tmp_path / "run", end)
        assert seen == whole[4 * done :]
        done = end


class EndAfter(pl.Callback):
    """Callback that ends the training as `max_time` does, after n batches in all."""

    def __init__(self, n: int):
        self.n = n

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.total_batch_idx + 1 == self.n


@pytest.mark.slow
@pytest.mark.parametrize(("accumulated", "batches"), [(1, 3), (1, 4), (1, 6), (2, 3), (2, 5)])
def test_a_training_that_max_time_ends_within_an_epoch_goes_on_there(accumulated, batches, tmp_path):
    options = {"accumulate_grad_batches": accumulated, "limit_val_batches": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = pretraining(evaluations=["rank_me"])
    cut, resumed = copy.deepcopy(whole), copy.deepcopy(whole)
    end, _ = epochs(whole, tmp_path / "whole", 2, **options)
    ended, _ = epochs(cut, tmp_path / "cut", 2, callbacks=[EndAfter(batches), EveryNEpochs(tmp_path, 1)], **options)
    assert not equal(cut.state_dict(), whole.state_dict())
    kept = sorted(path.name for path in tmp_path.glob("epoch_*"))
    assert kept == ["epoch_0001.ckpt"] * (batches + accumulated > 4)
    ended.save_checkpoint(tmp_path / "after.ckpt", weights_only=False)  # as pretrained.ckpt is
    again = copy.deepcopy(resumed)
    fit, _ = epochs(resumed, tmp_path / "cut", 2, **options)
    shutil.copy(tmp_path / "after.ckpt", (tmp_path / "again").mkdir() or tmp_path / "again/step_000000000.ckpt")
    epochs(again, tmp_path / "again", 2, **options)
    assert equal(again.state_dict(), whole.state_dict())
    assert (fit.global_step, fit.current_epoch) == (end.global_step, end.current_epoch)
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_training_whose_steps_are_limited_is_resumed_from_every_file(tmp_path):
    """Also from the end of an epoch, where Lightning would skip the images of the next one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        whole = pretraining()
    built, every = copy.deepcopy(whole), Checkpoints(tmp_path / "every", every_n_steps=1, keep=10)
    end, seen = epochs(whole, tmp_path / "whole", -1, max_steps=10, callbacks=[every])
    for done in (3, 4, 7, 8):  # an epoch has 4 steps
        file = f"step_{done:09d}.ckpt"
        (tmp_path / str(done)).mkdir()
        shutil.copy(tmp_path / "every" / file, tmp_path / str(done))
        method = copy.deepcopy(built)
        fit, resumed = epochs(method, tmp_path / str(done), -1, max_steps=10)
        assert resumed == seen[done:] and fit.current_epoch == end.current_epoch
        assert equal(method.state_dict(), whole.state_dict())


def test_a_run_is_shortened_before_its_end(tmp_path):
    with pytest.raises(KeyError):
        epochs(pretraining(), tmp_path / "run", 9, callbacks=[Stopped()])
    assert epochs(pretraining(), tmp_path / "run", 3)[1] == epochs(pretraining(), tmp_path / "new", 3)[1][3:]


@pytest.mark.parametrize(
    ("build", "changed", "options"),
    [
        (pretraining, {"optimizer_name": "adam"}, {}),
        (pretraining, {"K": 32}, {}),
        (pretraining, {"dim": 4}, {}),
        (pretraining, {"batch_size": 8}, {}),
        (pretraining, {"global_batch_size": 32}, {}),
        (pretraining, {}, {"accumulate_grad_batches": 2}),
        (pretraining, {}, {"max_steps": 2}),
        (linear_stage, {"optimizer_name": "lars"}, {}),
        (linear_stage, {"n_classes": 12}, {}),
        (linear_stage, {"batch_size": 8}, {}),
    ],
)
def test_resuming_with_incompatible_settings_is_refused(build, changed, options, tmp_path):
    epochs(build(), tmp_path / "run", 1)
    name = next(iter(changed), next(iter(options), None))
    with pytest.raises(ValueError, match=name):
        epochs(build(**changed), tmp_path / "run", 2, **options)


def test_other_starting_weights_of_a_resumed_training_give_a_warning(small, tmp_path):
    first = SelfSupervisedMethod(small("simclr", encoder_arch="small_cnn"))
    torch.save(first.model.state_dict(), tmp_path / "other.pt")
    epochs(first, tmp_path / "run", 1)
    params = small("simclr", encoder_arch="small_cnn", encoder_weights=str(tmp_path / "other.pt"))
    with pytest.warns(UserWarning, match="encoder_weights='.*other.pt' has no effect"):
        epochs(SelfSupervisedMethod(params), tmp_path / "run", 2)


def test_own_queues_of_other_processes_are_refused_when_fitting_alone(tmp_path):
    fit, _ = epochs(pretraining(gather_keys_for_queue=False), tmp_path / "run", 1)
    saved = newest(tmp_path / "run")
    content = torch.load(saved, weights_only=True)
    content["queues"] = {name: torch.cat([queue, queue]) for name, queue in content["queues"].items()}
    torch.save(content, saved)
    with pytest.raises(ValueError, match="gather_keys_for_queue=False: the checkpoint has the queues of 2 processes"):
        epochs(pretraining(gather_keys_for_queue=False), tmp_path / "run", 2)
    loaded = SelfSupervisedMethod.load_from_checkpoint(saved, encoder=small_encoder())
    assert torch.equal(loaded.queue.keys, fit.lightning_module.queue.keys)


class Stopped(pl.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 4:
            raise KeyError("stopped")


class Recorded(ResumableDataLoader):
    """Method that records the numbers of the images, which are their values."""

    def __iter__(self):
        self.taken = []
        for batch in super().__iter__():
            self.taken += batch[:, 0, 0, 0].tolist()
            yield batch


@pytest.mark.parametrize(("before", "after"), [((16, 1), (8, 2)), ((16, 2), (32, 1))])
def test_a_run_is_resumed_with_other_batches_of_the_same_step(before, after, tmp_path):
    """`before` and `after` are (batch size, accumulated batches). Each image is seen once, and schedules stay."""

    def train(size, accumulated, *callbacks):
        images = torch.arange(160, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).contiguous()
        loader = Recorded(images, size, sampler=ResumableSampler(images, 1, 0), drop_last=True)
        options = {"limit_train_batches": None, "accumulate_grad_batches": accumulated}
        return loader, epochs(pretraining(batch_size=size), tmp_path / "run", 1, loader, callbacks, **options)

    with pytest.raises(KeyError):
        train(*before, Stopped())
    first = list(ResumableSampler(range(160), 1, 0))[: 3 * before[0] * before[1]]
    loader, (fit, seen) = train(*after)
    assert sorted([*first, *loader.taken]) == list(range(160)) and fit.global_step == 160 // (before[0] * before[1])
    shutil.rmtree(tmp_path / "run")
    assert seen[:: after[1]] == train(*before)[1][1][:: before[1]][3:]


def test_another_epoch_length_gives_a_warning(tmp_path):
    epochs(pretraining(), tmp_path / "run", 1)
    with pytest.warns(UserWarning, match="an epoch has 6 optimizer steps, but had 4"):
        epochs(pretraining(), tmp_path / "run", 2, limit_train_batches=6)


def test_a_run_without_a_seed_is_resumed_with_its_own(tmp_path):
    torch.manual_seed(1)
    method = pretraining(seed=None)
    epochs(method, tmp_path / "run", 1)
    torch.manual_seed(2)
    resumed = pretraining(seed=None)
    assert resumed.params.seed == 2
    epochs(resumed, tmp_path / "run", 2)
    assert resumed.params.seed == resumed.hparams.seed == resumed.hparams_initial.seed == 1
    assert checkpoints.read_checkpoint(newest(tmp_path / "run"))["hyper_parameters"]["seed"] == 1


def test_fewer_epochs_than_were_begun_are_refused(small, trainer, tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 6:
                raise RuntimeError("stopped")

    model = SelfSupervisedMethod(small("simclr", evaluations=[]))
    fit = trainer(max_epochs=5, limit_train_batches=4, callbacks=[Checkpoints(tmp_path, every_n_steps=1), Stop()])
    with pytest.raises(RuntimeError, match="stopped"):
        fit.fit(model)
    within = checkpoints.read_checkpoint(newest(tmp_path))
    assert within["global_step"] == 6
    with pytest.raises(ValueError, match="max_epochs=1: the checkpoint's training has already reached 2"):
        resuming.refuse_lower_limits(within, trainer(max_epochs=1))
    resuming.refuse_lower_limits(within, trainer(max_epochs=2))
    resumed = trainer(max_epochs=2, limit_train_batches=4, callbacks=[Checkpoints(tmp_path)])
    resumed.fit(SelfSupervisedMethod(small("simclr", evaluations=[])), ckpt_path=newest(tmp_path))
    at_end = checkpoints.read_checkpoint(newest(tmp_path))
    resuming.refuse_lower_limits(at_end, trainer(max_epochs=2))
    assert (resuming.epochs_begun(at_end), at_end["global_step"]) == (2, 8)
