"""A lock on a folder that one process holds at a time. The lock ends with its process, and its file names the owner."""

import fcntl
import json
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LOCK_FILE = ".lock"
POLL = 0.05  # seconds
held: set[Path] = set()  # lock files of this process, or of the process that it was forked from


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of `folder` (created if need be) within the block. The holder may enter again.

    POSIX record locks: they work over NFS, the kernel drops them when the process dies, and forked workers, which may
    live a moment longer than a killed process, do not inherit them.

    Args:
        wait: seconds to wait for another process before giving up.

    Raises:
        ValueError: another process holds the lock; says which, and what to do if that process is gone.
    """
    path = Path(folder).expanduser().resolve() / LOCK_FILE
    if path in held:
        yield
        return
    is_new = not path.parent.exists()
    descriptor = acquire(path, time.monotonic() + wait)
    held.add(path)
    try:
        yield
    finally:
        held.discard(path)
        path.unlink(missing_ok=True)  # before the lock is dropped; who has opened it already notices (`is_current`)
        os.close(descriptor)
        with suppress(OSError):  # not empty
            if is_new:
                path.parent.rmdir()


def acquire(path: Path, end: float) -> int:
    """The descriptor of the lock file, locked until it is closed."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the holder has just removed the folder
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            owner = owner_of(path)
            if is_requeued(owner):
                path.unlink(missing_ok=True)
            elif time.monotonic() > end:
                raise ValueError(in_use(path, owner)) from None
            else:
                time.sleep(POLL)
            continue
        except OSError as error:
            warnings.warn(
                f"{path.parent} cannot be locked ({error}): do not start two programs that write into it", stacklevel=3
            )
        if is_current(descriptor, path):
            with suppress(OSError):  # a full disk: the lock holds without a name
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(this_process()).encode(), 0)
            return descriptor
        os.close(descriptor)


def is_current(descriptor: int, path: Path) -> bool:
    """Whether the lock file is still the one that was opened: its holder may have removed it meanwhile."""
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
    """What the holder wrote about itself; {} while it has not."""
    with suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def is_requeued(owner: dict[str, Any]) -> bool:
    """Whether the owner is an earlier start of this SLURM job, whose lock a file server has not dropped yet."""
    here = this_process()
    return here["job"] is not None and owner.get("job") == here["job"] and owner.get("restarts", 0) < here["restarts"]


def in_use(path: Path, owner: dict[str, Any]) -> str:
    told = f"process {owner['process']} on {owner['host']} since {owner['time']}" if owner else "another process"
    return (
        f"{path.parent} is in use by {told}: wait for its end, or choose another folder. If that process is gone, as "
        f"after a crash of another machine, delete {path}"
    )
