"""Files of extracted features: written in constant memory, a directory at a time, and read as memory maps."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from self_supervised.data.files import readable_rows
from self_supervised.safe_files import atomic_folder


def write_features(folder: Path, n: int, rows: Iterator[dict[str, Tensor]], n_batches: int, what: str) -> None:
    """Write batches of rows to one .npy file per array, atomically and in constant memory.

    Rows whose label `y` marks them as placeholders of unreadable files are left out; the arrays then have fewer than n
    rows.
    """
    with atomic_folder(folder) as unfinished, ExitStack() as opened:
        files: dict[str, tuple[BinaryIO, np.ndarray]] = {}  # array name -> (file, an empty array of its rows)
        done = 0
        for batch in track(rows, what, total=n_batches):
            *parts, labels = readable_rows(batch["y"].cpu(), *(part.cpu() for part in batch.values()))
            for name, part in zip(batch, parts, strict=True):
                part = part.numpy()
                if name not in files:
                    files[name] = opened.enter_context((unfinished / f"{name}.npy").open("wb")), part[:0]
                    write_header(*files[name], n)
                files[name][0].write(part.tobytes())  # with a memory map, a full disk would kill the process
            done += len(labels)
        if done < n:
            for file, empty in files.values():
                write_header(file, empty, done)


def write_header(file: BinaryIO, empty: np.ndarray, n: int) -> None:
    """Write the header of a .npy file of n rows like those of `empty`. NumPy pads headers, so that it can be written
    again with another n."""
    file.seek(0)
    header = {"descr": np.lib.format.dtype_to_descr(empty.dtype), "fortran_order": False}
    np.lib.format.write_array_header_1_0(file, header | {"shape": (n, *empty.shape[1:])})


def has_features(folder: Path) -> bool:
    return any(folder.glob("*.npy"))  # not only the directory: all may have been deleted to save space


def read_features(folder: Path) -> dict[str, Tensor]:
    """Return the memory-mapped arrays. Changes to them stay in memory."""
    return {path.stem: torch.from_numpy(np.load(path, mmap_mode="c")) for path in sorted(folder.glob("*.npy"))}
