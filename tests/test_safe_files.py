import os
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import full_disk

from self_supervised import safe_files
from self_supervised.safe_files import atomic_file, atomic_folder, atomic_write, check_file, check_folder, rows_of
from self_supervised.torch_files import safe_load


def test_a_full_disk_is_named_and_leaves_the_earlier_file(tmp_path):
    atomic_write(tmp_path / "a.txt", "earlier")
    with full_disk(1000), pytest.raises(OSError, match="a.txt cannot be written"):
        atomic_write(tmp_path / "a.txt", "x" * 10_000)
    with (
        full_disk(1000),
        pytest.raises(OSError, match="folder cannot be written"),
        atomic_folder(tmp_path / "folder") as new,
    ):
        np.save(new / "a.npy", np.zeros(10_000))
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "earlier"


@pytest.mark.parametrize("check", [check_folder, check_file])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_url_is_refused_as_a_place_to_write_to(check, kind):
    with pytest.raises(ValueError, match=r"out=s3:/.*local or mounted"):
        check("out", kind("s3://bucket/run"))


def test_a_name_of_many_bytes(tmp_path):
    atomic_write(tmp_path / f"{chr(0x5716) * 80}.txt", "x")  # 244 bytes
    assert len(os.listdir(tmp_path)) == 1


def test_other_errors_are_not_called_a_full_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "a.txt"):
        (tmp_path / "no such file").read_text()


def test_two_that_write_one_file_do_not_meet(tmp_path):
    with atomic_file(tmp_path / "a") as first, atomic_file(tmp_path / "a") as second:
        first.write_text("1")
        second.write_text("2")
    assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "1"
    with atomic_folder(tmp_path / "b") as first:
        with atomic_folder(tmp_path / "b") as second:
            (second / "x").write_text("2")
        (first / "x").write_text("1")
    assert sorted(os.listdir(tmp_path)) == ["a", "b"] and (tmp_path / "b/x").read_text() == "2"


def test_what_killed_processes_left_is_removed(tmp_path, monkeypatch):
    alive = {1: False, 2: True}
    monkeypatch.setattr(safe_files, "is_alive", alive.get)
    dead, living = (tmp_path / f".a.{safe_files.HOST}.{process}.00.unfinished" for process in alive)
    old, new = tmp_path / ".a.gpu7.1.00.unfinished", tmp_path / ".a.gpu8.1.00.unfinished"
    earlier_version, of_another = tmp_path / ".a.unfinished", tmp_path / ".ab.gpu7.1.00.unfinished"
    for folder in (dead, living, old, new, of_another, earlier_version):
        folder.mkdir()
    for path in (old, of_another, earlier_version):
        os.utime(path, (0, 0))
    atomic_write(tmp_path / "a", "")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", living.name, new.name, of_another.name])


@pytest.mark.parametrize("end", [b"0.2", b",2,,", b"1,0.2,2", b"1,0.2,2,3\n", b"1,x,2\n", b"1,0.2\n", bytes(40), b"\n"])
def test_rows_that_are_not_complete_are_passed_over(tmp_path, end):
    (tmp_path / "metrics.csv").write_bytes(b"epoch,loss,step\n0,0.5,0\n0,,1\n" + end)
    columns, rows = rows_of(tmp_path / "metrics.csv")
    assert columns == ["epoch", "loss", "step"] and [row["step"] for row in rows] == ["0", "1"]


def test_extensions_may_be_in_capitals(tmp_path):
    check_file("out", tmp_path / "a.PNG", ".png")
    with pytest.raises(ValueError, match=r"out=.*a\.gif: must end in \.png, \.html or \.csv$"):
        check_file("out", tmp_path / "a.gif", ".png", ".html", ".csv")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize("kind", ["torchscript", "torch_export"])
def test_a_program_is_not_called_corrupt(kind, tmp_path):
    model, path = torch.nn.Linear(2, 2), tmp_path / "x.pt2"
    if kind == "torchscript":
        torch.jit.save(torch.jit.trace(model, torch.zeros(1, 2)), path)
    else:
        torch.export.save(torch.export.export(model, (torch.zeros(1, 2),)), path)
    with pytest.raises(ValueError, match="is a program .TorchScript or torch.export., not weights. Pass the checkp"):
        safe_load(path)
