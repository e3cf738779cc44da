"""Threads on a machine that other programs use, against a busy process and the counts of a made /proc/stat."""

import pytest
import torch

from self_supervised import threads

STAT = """cpu  0 0 0 0 0 0 0 0 0 0
cpu0 {} 0 0 {} 0 0 0 {} 0 0
cpu1 0 0 0 {} 0 0 0 0 0 0
intr 5 1
"""


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1})
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def watch(monkeypatch, tmp_path, user: int, steal: int, ticks: int = 30) -> None:
    """Core 0 is used for `user` + `steal` of `ticks`, while core 1 is idle."""
    clock = tmp_path / "stat"
    clock.write_text(STAT.format(100, 100, 0, 200))
    later = STAT.format(100 + user, 100 + ticks - user - steal, steal, 200 + ticks)
    monkeypatch.setattr(threads, "CLOCK", clock)
    monkeypatch.setattr(threads.time, "sleep", lambda _: clock.write_text(later))


@pytest.mark.parametrize(("user", "steal", "expected"), [(0, 0, 2), (10, 0, 2), (30, 0, 1), (0, 28, 1)])
def test_threads_are_as_many_as_free_cores(monkeypatch, tmp_path, two_threads, user, steal, expected):
    watch(monkeypatch, tmp_path, user, steal)
    cores, free = threads.free_cores()
    assert cores == 2 and free == pytest.approx(2 - (user + steal) / 30)
    watch(monkeypatch, tmp_path, user, steal)
    threads.use_free_cores()
    assert torch.get_num_threads() == expected


def test_a_given_number_of_threads_is_obeyed(monkeypatch, tmp_path, two_threads):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    watch(monkeypatch, tmp_path, 30, 0)
    threads.use_free_cores()
    assert torch.get_num_threads() == 2


@pytest.mark.skipif(not threads.CLOCK.exists(), reason="only Linux tells how busy each core is")
def test_cores_of_this_machine_are_found():
    cores, free = threads.free_cores()
    assert cores == len(threads.os.sched_getaffinity(0)) and 0 <= free <= cores
