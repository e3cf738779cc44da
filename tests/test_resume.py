"""Killed at any moment and resumed, a run ends with the bits of the run that was never interrupted."""

import json
import os
import random
import signal
import time
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import LONG, SMALL
from pytorch_lightning.loggers import Logger
from torch import nn

import checkpoints
from checkpoints import Checkpoints, newest
from linear_classifier import LinearClassifierMethod
from loader import Loader, Share
from moco import SelfSupervisedMethod
from model_params import PRESETS

MOMENTS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "on_train_batch_end", "on_validation_start", "on_validation_batch_end",
    "on_validation_epoch_end", "on_train_epoch_end", "on_save_checkpoint",
)  # fmt: skip


class Killer(pl.Callback):
    """SIGKILL on the first process at the n-th moment at which a hook is called or a checkpoint's file is written."""

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
    """Every logged figure, to the last bit, on the disk at once."""

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
    """The last value of each; what was logged after the checkpoint from which a run went on, was logged again."""
    lines = (folder / "figures.jsonl").read_text().splitlines()
    return {(step, name): value for step, name, value in map(json.loads, lines)}


def small_encoder() -> nn.Module:
    """With dropout, which draws from torch's own generator."""
    layers = nn.Conv2d(1, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
    return nn.Sequential(*layers, nn.Linear(72, 10))


def build(kind: str, folder: str):
    """(method, options of its Trainer)"""
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
    method = SelfSupervisedMethod(PRESETS["moco_v2"](**fields), encoder=small_encoder())
    return method, {"val_check_interval": 4}


def train(rank: int, kind: str, world: int, folder: str, kill_at: int | None) -> int:
    """Three epochs of eight batches, or what is left of them. Returns the number of moments passed."""
    torch.manual_seed(3)
    method, options = build(kind, str(Path(folder).parent))
    killer = Killer(kill_at, rank)
    size = {"max_epochs": 3, "limit_train_batches": 8, "limit_val_batches": 3, "num_sanity_val_steps": 1}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    callbacks = [Checkpoints(f"{folder}/run", every_n_steps=2), killer]
    logger = {"logger": Figures(f"{folder}/figures.jsonl"), "log_every_n_steps": 1}
    trainer = pl.Trainer(accelerator="cpu", callbacks=callbacks, **{**logger, **quiet, **size, **several, **options})
    images = torch.randint(256, (128, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    loader = Loader(images, 16, sampler=Share(images, 1, 0), num_workers=1) if kind == "own loader" else None
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
    """What a kind of run needs beside the digits: class folders of images, a checkpoint to start from."""
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
    ],
)
def test_resumed_runs_equal_the_uninterrupted_one(kind, world, n_kills, folder_of, data_path):
    place = folder_of / f"{kind} {world}".replace(", ", "_")
    n_moments = processes.run(train, world, place, kind, world, str(place), None)[0]
    expected, logged = torch.load(place / "final.pt"), figures(place)
    assert n_moments > 60 and len(logged) > 60
    points = random.Random(LONG).sample(range(1, n_moments), n_kills * LONG)
    for kill_at in points:
        run = folder_of / f"{place.name}_killed_at_{kill_at}"
        codes = processes.join(processes.launch(train, world, run, kind, world, str(run), kill_at))
        assert codes[0] == -signal.SIGKILL, (run / "output_0.txt").read_text()
        if kill_at % 3 == 0:  # the second process, too
            processes.join(processes.launch(train, world, run, kind, world, str(run), 2 + kill_at // 2))
        processes.run(train, world, run, kind, world, str(run), None)
        assert equal(torch.load(run / "final.pt"), expected), kill_at
        assert figures(run) == logged, (kill_at, set(figures(run).items()) ^ set(logged.items()))


def slow_run(rank: int, world: int, folder: str) -> None:
    class Slowly(pl.Callback):
        def on_train_batch_start(self, *args):
            Path(folder, f"started_{rank}").touch()
            time.sleep(0.05)

    several = {"strategy": "ddp", "devices": world} if world > 1 else {}
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1000, limit_train_batches=8, limit_val_batches=0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **several,
        callbacks=[Checkpoints(f"{folder}/run", every_n_steps=None), Slowly()],
    )  # fmt: skip
    trainer.fit(build("moco", folder)[0])


@pytest.mark.parametrize("world, to, number", [(1, [0], "SIGTERM"), (2, [0, 1], "SIGTERM"), (2, [1], "SIGUSR1")])
def test_a_signal_saves_and_ends_the_run_cleanly(world, to, number, tmp_path):
    """SIGTERM, and what SLURM sends before the time is up; to all processes or to one."""
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
    assert processes.join(running, timeout=60) == [0] * world, (tmp_path / "output_0.txt").read_text()
    saved = checkpoints.read(newest(tmp_path / "run"))
    assert saved["global_step"] > 0
    assert "Error" not in (tmp_path / "output_0.txt").read_text()
    assert queued.exists() == (number == "SIGUSR1") and (not queued.exists() or queued.read_text() == "requeue 123\n")


def signalled_before_training(rank: int, folder: str) -> tuple[int, bool]:
    """SIGUSR1 arrives while the encoder is scored before its training, as train.py does."""

    class Signal(pl.Callback):
        def on_validation_start(self, trainer, module):
            os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [Checkpoints(f"{folder}/run"), Signal()]
    trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=callbacks, max_epochs=9, **quiet)
    method = build("moco", folder)[0]
    trainer.validate(method, verbose=False)
    restored = signal.getsignal(signal.SIGUSR1) == before
    try:
        trainer.fit(method)
    except SystemExit:
        return trainer.global_step, restored
    return -1, restored


def test_a_signal_before_training_ends_it_at_once_and_nothing_else(tmp_path):
    """Lightning's own answer under SLURM would be a file in the working folder from which later runs start."""
    assert processes.run(signalled_before_training, 1, tmp_path, str(tmp_path)) == [(1, True)]
    assert newest(tmp_path / "run").name == "step_000000001.ckpt" and not list(Path.cwd().glob("*.ckpt"))


def other_ways(rank: int, folder: str) -> dict:
    """What is left behind by runs that end in other ways than by SIGKILL."""

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            raise KeyError("of the user's own making")

    def fit(*callbacks, **options):
        quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
        size = {"max_epochs": 1, "limit_train_batches": 9, "limit_val_batches": 0, "num_sanity_val_steps": 0}
        trainer = pl.Trainer(accelerator="cpu", logger=False, callbacks=list(callbacks), **{**quiet, **size, **options})
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
