"""The work of self_supervised.embeddings.embed as it stands on the disk: written in parts, joined at the end."""

import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from self_supervised.embeddings import parquet
from self_supervised.embeddings.parquet import ROWS
from self_supervised.embeddings.sources import ImageSource
from self_supervised.folder_lock import locked
from self_supervised.networks.pretrained import Encoder
from self_supervised.numerics import finite
from self_supervised.runs.command_line import bar

SECONDS_OF_PART = 30  # after which a part is written, however few rows it has
COMMON_FACTS = ("sha256", "encoder", "preprocessing", "images")  # what all rows of a file have in common


class EmbeddingJob:
    """What is on the disk: the finished file `out`, if any, and `out`.parts, batches that an unfinished run embedded.

    Parts end where batches do, so a run that goes on makes the same batches as one that was not interrupted, and gets
    the same bits.
    """

    def __init__(self, out: Path, about: dict[str, Any], overwrite: bool):
        self.out, self.about, self.folder = out, about, out.with_name(f"{out.name}.parts")
        self.use_finished, self.overwrite = out.is_file() and not overwrite, overwrite
        self.unreadable: dict[str, str] = {}
        self.changes = ""  # of a finished file
        self.pending: list[tuple[list[str], np.ndarray]] = []
        self.written = time.monotonic()
        self.lock = ExitStack()

    def __enter__(self) -> "Work":
        self.lock.enter_context(locked(self.folder))
        return self

    def __exit__(self, *_: Any) -> None:
        if not self.parts():
            shutil.rmtree(self.folder)
        self.lock.close()

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def left(self, paths: list[str], skip_unreadable: bool) -> list[str]:
        """Those that are not embedded yet. Raises ValueError if what is there was made otherwise."""
        finished = set()
        if self.use_finished:
            self.check(self.out)
            finished = set(parquet.paths_in(self.out))
        done = set(finished)
        for part in self.parts():
            if self.check(part) and finished.isdisjoint(there := parquet.paths_in(part)):
                done.update(there)
            else:
                part.unlink()  # of another run, or joined already by one that was killed right then
        if not skip_unreadable:  # try them once more
            self.unreadable = {}
        self.unreadable = {
            path: self.unreadable[path] for path in paths if path in self.unreadable and path not in done
        }
        if finished:
            new, gone = set(paths).difference(finished), finished.difference(paths)
            self.changes = f", {len(new):,} images are new, {len(gone):,} are gone"
        return [path for path in paths if path not in done and path not in self.unreadable]

    def check(self, file: Path) -> bool:
        """Whether a file's rows were made as ours will be; notes what it says of unreadable images."""
        there = parquet.facts_of_file(file)
        there = {"encoder": self.about["encoder"], **there}  # earlier versions did not note it
        other = [name for name in COMMON_FACTS if there[name] != self.about[name]]
        if other and not self.overwrite:
            differ = "; ".join(f"{name} {there[name]} there, {self.about[name]} now" for name in other)
            raise ValueError(f"{file} was made otherwise ({differ}): choose another --out, or --overwrite")
        self.unreadable |= there["unreadable"] if not other else {}
        return not other

    def add(self, encoder: Encoder, loader: DataLoader, total: int, skip_unreadable: bool) -> None:
        """Embed what is left and write it in parts."""
        with bar() as progress:
            task = progress.add_task("embedding", total=total, completed=total - len(loader.sampler))
            try:
                for paths, images, unreadable in loader:
                    for path, reason in unreadable.items():
                        if not skip_unreadable:
                            raise ValueError(
                                f"{path} in {self.about['images']} could not be read ({reason}): mend or "
                                "remove it, or --skip_unreadable"
                            )
                    self.unreadable |= unreadable
                    if paths:
                        self.pending.append((paths, finite(encoder.embed(images), "embeddings", paths).cpu().numpy()))
                    progress.advance(task, len(paths) + len(unreadable))
                    if (
                        sum(len(paths) for paths, _ in self.pending) >= ROWS
                        or time.monotonic() > self.written + SECONDS_OF_PART
                    ):
                        self.flush()
            finally:
                self.flush()

    def flush(self) -> None:
        """Write a part."""
        if not self.pending:
            return
        paths, embeddings = zip(*self.pending, strict=True)
        parts = self.parts()
        number = int(parts[-1].stem) + 1 if parts else 0
        about = {**self.about, "unreadable": self.unreadable}
        parquet.write_part(self.folder / f"{number:08d}.parquet", sum(paths, []), np.concatenate(embeddings), about)
        self.pending, self.written = [], time.monotonic()

    def finish(self, paths: list[str], source: ImageSource) -> None:
        """Join all there is into `out`, and say what was done."""
        rows = [path for path in paths if path not in self.unreadable]
        if not rows:
            raise ValueError(f"none of the {len(paths):,} images in {source.name} could be read: {self.unreadable}")
        parts = self.parts()
        finished = [self.out] if self.use_finished else []
        if finished and not parts and parquet.paths_in(self.out) == rows:
            print(f"{self.out} is complete, {len(rows):,} embeddings: left as it is")
        else:
            about = {**self.about, "unreadable": self.unreadable}
            parquet.join(self.out, finished + parts, rows, source.labels(rows), about)
            print(f"{self.out}: {len(rows):,} embeddings{self.changes}")
        for part in parts:
            part.unlink()
        for path, reason in self.unreadable.items():
            print(f"left out, unreadable: {path} ({reason})")
        if self.unreadable:
            print(f"{len(self.unreadable):,} unreadable images were left out")
