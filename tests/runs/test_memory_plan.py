"""The memory plan proposes what was measured to fit."""

import re

import processes
import pytest

from model_params import PRESETS
from self_supervised import train
from self_supervised.runs import memory_plan
from self_supervised.runs.memory_plan import Measured, print_memory_plan
from self_supervised.runs.run_options import RunOptions, bytes_of


@pytest.mark.parametrize(("text", "expected"), [("8GB", 8e9), ("7.5 GiB", 7.5 * 2**30), ("900MB", 9e8), ("12B", 12)])
def test_sizes_are_read(text, expected):
    assert bytes_of(text) == expected


@pytest.mark.parametrize("text", ["8", "8Gb", "much", "-1GB", "8..GB"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="must be a size in bytes, such as 8GB"):
        bytes_of(text)
    with pytest.raises(ValueError, match="must be a size in bytes, such as 8GB"):  # before the data are opened
        RunOptions(dry_run=True, fit_memory=text)


def plan(monkeypatch, capsys, limit: str, memory) -> tuple[str, list]:
    """Print the plan of a batch of 2,000 images with a memory of `memory(images, encoded at once)`; return the text and
    what was measured."""
    tried = []

    def measured(params, *_):
        tried.append((params.batch_size, params.micro_batch_size or params.batch_size))
        return Measured(memory(*tried[-1]), 1.0)

    monkeypatch.setattr(memory_plan, "in_own_process", measured)
    params = PRESETS["simclr"](dataset_name="cifar10", global_batch_size=4000)
    options = RunOptions(dry_run=True, fit_memory=limit, accumulate_grad_batches=2)
    print_memory_plan(params, options)
    return capsys.readouterr().out, tried


def test_the_largest_part_that_fits(monkeypatch, capsys):
    """A process of 1 GB, and 10 MB for each image: 512 images need 6.1 GB, 1,024 need 11.2 GB."""
    out, tried = plan(monkeypatch, capsys, "8GB", lambda batch, part: int(1e9 + 1e7 * part))
    assert tried == [(64, 64), (128, 128), (2000, 512)] and "2,000" in out and "6.12 GB" in out
    assert "--micro_batch_size 512 fits: the same loss of 2,000 images, encoded in 4 parts" in out
    assert "--global_batch_size 4000 --accumulate_grad_batches 8: less time, but only the 500 images" in out


def test_no_accumulation_is_proposed_that_leaves_a_fraction_of_a_part():
    assert "--global_batch_size 4000 --accumulate_grad_batches 8" in memory_plan.proposal(2000, 512, 2)
    assert all("--accumulate" not in memory_plan.proposal(images, part, 1) for images, part in ((4099, 512), (254, 64)))


def test_a_guess_that_needs_more_is_halved(monkeypatch, capsys):
    """Views and projections of the whole batch, which small batches do not show; and a process that the system ends."""
    of_all = lambda batch, part: None if part > 256 else int(1e9 + 1e7 * part + 1e6 * batch)  # noqa: E731
    out, tried = plan(monkeypatch, capsys, "8GB", of_all)
    assert tried[2:] == [(2000, 512), (2000, 256)] and "not enough" in out and "--micro_batch_size 256 fits" in out


def test_a_whole_batch_that_needs_more_is_divided_by_powers_of_two(monkeypatch, capsys):
    out, tried = plan(monkeypatch, capsys, "100GB", lambda batch, part: None if part > 1500 else int(1e9 + 1e7 * part))
    assert tried[2:] == [(2000, 2000), (2000, 1024)] and "--micro_batch_size 1024 fits" in out


def test_a_batch_that_fits(monkeypatch, capsys):
    out, tried = plan(monkeypatch, capsys, "100GB", lambda batch, part: int(1e9 + 1e7 * part))
    assert tried[-1] == (2000, 2000) and "The batch of 2,000 images fits" in out


def test_a_network_that_does_not_fit(monkeypatch, capsys):
    with pytest.raises(ValueError, match="fit_memory=1GB: 3 images need more"):
        plan(monkeypatch, capsys, "1GB", lambda batch, part: int(2e9 + 1e7 * part))


def test_refusals():
    with pytest.raises(ValueError, match="Pass --dry_run, too"):
        RunOptions(fit_memory="8GB")
    options = RunOptions(dry_run=True, fit_memory="8GB", devices=2)
    with pytest.raises(ValueError, match="measures a single process"):
        print_memory_plan(PRESETS["simclr"](dataset_name="digits"), options)


def test_the_command(capfd, monkeypatch):
    """In a process of its own, whose messages are not shown."""
    processes.start_server()
    monkeypatch.setattr(memory_plan.multiprocessing, "get_context", lambda _: processes.CONTEXT)  # starts faster
    line = "simclr --dataset_name digits --encoder_arch small_cnn --batch_size 64 --num_data_workers 0 --dry_run"
    train.main([*line.split(), "--fit_memory", "100GB"])
    out = capfd.readouterr().out
    peak = float(re.search(r"64 +│ 64 +│ ([\d.]+) GB", out)[1])
    assert 0.2 < peak < 10 and "The batch of 64 images fits" in out and "TPU" not in out
