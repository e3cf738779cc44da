"""Every way to launch multiple processes ends with the same weights, and the Trainer's options take effect."""

import json
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import processes
import pytest
import pytorch_lightning as pl
import torch
import videos
from conftest import LONG
from pytorch_lightning.strategies import DDPStrategy, ModelParallelStrategy
from test_ddp import IMAGES, Batches, assert_close, encoder
from test_ddp import SMALL as TINY
from test_ddp import trainer as trainer_of

from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.runs.run_options import RunOptions
from self_supervised.training.checkpoints import read_checkpoint

ROOT = Path(__file__).parents[2]
LONGEST = 300  # seconds: two programs import and train in 20, and in over 100 beside other loads
SCRIPT = '''
import atexit
import faulthandler
import json
import sys
import time
from pathlib import Path

faulthandler.dump_traceback_later(320, exit=True)  # the test that started it may be gone

import pytorch_lightning as pl
import torch
from torch import nn

from self_supervised.training.checkpoints import Checkpoints, newest
from moco import SelfSupervisedMethod
from model_params import SCEParams

folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])


@atexit.register  # before the training, so that it runs after what the training registers
def tell_whether_the_group_is_left():
    (folder / f"group_left_{torch.distributed.is_initialized()}").touch()


class Pause(pl.Callback):
    """Wait after three steps until the test lets the program continue."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and options.get("pause"):
            (folder / f"paused_{trainer.global_rank}").touch()
            while not (folder / "go_on").exists():
                time.sleep(0.01)


if __name__ == "__main__":
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
    params = SCEParams(  # gathers negatives, and keys for its queue
        dataset_name="digits", batch_size=options.get("batch_size", 8), mlp_normalization="ln",
        mlp_hidden_dim=12, dim=6, K=64, lr=0.05,
        evaluations=[], seed=0,
    )
    model = SelfSupervisedMethod(params, encoder=encoder)
    trainer = pl.Trainer(
        accelerator="cpu", strategy="ddp", devices=options["devices"], num_nodes=options.get("num_nodes", 1),
        max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, callbacks=[Checkpoints(folder / "run", every_n_steps=None), Pause()],
    )
    trainer.fit(model, ckpt_path=newest(folder / "run"))
    cluster = type(trainer.strategy.cluster_environment).__name__
    torch.save({"weights": model.state_dict(), "steps": trainer.global_step, "cluster": cluster,
                "world": trainer.world_size}, folder / f"final_{trainer.global_rank}.pt")
'''
FORCE = "2 (processes) x 1 (accumulated batches) x 8 (images) = 16 images per optimizer step; 6 steps"


def outputs(folder: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(folder.rglob("output_*.txt")))


class Programs:
    """Programs that are started in a folder, and ended with all of their processes at the end of the test."""

    def __init__(self, folder: Path):
        self.folder, self.running = folder, []
        self.script = folder / "script.py"
        self.script.write_text(SCRIPT)

    def start(self, command: list, **variables: object) -> None:
        of_launchers = ("SLURM_", "TORCHELASTIC_", "PL_", "MASTER_", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(of_launchers)}
        clean |= {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        output = (self.folder / f"output_{len(self.running)}.txt").open("w")
        self.running.append(
            subprocess.Popen(
                list(map(str, [sys.executable, *command])), cwd=self.folder, stdout=output, stderr=subprocess.STDOUT,
                env=clean | {name: str(value) for name, value in variables.items()}, start_new_session=True,
            )
        )  # fmt: skip
        output.close()

    def outputs(self) -> str:
        return outputs(self.folder)

    def wait(self, seconds: float = LONGEST, status: int = 0) -> None:
        """Wait until all have ended, and check their status."""
        end = time.monotonic() + seconds
        for process in self.running:
            try:
                process.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.stop()
        assert [process.returncode for process in self.running] == [status] * len(self.running), self.outputs()[-5000:]
        self.running.clear()

    def stop(self) -> None:
        """End the programs, with SIGTERM first: torchrun's own processes are in other groups, and it ends them."""
        for number, patience in ((signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            for process in self.running:
                if process.poll() is None:
                    os.killpg(process.pid, number)
            end = time.monotonic() + patience
            while any(process.poll() is None for process in self.running) and time.monotonic() < end:
                time.sleep(0.05)

    def found(self) -> list[dict]:
        return found(self.folder)


@pytest.fixture
def programs(tmp_path):
    programs = Programs(tmp_path)
    yield programs
    programs.stop()


def as_program(rank: int, program: str, arguments: list[str]) -> None:
    """Run a file, or a module, as if it had been started."""
    sys.argv = [program, *arguments]
    for handler in logging.getLogger("pytorch_lightning").handlers:
        handler.setStream(sys.stderr)  # of this process, not of the one that was forked
    run = runpy.run_path if program.endswith(".py") else runpy.run_module
    run(program, run_name="__main__")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Return the weights of the same program on two processes that are started as in test_ddp.py."""
    folder = tmp_path_factory.mktemp("reference")
    script = Programs(folder).script
    processes.run(as_program, 2, folder, str(script), [str(folder), '{"devices": 2}'])
    both = found(folder)
    assert all(process["steps"] == 6 and process["world"] == 2 for process in both)
    return both[0]["weights"]


def found(folder: Path) -> list[dict]:
    return [torch.load(folder / f"final_{rank}.pt") for rank in range(2)]


def assert_same(found: list[dict], weights: dict, cluster: str | None = None) -> None:
    for process in found:
        assert (process["steps"], process["world"]) == (6, 2) and process["cluster"] == (cluster or process["cluster"])
        assert process["weights"].keys() == weights.keys()
        for name, value in weights.items():
            assert torch.equal(process["weights"][name], value), name


TORCHRUN = ["-m", "torch.distributed.run"]
LAUNCHERS = {"script": [], "torchrun": [*TORCHRUN, "--standalone", "--nproc_per_node", 2]}


def start(programs: Programs, launcher: str, **options: object) -> None:
    """Without torchrun, Lightning starts the second process on a node."""
    port = {"MASTER_PORT": processes.free_port()} if launcher == "script" else {}
    options = json.dumps({"devices": 2, **options})
    programs.start([*LAUNCHERS[launcher], programs.script, programs.folder, options], **port)


# A signal after step 3: at the next batch the processes tell each other, and stop at the one after that.
SAVED = "step_000000004.ckpt"


def wait_for_pause(folder: Path, running: Callable[[], bool], seconds: float = LONGEST) -> None:
    end = time.monotonic() + seconds
    while not all((folder / f"paused_{rank}").exists() for rank in range(2)):
        assert time.monotonic() < end and running(), outputs(folder)[-5000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_devices_2(programs, weights):
    start(programs, "script")
    programs.wait()
    assert_same(programs.found(), weights, "LightningEnvironment")
    assert programs.outputs().count(FORCE) == 1  # rank 0 prints the effective settings once
    # threads of a group that is left can abort a program at its end
    assert [path.name for path in programs.folder.glob("group_left_*")] == ["group_left_False"]


@pytest.mark.slow
def test_torchrun_on_one_node(programs, weights):
    start(programs, "torchrun")
    programs.wait()
    assert_same(programs.found(), weights, "TorchElasticEnvironment")
    assert programs.outputs().count(FORCE) == 1


@pytest.mark.skipif(LONG == 1, reason="with LONG=2 in the environment; one node, and two with SLURM, are always tested")
def test_torchrun_on_two_nodes(programs, weights):
    """Each node has its own address, like a machine of its own."""
    port = processes.free_port()
    for node, address in enumerate(("127.0.0.1", "127.0.0.2")):
        torchrun = [*TORCHRUN, "--nnodes", 2, "--node_rank", node, "--nproc_per_node", 1, "--local_addr", address]
        torchrun += ["--master_addr", "127.0.0.1", "--master_port", port]
        programs.start([*torchrun, programs.script, programs.folder, '{"devices": 1, "num_nodes": 2}'])
    programs.wait()
    assert_same(programs.found(), weights, "TorchElasticEnvironment")
    assert programs.outputs().count(FORCE) == 1


@pytest.mark.skipif(LONG == 1, reason="with LONG=2 in the environment")
@pytest.mark.parametrize("launcher, status", [("script", 0), ("torchrun", 1)])
def test_sigterm_to_the_launcher(launcher, status, programs, weights, tmp_path):
    """The launcher forwards the signal, or the processes tell each other; torchrun then ends with status 1."""
    start(programs, launcher, pause=True)
    wait_for_pause(tmp_path, lambda: all(process.poll() is None for process in programs.running))
    programs.running[0].send_signal(signal.SIGTERM)
    time.sleep(0.2)
    (tmp_path / "go_on").touch()
    programs.wait(status=status)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SAVED]
    start(programs, launcher)
    programs.wait()
    assert_same(programs.found(), weights)


# ---- SLURM ----


def slurm_job() -> int:
    """Return a job number with a free port: Lightning uses 15000 plus the last four digits."""
    for job in range(120000 + os.getpid() % 5000, 130000):
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 15000 + job % 10000)):
                return job
    raise AssertionError("no port is free")


def srun(folder: Path, job: int, program: str, arguments: list[str], nodes: int = 2, **variables: str) -> list:
    """Start nodes with one task each, with the variables that srun sets."""
    of_the_job = {"JOB_ID": job, "JOB_NAME": "train", "NTASKS": nodes, "NTASKS_PER_NODE": 1, "NNODES": nodes}
    of_the_job |= {"NODELIST": f"127.0.0.[1-{nodes}]", "JOB_NODELIST": f"127.0.0.[1-{nodes}]", "LOCALID": 0}
    started = []
    for task in range(nodes):
        given = {f"SLURM_{name}": str(value) for name, value in {**of_the_job, "PROCID": task, "NODEID": task}.items()}
        started += processes.launch(
            as_program, 1, folder / f"task_{task}", program, arguments, variables=given | variables
        )
    return started


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [2, 1])
def test_slurm_time_is_up_requeued_and_on_to_the_end(nodes, programs, weights, tmp_path):
    """SIGUSR1 to every task, as with `--signal=SIGUSR1@120`: saved, requeued once, status 0; then resumed on the same
    number of nodes, or on another."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "queued"}\n')
    scontrol.chmod(0o755)
    job, path = slurm_job(), f"{scontrol.parent}:{os.environ['PATH']}"

    def start(nodes: int, **options) -> list:
        arguments = [
            str(tmp_path),
            json.dumps({"devices": 1, "num_nodes": nodes, "batch_size": 16 // nodes, **options}),
        ]
        return srun(tmp_path, job, str(programs.script), arguments, nodes, PATH=path)

    running = start(2, pause=True)
    wait_for_pause(tmp_path, lambda: all(process.is_alive() for process in running))
    for process in running:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.2)
    (tmp_path / "go_on").touch()
    assert processes.join(running) == [0, 0], outputs(tmp_path)[-5000:]
    assert (tmp_path / "queued").read_text() == f"requeue {job}\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == [SAVED]
    assert read_checkpoint(tmp_path / "run" / SAVED)["global_step"] == 4
    assert not list(tmp_path.glob("final_*.pt")) and not list(tmp_path.glob("hpc_ckpt*"))

    assert processes.join(start(nodes)) == [0] * nodes, outputs(tmp_path)[-5000:]
    assert (tmp_path / "queued").read_text().count("\n") == 1
    if nodes == 2:
        assert_same(found(tmp_path), weights, "SLURMEnvironment")
        assert outputs(tmp_path).count(FORCE) == 1  # by the second start
    else:
        one = torch.load(tmp_path / "final_0.pt")
        assert (one["steps"], one["world"], one["cluster"]) == (6, 1, "SLURMEnvironment")
        torch.testing.assert_close(one["weights"], weights, rtol=1e-5, atol=1e-6)


def expanded(script: str, arguments: list[str], **variables: str) -> list[str]:
    """Return $DATA_PATH, then the line with srun as bash expands it."""
    told = f'srun() {{ printf \'%s\\n\' "$DATA_PATH" "$@"; }}\n{script}'
    command, environment = ["bash", "-ec", told, "video.sh", *arguments], {**os.environ, **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
def test_the_slurm_script_for_videos(tmp_path):
    """The script of docs/distributed.md, word for word, with its variables and a few options to make it small."""
    blocks = (ROOT / "docs" / "distributed.md").read_text().split("```bash\n")[1:]
    (script,) = (block.split("```")[0] for block in blocks if "sce_video --seed" in block)
    for split in ("train", "val"):
        for name in ("a/0", "a/1", "b/0", "b/1"):
            videos.write_frames(tmp_path / "data" / "kinetics" / split / name, n=10, size=(36, 36))
    small = "--encoder_arch s3d --transform_crop_size 32 --K 8 --global_batch_size 4 --max_epochs 1 --warmup_epochs 0"
    small += " --evaluations knn --precision 32-true --sync_batchnorm false --logger csv"  # there is no GPU
    given = {"seed": "7", "workers": "0", "devices": "1", "output_dir": str(tmp_path / "run")}
    given |= {"dataset_dir": str(tmp_path / "data"), "SLURM_JOB_NUM_NODES": "2"}
    data_path, option, program, *arguments = expanded(script, small.split(), **given)
    assert (option, program, arguments[0]) == ("--kill-on-bad-exit=1", "self-supervised", "train")
    started = srun(tmp_path, slurm_job(), "self_supervised", arguments, DATA_PATH=data_path)
    assert processes.join(started) == [0, 0], outputs(tmp_path)[-5000:]
    assert "2 (processes) x 1 (accumulated batches) x 2 (videos) = 4 videos per optimizer step" in outputs(tmp_path)
    found = read_checkpoint(tmp_path / "run" / "pretrained.ckpt")
    assert found["global_step"] == 1 and found["hyper_parameters"]["seed"] == 7
    assert found["hyper_parameters"]["num_data_workers"] == 0
    assert "valid_knn20_acc" in json.loads((tmp_path / "run" / "results.json").read_text())["trained encoder"]


# ---- batch sizes, accumulated batches, learning rates ----


class First(pl.Callback):
    """Callback that records the size of the first batch and the learning rate of the optimizer."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 0:
            self.lr, self.images = trainer.optimizers[0].param_groups[0]["lr"], len(batch[0][0])


def own_loader() -> torch.utils.data.DataLoader:
    images = torch.randint(256, (96, 1, 8, 8), dtype=torch.uint8)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=6, drop_last=True)


RUNS = {  # accumulated batches, settings; images per process and batch, and learning rate, on one process and on two
    "batch size": (2, {"batch_size": 8}, (8, 0.05), (8, 0.05)),
    "global": (2, {"global_batch_size": 32}, (16, 0.05), (8, 0.05)),
    "linear": (2, {"batch_size": 8, "lr_scaling": "linear", "lr_batch_size": 4}, (8, 0.2), (8, 0.4)),
    "root": (1, {"batch_size": 8, "lr_scaling": "sqrt", "lr_batch_size": 4}, (8, 0.05 * 2**0.5), (8, 0.1)),
    "both": (2, {"global_batch_size": 32, "lr_scaling": "linear", "lr_batch_size": 64}, (16, 0.025), (8, 0.025)),
    "own loader": (1, {"batch_size": 8, "lr_scaling": "linear", "lr_batch_size": 4}, (6, 0.075), (6, 0.15)),
}  # fmt: skip


def settings_in_force(rank: int, world: int) -> dict:
    found = {}
    for name, (accumulated, fields, *_) in RUNS.items():
        params = PRESETS["moco_v2"](**{**TINY, "evaluations": [], **fields})
        first = First()
        fit = trainer_of(world, callbacks=[first], accumulate_grad_batches=accumulated, limit_train_batches=4)
        loader = (own_loader(),) if name == "own loader" else ()
        fit.fit(SelfSupervisedMethod(params, encoder=encoder()), *loader)
        found[name] = first.images, first.lr
    params = PRESETS["moco_v2"](**{**TINY, "global_batch_size": 30})
    try:
        trainer_of(world, accumulate_grad_batches=4).fit(SelfSupervisedMethod(params, encoder=encoder()))
    except ValueError as error:
        found["refused"] = str(error)
    return found


@pytest.mark.parametrize("world", [1, 2])
def test_batch_size_and_learning_rate_are_as_promised(world, tmp_path):
    for process in processes.run(settings_in_force, world, tmp_path, world):
        for name, (_, _, *expected) in RUNS.items():
            assert process[name] == pytest.approx(expected[world - 1], rel=1e-6), name
        shares = 4 * world
        assert f"global_batch_size=30 is not divisible by {shares}" in process["refused"]
        assert f"Choose a multiple of {shares}" in process["refused"]


ACCUMULATED, STEPS = 2, 3


def accumulate(rank: int, world: int) -> dict:
    """Train every preset on two accumulated batches of `IMAGES`; BYOL (independent images) also on the joined one.

    In float64: VISReg's gradient divides by standard deviations, and AdamW by gradients, which enlarges rounding.
    """
    g = torch.Generator().manual_seed(0)
    views = [[torch.randn(IMAGES, 1, 8, 8, generator=g) for _ in range(2)] for _ in range(ACCUMULATED * STEPS)]
    share = slice(rank, None, world)
    labels = torch.arange(IMAGES)[share] // 3
    runs = {name: ([([view[share] for view in batch], labels) for batch in views], ACCUMULATED) for name in PRESETS}
    if world == 1:
        pairs = zip(views[::2], views[1::2], strict=True)
        runs["byol at once"] = [[torch.cat(both) for both in zip(*pair, strict=True)] for pair in pairs], 1
    found = {}
    for name, (batches, accumulated) in runs.items():
        preset = PRESETS[name.split()[0]]
        params = preset(**{**TINY, "mlp_normalization": "ln", "evaluations": []})
        torch.manual_seed(1)
        model = SelfSupervisedMethod(params, encoder=encoder())
        fit = trainer_of(world, accumulate_grad_batches=accumulated, precision="64-true")
        fit.fit(model, Batches(batches))
        assert fit.global_step == STEPS
        found[name] = model.state_dict()
    return found


@pytest.mark.slow
def test_accumulated_batches_on_two_processes_equal_those_on_one(tmp_path):
    (alone,) = processes.run(accumulate, 1, tmp_path / "1", 1)
    assert_close(alone["byol"], alone["byol at once"])
    for process in processes.run(accumulate, 2, tmp_path / "2", 2):
        for name in PRESETS:
            assert_close(process[name], alone[name])


OF_EACH_KIND = PRESETS if LONG > 1 else ("moco_v2", "simclr", "byol", "vicreg", "swav", "dino", "nnclr", "lejepa")
STRATEGIES = ({}, {"static_graph": True, "gradient_as_bucket_view": True}, {"find_unused_parameters": True})


def strategies(rank: int, world: int) -> dict:
    found = {}
    for name in OF_EACH_KIND:
        for index, options in enumerate(STRATEGIES):
            g = torch.Generator().manual_seed(rank)
            views = [[torch.randn(8, 1, 8, 8, generator=g) for _ in range(2)] for _ in range(STEPS)]
            batches = [(pair, torch.arange(8) // 3) for pair in views]
            torch.manual_seed(1)
            params = PRESETS[name](**{**TINY, "mlp_normalization": "ln", "evaluations": []})
            model = SelfSupervisedMethod(params, encoder=encoder())
            trainer_of(world, strategy=DDPStrategy(**options)).fit(model, Batches(batches))
            found[name, index] = model.state_dict()
    return found


@pytest.mark.slow
def test_options_of_ddp_change_nothing(tmp_path):
    """A preset of each kind uses every parameter in every step: a static graph is valid, without a search for unused
    ones. (For all presets: `test_trains_every_part_saves_and_reloads`.)"""
    for process in processes.run(strategies, 2, tmp_path, 2):
        for name in OF_EACH_KIND:
            for index in range(1, len(STRATEGIES)):
                for key, value in process[name, 0].items():
                    assert torch.equal(process[name, index][key], value), (name, STRATEGIES[index], key)


# ---- precision, and what needs a GPU ----


def half_precision(scale: float) -> pl.plugins.precision.MixedPrecision:
    """float16 with a gradient scaler, as on a GPU; `precision="16-mixed"` alone means bfloat16 on a CPU."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return pl.plugins.precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.filterwarnings("ignore:collapse")
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_every_preset_in_mixed_precision(precision, name, small, trainer):
    half = precision == "16-mixed"
    plugin = half_precision(2.0**10) if half else None
    model = SelfSupervisedMethod(small(name, evaluations=[]), encoder=encoder())
    kinds, losses = set(), []
    model.model[0].register_forward_hook(lambda module, inputs, output: kinds.add(output.dtype))
    model.on_train_batch_end = lambda outputs, batch, index: losses.append(outputs["loss"])
    before = {key: value.clone() for key, value in model.named_parameters()}
    options = {"plugins": [plugin]} if half else {"precision": precision}
    fit = trainer(limit_train_batches=3, **options)
    fit.fit(model)
    assert fit.global_step == len(losses) == 3 and torch.stack(losses).isfinite().all()
    assert kinds == {torch.float16 if half else torch.bfloat16}
    for key, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all(), key
        assert parameter.ndim == 1 or not torch.equal(parameter, before[key]), key
    assert not half or plugin.scaler.get_scale() == 2.0**10  # no step was skipped


class Norms(pl.Callback):
    """Callback that records the norm of all gradients after the backward pass and before the optimizer step."""

    def norm(self, module) -> torch.Tensor:
        return torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()

    def on_after_backward(self, trainer, module):
        self.scaled = self.norm(module)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.unscaled = self.norm(module)


def test_lars_gets_gradients_without_the_scale(small, trainer):
    """LARS's adaptation hides a scale of the gradients; weight decay and parameters that are not adapted reveal it."""
    found, norms = {}, {}
    for scale in (2.0**2, 2.0**10):
        torch.manual_seed(1)
        params = small("byol", evaluations=[], mlp_normalization="ln", lars_eta=0.1, weight_decay=0.1)
        model, norms[scale] = SelfSupervisedMethod(params, encoder=encoder()), Norms()
        before = {name: value.clone() for name, value in model.named_parameters() if value.requires_grad}
        trainer(limit_train_batches=1, plugins=[half_precision(scale)], callbacks=[norms[scale]]).fit(model)
        found[scale] = model.state_dict()
    small_scale, large_scale = norms.values()
    assert (large_scale.scaled / small_scale.scaled).item() == pytest.approx(2.0**8, rel=0.01)
    assert (large_scale.unscaled / small_scale.unscaled).item() == pytest.approx(1.0, rel=0.01)
    for name, value in found[2.0**2].items():
        assert torch.allclose(found[2.0**10][name], value, rtol=1e-3, atol=1e-4), name
    moved = [(found[2.0**2][name] - value).abs().max() for name, value in before.items()]
    assert torch.stack(moved).median() > 1e-3


def test_strategies_that_divide_weights_are_refused(small):
    for strategy in ("fsdp", "fsdp_cpu_offload", "deepspeed_stage_2"):
        with pytest.raises(ValueError, match="divides the weights .* Use strategy='ddp', with activation"):
            RunOptions(strategy=strategy)
    fit = pl.Trainer(strategy=ModelParallelStrategy(), accelerator="cpu", devices=1, logger=False, max_steps=1)
    with pytest.raises(ValueError, match="strategy='ModelParallelStrategy' divides the weights"):
        fit.fit(SelfSupervisedMethod(small("simclr")))
    torch.distributed.destroy_process_group()  # Lightning has begun it
