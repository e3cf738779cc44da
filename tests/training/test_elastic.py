"""A run goes on with another number of processes, or of accumulated batches, and ends as if it had never stopped.

`make test-long` loses processes and nodes of torchrun for 15 minutes.
"""

import os
import random
import re
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import processes
import pytest
import pytorch_lightning as pl
import torch
import videos
from conftest import LONG
from test_ddp import SMALL, encoder, trainer
from test_launch import TORCHRUN, Programs
from torch import nn

from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised import distributed
from self_supervised.runs.run_options import RunOptions
from self_supervised.training.checkpoints import Checkpoints, newest, read_checkpoint
from self_supervised.training.resuming import convert_position

STEP, EPOCHS, STEPS_OF_AN_EPOCH = 12, 3, 5  # images of an optimizer step
COMMON = {**SMALL, "global_batch_size": STEP, "mlp_normalization": "ln", "evaluations": [], "num_data_workers": 0}
OF_FILES = {"in_channels": 1, "transform_crop_size": 8, "val_size": 0, "test_size": 0, "num_data_workers": 1}
KINDS = {  # preset, settings; (processes, accumulated batches, step after which they are killed) of each start
    "queue": ("moco_v2", {"K": 30, "shuffle_batch_norm": True},
              [(2, 1, 3), (1, 1, 6), (4, 1, 9), (3, 1, 12), (2, 1, None)]),
    "accumulated": ("byol", {"use_momentum_schedule": True},  # a loss of single images
                    [(1, 3, 2), (2, 2, 6), (3, 1, 9), (4, 1, 12), (1, 1, None)]),
    "small views": ("swav", {"n_small_views": 2, "transform_small_crop_size": 8, "K": 30}, [(1, 1, 4), (2, 1, None)]),
    "shards": ("vicreg", {"dataset_name": "folder", "data_path": "shards/*.tar", **OF_FILES},
               [(2, 1, 4), (3, 1, 9), (1, 1, None)]),
    "videos": ("sce_video", {"dataset_name": "kinetics", "transform_crop_size": 8, "num_frames": 2, "K": 30},
               [(2, 1, 3), (1, 1, None)]),
}  # fmt: skip


class Killed(pl.Callback):
    """Write the views of each step, in the order of one process, and end the process without warning after a step."""

    def __init__(self, folder: Path, after: int | None):
        self.folder, self.after, self.parts = folder, after, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.after and not self.parts:
            distributed.any_process(True)  # all have made the step
            os._exit(1)
        self.parts.append(distributed.gather(torch.cat([view.flatten(1) for view in batch[0]], 1)))
        if len(self.parts) == trainer.accumulate_grad_batches:
            torch.save(torch.cat(self.parts), self.folder / f"views_{trainer.global_step}.pt")
            self.parts = []


def train(rank: int, kind: str, world: int, accumulated: int, folder: str, after: int | None) -> None:
    preset, settings, _ = KINDS[kind]
    os.chdir(Path(folder).parent)
    torch.manual_seed(1)
    of_clips = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2 * 8 * 8, 10), nn.LayerNorm(10))
    encoders = {"videos": lambda: of_clips}
    method = SelfSupervisedMethod(PRESETS[preset](**{**COMMON, **settings}), encoder=encoders.get(kind, encoder)())
    fit = trainer(
        world, precision="64-true", max_epochs=EPOCHS, accumulate_grad_batches=accumulated, limit_val_batches=0,
        limit_train_batches=STEPS_OF_AN_EPOCH * accumulated,
        callbacks=[Checkpoints(f"{folder}/run", every_n_steps=2), Killed(Path(folder), after)],
    )  # fmt: skip
    fit.fit(method, ckpt_path=newest(f"{folder}/run"))
    if rank == 0:
        torch.save(method.state_dict(), f"{folder}/final.pt")


def write_data(folder: Path) -> None:
    """70 images in three shards, and 64 short videos."""
    for i in range(70):
        pixels = np.random.default_rng(i).integers(0, 256, (14, 20), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f"{i}.png")
    (folder / "shards").mkdir()
    for shard in range(3):
        with tarfile.open(folder / "shards" / f"{shard}.tar", "w") as tar:
            for i in range(shard, 70, 3):
                tar.add(folder / f"{i}.png", f"a/{i}.png")
    for i in range(64):
        videos.write_frames(folder / "kinetics" / "train" / "a" / str(i), n=4, size=(12, 12))
    videos.write_frames(folder / "kinetics" / "val" / "a" / "0", n=4, size=(12, 12))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_with_other_processes(kind, data_path, tmp_path, monkeypatch):
    """In float64, with a normalization that does not look across the batch. Every image is there once, in its place."""
    if kind in ("shards", "videos"):
        write_data(tmp_path)
        monkeypatch.setenv("DATA_PATH", str(tmp_path))
    ends = []
    for name, starts in (("whole", [(1, 1, None)]), ("parts", KINDS[kind][2])):
        folder = tmp_path / name
        for n, (world, accumulated, after) in enumerate(starts):
            (folder / str(n)).mkdir(parents=True)
            started = processes.launch(train, world, folder / str(n), kind, world, accumulated, str(folder), after)
            codes = processes.join(started)
            assert all(codes) == (after is not None), (folder / str(n) / "output_0.txt").read_text()[-3000:]
        views = [torch.load(folder / f"views_{step}.pt") for step in range(EPOCHS * STEPS_OF_AN_EPOCH)]
        ends.append((torch.stack(views), torch.load(folder / "final.pt")))
    (expected, weights), (found, ours) = ends
    assert len(expected.flatten(0, 1).unique(dim=0)) == EPOCHS * STEPS_OF_AN_EPOCH * STEP
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=name)


# ---- torchrun's elastic agents ----

STARTED_BY_TORCHRUN = {  # the second of three nodes with two processes each
    "TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
}  # fmt: skip


def test_a_position_keeps_how_far_lightning_had_come_in_its_last_batch():
    """Files of Lightning's ModelCheckpoint are written before the last batch is counted as completed."""
    counts = {"ready": 2, "started": 2, "processed": 2, "completed": 1}
    progress = {"total": {**counts}, "current": {**counts}}
    loop = {"state_dict": {"combined_loader": [{"epoch": 0, "batches": 2}]}, "epoch_loop.batch_progress": progress}
    convert_position({"steps": {"accumulated": 1}, "loops": {"fit_loop": loop}}, 2)
    assert progress["current"] == {"ready": 4, "started": 4, "processed": 4, "completed": 3} == progress["total"]
    assert loop["state_dict"]["combined_loader"] == [{"epoch": 0, "batches": 4}]


def test_options_follow_torchrun(monkeypatch):
    assert RunOptions().trainer_arguments()["num_nodes"] == 1 and RunOptions(devices=3, num_nodes=2).n_processes == 6
    for name, value in STARTED_BY_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    found = RunOptions().trainer_arguments()
    assert (found["devices"], found["num_nodes"]) == (2, 3) and RunOptions().n_processes == 6
    assert RunOptions(devices=[4, 5], num_nodes=3).n_processes == 6
    for contradiction in ({"devices": 1}, {"num_nodes": 2}):
        with pytest.raises(ValueError, match="torchrun started 2 processes on each of 3 nodes"):
            RunOptions(**contradiction).trainer_arguments()
    monkeypatch.setenv("WORLD_SIZE", "5")
    with pytest.raises(ValueError, match="Start as many on each"):
        RunOptions().trainer_arguments()


@pytest.mark.parametrize(("restarts", "status"), [("0", None), ("3", 75)])
def test_status_after_a_signal(restarts, status, monkeypatch, small, trainer, tmp_path):
    """For torchrun, status 0 of one process is the end of the training."""
    fit = trainer(max_steps=4, limit_val_batches=0, callbacks=[Checkpoints(tmp_path / "run"), Signal()])
    monkeypatch.setattr(distributed, "torchrun_layout", lambda: (1, 1))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    with pytest.raises(SystemExit) as end:
        fit.fit(SelfSupervisedMethod(small("simclr")))
    assert end.value.code == status and newest(tmp_path / "run")


class Signal(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)


def test_a_shared_store_gives_a_warning(monkeypatch, small, trainer, tmp_path):
    fit = trainer(max_steps=1, limit_val_batches=0, callbacks=[Checkpoints(tmp_path / "run")])
    monkeypatch.setattr(distributed, "is_elastic", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    with pytest.warns(UserWarning, match="Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"):
        fit.fit(SelfSupervisedMethod(small("simclr")))


MINUTES, SECONDS_BETWEEN = 15, (20, 40)
TRAINING = (
    "-m self_supervised train moco_v2 --dataset_name digits --encoder_arch timm:test_convnext --transform_crop_size 32 "
    "--mlp_normalization ln --mlp_hidden_dim 32 --dim 16 --K 240 --lr 0.05 --global_batch_size 48 --max_epochs 40 "
    "--seed 0 --evaluations none --logger [] --num_data_workers 0 --accelerator cpu --precision 64-true "
    "--checkpoint_every_n_steps 10 --resume auto"
)
ELASTIC = "--nnodes 1:4 --nproc_per_node 1 --max_restarts 1000 --rdzv_backend c10d --local_addr 127.0.0.1"
WAITING = "last_call_timeout=3,keep_alive_interval=2,keep_alive_max_attempt=3"
BEGUN = "images per optimizer step"  # the first process prints it at each start


class Nodes:
    """One to four nodes of one training, each an agent of torchrun with a process of its own."""

    def __init__(self, programs: Programs, out: Path):
        self.programs, self.out, self.port = programs, out, processes.free_port()
        self.agents: dict[int, subprocess.Popen] = {}

    def join(self, node: int) -> None:
        at = ["--rdzv_endpoint", f"127.0.0.1:{self.port}", "--rdzv_id", self.out.name]
        at += ["--rdzv_conf", f"is_host={node == 0},{WAITING}"]  # on one machine, any could be the host
        command = [*TORCHRUN, *ELASTIC.split(), *at, *TRAINING.split(), "--out", self.out]
        self.programs.start(command, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1)
        self.agents[node] = self.programs.running[-1]

    def kill(self, node: int, whole: bool) -> None:
        """Kill the process of a node, or the whole node, which is then missing."""
        agent = self.agents[node].pid
        found = list(map(int, Path(f"/proc/{agent}/task/{agent}/children").read_text().split()))
        for process in [agent] * whole + found:
            os.kill(process, signal.SIGKILL)
        if whole:
            self.agents.pop(node).wait()

    def begun(self) -> int:
        return self.programs.outputs().count(BEGUN)

    def has_ended(self) -> bool:
        """Whether the training is complete, or the first node, at which the others meet, has ended. It is never lost,
        only its process. After the training, agents wait for minutes for one that was killed just before."""
        results = self.out / "results.json"
        is_complete = results.exists() and "verdict" in results.read_text()
        return is_complete or self.agents[0].poll() is not None

    def fail_until(self, end: float, rng: random.Random) -> list[float]:
        """Lose a process or a node every 20 to 40 seconds until a time or the end of the training. Returns the seconds
        from each failure to the next start of the training."""
        recoveries = [0.0]
        wait(lambda: self.begun() > 0, 120)
        while not self.has_ended() and time.monotonic() < end + 300:
            wait(self.has_ended, rng.uniform(*SECONDS_BETWEEN) - recoveries[-1])
            if self.has_ended() or time.monotonic() > end:  # the rest of the training is left alone
                continue
            before = self.begun()
            missing = set(range(4)) - set(self.agents)
            if missing and rng.random() < 0.5:
                self.join(min(missing))
            whole = len(self.agents) > 1 and rng.random() < 0.5
            self.kill(rng.choice([node for node in self.agents if node or not whole]), whole)
            recoveries.append(wait(lambda before=before: self.begun() > before or self.has_ended(), 120))
        return recoveries[1:]


def wait(happened: Callable[[], bool], seconds: float) -> float:
    """Return the seconds until it happened, or the limit."""
    start = time.monotonic()
    while not happened() and time.monotonic() - start < seconds:
        time.sleep(0.1)
    return time.monotonic() - start


@pytest.mark.skipif(LONG == 1, reason="takes 15 minutes: with LONG=2 in the environment")
def test_torchrun_loses_processes_and_nodes(tmp_path):
    """The number of processes wanders between one and four; the training is repeated until the time is over."""
    rng, recoveries, worlds, n_runs = random.Random(0), [], set(), 0
    whole = Programs(tmp_path)
    whole.start([*TRAINING.split(), "--out", tmp_path / "whole"])
    whole.wait(600)
    expected = read_checkpoint(tmp_path / "whole" / "pretrained.ckpt")
    end = time.monotonic() + 60 * MINUTES
    while time.monotonic() < end:
        n_runs += 1
        (tmp_path / str(n_runs)).mkdir()
        nodes = Nodes(Programs(tmp_path / str(n_runs)), tmp_path / f"run_{n_runs}")
        try:
            for node in range(1 + n_runs % 4):  # others join later
                nodes.join(node)
            recoveries += nodes.fail_until(end, rng)
            assert nodes.agents[0].poll() in (None, 0), nodes.programs.outputs()[-5000:]
        finally:
            nodes.programs.stop()
        worlds |= set(re.findall(r"(\d) \(processes\)", nodes.programs.outputs()))
        found = read_checkpoint(nodes.out / "pretrained.ckpt")
        assert found["global_step"] == expected["global_step"]
        for name, value in expected["state_dict"].items():
            torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-5, atol=1e-5, msg=name)
    recoveries.sort()
    print(
        f"\n{len(recoveries)} failures in {MINUTES} minutes; {n_runs} runs end with the weights of one that was never "
        f"interrupted; numbers of processes: {', '.join(sorted(worlds))}; seconds from a failure to the next start of "
        f"the training: median {recoveries[len(recoveries) // 2]:.0f}, longest {recoveries[-1]:.0f}"
    )
    assert len(recoveries) > MINUTES and len(worlds) > 1
