import json
import os
import subprocess
import sys

import pytest

from self_supervised import folder_lock
from self_supervised.folder_lock import locked

WORKER = "os.fork() or time.sleep(3); "  # as those of a loader, which outlive a killed process


def test_another_process_is_refused_and_told_who_holds_the_lock(tmp_path, holder):
    process = holder(tmp_path / "run")
    with (
        pytest.raises(ValueError, match=rf"run is in use by process {process.pid} on .* delete .*\.lock"),
        locked(tmp_path / "run"),
    ):
        pass


@pytest.mark.parametrize("code", ["", WORKER])
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, holder, code):
    process = holder(tmp_path / "run", code)
    process.kill()
    process.wait()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.lock").read_text())["process"] != process.pid


def test_one_that_waits_gets_the_lock_when_the_holder_ends(tmp_path, holder):
    process = holder(tmp_path / "run", "time.sleep(0.3); l.__exit__(None, None, None); sys.exit()")
    with locked(tmp_path / "run", wait=30):
        process.wait()
    assert process.returncode == 0


def test_the_holder_keeps_its_lock_when_it_looks_for_the_owner(tmp_path):
    attempt = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with locked(tmp_path / "run"):
        assert folder_lock.owner_of(tmp_path / "link/.lock") == {}
        other = subprocess.run([sys.executable, "-c", attempt, tmp_path / "run/.lock"], capture_output=True, text=True)
    assert "BlockingIOError" in other.stderr


def test_the_holder_enters_again_and_leaves_no_file(tmp_path):
    with locked(tmp_path), locked(tmp_path):
        assert (tmp_path / ".lock").is_file()
    assert tmp_path.is_dir() and not list(tmp_path.iterdir())
    (tmp_path / "kept").mkdir()
    for folder in ("new", "new/er", "kept/new"):
        with locked(tmp_path / folder):
            pass
    assert [path.name for path in tmp_path.rglob("*")] == ["kept"]


def test_a_requeued_job_takes_the_lock_of_its_earlier_start(tmp_path, holder, monkeypatch):
    """A file server may hold the lock of a machine that is gone for minutes."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    holder(tmp_path / "run")
    with pytest.raises(ValueError, match="in use"), locked(tmp_path / "run"):
        pass
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run/.lock").read_text())["restarts"] == 1


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def without(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", without)
    with pytest.warns(UserWarning, match="cannot be locked"), locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_without_locks_of_the_file_system_the_machine_has_one(tmp_path, holder, monkeypatch):
    lock = folder_lock.fcntl.lockf

    def without(descriptor, how):
        if os.path.samestat(os.fstat(descriptor), os.stat(tmp_path / ".lock")):
            raise OSError(38, "Function not implemented")
        lock(descriptor, how)

    monkeypatch.setattr(folder_lock.fcntl, "lockf", without)
    monkeypatch.setattr(folder_lock, "on_this_machine", lambda _: tmp_path / "machine/.lock")
    process = holder(tmp_path / "machine")
    with (
        pytest.warns(UserWarning, match="on this machine only"),
        pytest.raises(ValueError, match=f"{tmp_path} is in use by process {process.pid}"),
        locked(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with pytest.warns(UserWarning, match="on this machine only"), locked(tmp_path):
        pass
