"""How programs end: in one line for what the user or the machine caused, with the stack for a fault of ours."""

import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

import train_blog
from benchmarks import moving_photographs
from self_supervised import classify, evaluate, program, train
from self_supervised.__main__ import COMMANDS
from self_supervised.__main__ import main as entry
from self_supervised.embeddings import embed, nearest
from self_supervised.embeddings import projection as embedding_map
from self_supervised.exports import export
from self_supervised.report import compare, curves, report

ROOT = Path(__file__).parents[1]


def ended(error: BaseException, *others) -> SystemExit:
    @program.one_line_errors(*others)
    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        main()
    return end.value


OF_A_LOST_PROCESS = [
    RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer. GLHF!"),
    RuntimeError("[gloo/transport/tcp/pair.cc:519] Write error [127.0.0.1]:1: Broken pipe"),
    RuntimeError(
        "[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
    ),
    torch.distributed.DistBackendError(
        "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version "
        "2.27.5\nncclRemoteError: A call failed possibly due to a network error or a remote process exiting"
    ),
    torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("lr=0: too small.\n  Choose more"),
        OSError(28, "No space left on device", "x.ckpt"),
        ConnectionError("no route"),
        ImportError("No module named 'timm'"),
        FloatingPointError("the loss is nan at step 3"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        *OF_A_LOST_PROCESS,
    ],
)
def test_explained_error_is_one_line(error):
    message = str(ended(error))
    assert message.startswith("error: ") and "\n" not in message and len(message) > len("error: ")


@pytest.mark.parametrize("error", OF_A_LOST_PROCESS)
def test_a_lost_process_is_called_that(error):
    assert str(ended(error)).startswith("error: another process of this training has ended, see its own output (")


def test_notes_are_a_part_of_the_line():
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    error.add_note("the last file that this worker read is a.jpg")
    assert "a.jpg" in str(ended(error))


def test_the_traceback_of_a_worker_is_left_out():
    found = DataLoader([0], num_workers=1, collate_fn=refuse)
    with pytest.raises(ValueError, match="Traceback") as raised:
        next(iter(found))
    assert str(ended(raised.value)) == "error: photos/1.png: no label (ValueError: 7)"


def refuse(_) -> None:
    raise ValueError("photos/1.png: no label (ValueError: 7)")


@pytest.mark.parametrize("error", [AssertionError("ours"), KeyError("ours"), TypeError("ours"), RuntimeError("ours")])
def test_fault_of_the_library_keeps_its_stack(error):
    with pytest.raises(type(error)), program.one_line_errors():
        raise error
    assert str(ended(error, type(error))).endswith(program.message_of(error))


def test_stack_on_request(monkeypatch):
    monkeypatch.setenv(program.SHOW_STACK, "1")
    with pytest.raises(ValueError, match="lr=0"), program.one_line_errors():
        raise ValueError("lr=0")


def test_interrupt_is_130_also_within_lightning(capsys):
    assert ended(KeyboardInterrupt()).code == 130
    with pytest.raises(SystemExit) as end, program.one_line_errors():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)  # as pl.Trainer does
    assert end.value.code == 130
    assert capsys.readouterr().err.count("Ctrl-C") == 2


def test_an_interrupt_of_a_command_is_one_line(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_checkpoint", interrupted)
    with pytest.raises(SystemExit):
        entry(["evaluate", "a.ckpt"])
    assert capsys.readouterr().err.count("Ctrl-C") == 1


def test_one_of_several_processes_prints_the_line(monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert ended(ValueError("lr=0")).code == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)  # from here on, it may be this process's own
    assert "lr=0" in str(ended(ValueError("lr=0")))


def test_reader_that_closes_the_pipe_causes_no_message(monkeypatch, capfd):
    """`command | head -1`"""
    ours, theirs = os.pipe()
    os.close(ours)
    with monkeypatch.context() as patch, os.fdopen(theirs, "w") as stdout:
        patch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end, program.one_line_errors():
            print("x" * 100_000)
    assert end.value.code == 1 and capfd.readouterr().err == ""


@pytest.mark.slow
def test_interrupted_training_ends_in_a_line(tmp_path, digits_path):
    """A real Ctrl-C, while batches are trained on."""
    options = (
        "vicreg --dataset_name digits --encoder_arch shufflenet_v2_x0_5 --max_epochs 500 --warmup_epochs 0 --seed 0"
    )
    options += f" --out {tmp_path / 'run'} --logger csv --data_fraction 0.1 --batch_size 32"
    command = [sys.executable, "-m", "self_supervised", "train", *options.split()]
    environment = {**os.environ, "DATA_PATH": str(digits_path), "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    seen, said = [], {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    listening = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # programs in the background ignore it otherwise
    with subprocess.Popen(command, env=environment, preexec_fn=listening, **said) as process:
        for line in process.stdout:
            seen.append(line)
            if "epoch 2:" in line:  # when the checkpoint of the first one is there
                process.send_signal(signal.SIGINT)
    assert process.returncode == 130, "".join(seen)
    assert "Traceback" not in "".join(seen) and "error: stopped by Ctrl-C" in "".join(seen)
    assert f"the newest checkpoint is {tmp_path / 'run'}" in "".join(seen)
    assert not any(noise in "".join(seen) for noise in (*program.NOISE, ".py:"))
    assert "TPU available: False" in (tmp_path / "run" / "log.txt").read_text()


def test_only_noise_is_hidden_in_the_terminal_and_only_within_the_program():
    """A warning of collapse, unreadable files or an unused GPU, and messages of Lightning."""
    shown = io.StringIO()
    handler = logging.StreamHandler(shown)
    logger = logging.getLogger("pytorch_lightning")
    logger.addHandler(handler)
    earlier = warnings.formatwarning
    advice = "It is recommended to use `self.log('loss', ..., sync_dist=True)` when logging on epoch level"
    with program.one_line_errors():
        for text in ("GPU available: False, used: False", "GPU available: True (cuda), used: True"):
            rank_zero_info(text)
        rank_zero_info("`Trainer.fit` stopped: `max_epochs=2` reached.")
        rank_zero_info("`Trainer.fit` stopped: `max_time` reached.")
        lines = [
            warnings.formatwarning(UserWarning(text), UserWarning, "module.py", 3)
            for text in (advice, "collapse: a\n  is 1", "GPU available but not used.", "2 files could not be read: a")
        ]
    rank_zero_info("GPU available: False")
    logger.removeHandler(handler)
    assert lines == [
        "",
        "warning: collapse: a is 1\n",
        "warning: GPU available but not used.\n",
        "warning: 2 files could not be read: a\n",
    ]
    assert shown.getvalue().splitlines() == [
        "GPU available: True (cuda), used: True",
        "`Trainer.fit` stopped: `max_time` reached.",
        "GPU available: False",
    ]
    assert warnings.formatwarning is earlier


RUN = "--dataset_name digits --encoder_arch shufflenet_v2_x0_5 --logger csv --evaluations [] --seed 0 --warmup_epochs 0"
MISTAKES = {
    "train, not finite": (train, f"vicreg {RUN} --optimizer_name sgd --exclude_matching_parameters_from_lars none"
                          " --out run --weight_decay 0 --mlp_hidden_dim 8 --dim 8 --lr 1000 --max_epochs 30",
                          "not finite|nan"),
    "evaluate, device": (evaluate, "nowhere.ckpt --device nonsense", "device='nonsense'"),
    "evaluate, device that is absent": (evaluate, "nowhere.ckpt --device cuda:77", "device='cuda:77'"),
    "evaluate, out": (evaluate, "nowhere.ckpt --out a_file", "out=a_file"),
    "evaluate, below a file": (evaluate, "nowhere.ckpt --out a_file/x", "out=a_file/x"),
    "evaluate, no checkpoint": (evaluate, "", "CHECKPOINT"),
    "evaluate, nothing there": (evaluate, "nowhere.ckpt", "nowhere.ckpt"),
    "train_blog, out": (train_blog, "--quick --out a_file", "a_file"),
    "train_blog, schedule": (train_blog, "--quick --set max_epochs=5", "epochs=20"),
    "embed": (embed, "nowhere.ckpt . --out x.parquet --device nonsense", "nonsense|nowhere"),
    "embed, extension": (embed, "nowhere.ckpt . --out x.csv", "out=x.csv: must end in .parquet"),
    "classify, extension": (classify, "nowhere.ckpt --apply . --out x.parquet", "out=x.parquet: must end in .csv"),
    "nearest, extension": (nearest, "nowhere.parquet x.png --out x.jpg", "out=x.jpg: must end in .png"),
    "report, extension": (report, "nowhere --out x.pdf", "out=x.pdf: must end in .html"),
    "export, extension": (export, "nowhere.ckpt --format onnx --out x.pt", "Files of onnx end in .onnx"),
    "export": (export, "nowhere.ckpt --format onnx --out x", "nowhere.ckpt"),
    "nearest": (nearest, "nowhere.parquet x.png", "nowhere.parquet"),
    "map": (embedding_map, "nowhere.parquet", "nowhere.parquet"),
    "report": (report, "nowhere", "nowhere"),
    "compare": (compare, "nowhere", "nowhere"),
    "curves": (curves, "nowhere --out x.png", "nowhere"),
    "moving_photographs": (moving_photographs, "a_file", "a_file"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::ResourceWarning")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_in_one_line(mistake, monkeypatch, tmp_path):
    command, arguments, said = MISTAKES[mistake]
    (tmp_path / "a_file").write_text("")
    monkeypatch.setattr(sys, "argv", [f"{command.__name__}.py", *arguments.split()])
    with pytest.raises(SystemExit, match=said) as end:
        command.main()
    assert str(end.value).startswith("error: ") and "\n" not in str(end.value)
    if mistake == "train, not finite":
        assert re.search("Traceback.*FloatingPointError", (tmp_path / "run" / "log.txt").read_text(), re.DOTALL)


def test_every_program_ends_this_way():
    """Nothing else may turn errors into exits."""
    programs = [importlib.import_module(module) for module, _ in COMMANDS.values()]
    programs += [train_blog, moving_photographs]
    assert [module.__name__ for module in programs if not hasattr(module.main, "__wrapped__")] == []
