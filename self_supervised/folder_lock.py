"""Lock on a directory, which one process holds at a time. It is released when its process ends, and its file names the
owner."""

import fcntl
import hashlib
import json
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from self_supervised.fields import as_path

LOCK_FILE = ".lock"
POLL = 0.05  # seconds between attempts
held: set[Path] = set()  # lock files held by this process, or by the process from which it was forked


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of a directory within the block. The holder may enter again. All threads of a process count as one
    holder, so threads need a lock of their own.

    The lock is a POSIX record lock: it works over NFS, the kernel releases it when the process dies, and forked
    workers, which may outlive a killed process by a moment, do not inherit it.

    Args:
        folder: directory to lock; created if it is missing, and deleted at the end if it is empty then, as are the
            directories above it that were created with it.
        wait: seconds to wait for another process.

    Raises:
        ValueError: another process holds the lock. The message names it.
    """
    path = as_path(folder).resolve() / LOCK_FILE
    if path in held:
        yield
        return
    created = [part for part in path.parents if not part.exists()]
    descriptor, file = acquire(path, time.monotonic() + wait)
    held.add(path)
    try:
        yield
    finally:
        held.discard(path)
        for one in {path, file}:  # before the release; processes that have opened it check `is_current`
            one.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            for part in created:
                part.rmdir()


def acquire(path: Path, end: float) -> tuple[int, Path]:
    """Return the descriptor of the lock file, which stays locked until the descriptor is closed, and its path."""
    file = path
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the holder has just removed the directory
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            owner = owner_of(file)
            if is_requeued(owner):
                file.unlink(missing_ok=True)
            elif time.monotonic() > end:
                raise ValueError(in_use_message(path, owner)) from None
            else:
                time.sleep(POLL)
            continue
        except OSError as error:
            if file == path:
                os.close(descriptor)
                file = on_this_machine(path)
                warnings.warn(
                    f"{path.parent} cannot be locked ({error}). It is locked for your programs on this machine only: "
                    "do not start others that write to it.",
                    stacklevel=3,
                )
                continue
        if is_current(descriptor, file):
            with suppress(OSError):  # if the disk is full, the lock does not name its owner
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
            return descriptor, file
        os.close(descriptor)


def on_this_machine(path: Path) -> Path:
    """Return the lock file in the temporary directory, for a file system without locks."""
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"self_supervised_{os.getuid()}_{name}{LOCK_FILE}")


def is_current(descriptor: int, path: Path) -> bool:
    """Return whether the lock file is still the one that was opened. Its holder may have removed it in the meantime."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def this_process() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        "job": os.environ.get("SLURM_JOB_ID"),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }


def owner_of(path: Path) -> dict[str, Any]:
    """Return what another holder wrote about itself, or {} if it has not written it yet. The file of this process's own
    lock is not read, because the kernel releases the lock when the process closes any descriptor of its file."""
    if path.resolve() in held:
        return {}
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def is_requeued(owner: dict[str, Any]) -> bool:
    """Return whether the owner is an earlier start of this SLURM job, whose lock a file server has not released yet."""
    here = this_process()
    return here["job"] is not None and owner.get("job") == here["job"] and owner.get("restarts", 0) < here["restarts"]


def in_use_message(path: Path, owner: dict[str, Any]) -> str:
    holder = f"process {owner['process']} on {owner['host']} since {owner['time']}" if owner else "another process"
    return (
        f"{path.parent} is in use by {holder}. Wait until it ends, or choose another directory. If that process no "
        f"longer exists, for example after a crash of another machine, delete {path}"
    )
