"""Resumable embedding job: embeddings are written to disk in parts and joined at the end."""

import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from self_supervised.embeddings import parquet
from self_supervised.embeddings.parquet import ROWS
from self_supervised.embeddings.sources import ImageSource, as_absolute, written_again
from self_supervised.folder_lock import locked
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.numerics import finite
from self_supervised.program import bar
from self_supervised.safe_files import UNFINISHED
from self_supervised.setting_groups import EARLIER_DEFAULTS

SECONDS_OF_PART = 30  # after that time a part is written, even if it has few rows
# metadata that must agree for all rows of a file
COMMON_FACTS = ("sha256", "encoder", "preprocessing", "images", "columns")
EARLIER_NAMES = {"central square, of the shorter side": "central_crop"}  # earlier name in "preprocessing" -> name


class EmbeddingJob:
    """State on disk: the finished file `out`, if there is one, and the directory `out`.parts with the batches of an
    unfinished run.

    A part consists of full batches, so a resumed run has the same batches as an uninterrupted one, and bit-identical
    embeddings.

    Args:
        about: metadata of the file.
        overwrite: replace `out` instead of extending it, and use only parts of a job that did so, too.
    """

    def __init__(self, out: Path, about: dict[str, Any], overwrite: bool):
        self.out = out
        self.about = about
        self.folder = out.with_name(f"{out.name}.parts")
        self.use_finished = out.is_file() and not overwrite
        self.overwrite = overwrite
        self.unreadable: dict[str, str] = {}  # path -> reason
        self.changes = ""  # changes to a finished file, in words
        self.pending: list[tuple[list[str], np.ndarray]] = []  # paths and embeddings of batches not written yet
        self.written = time.monotonic()
        self.lock = ExitStack()
        parquet.schema(1, about)  # raises now, instead of after the first part, if pyarrow is missing

    def __enter__(self) -> "EmbeddingJob":
        self.lock.enter_context(locked(self.folder))
        return self

    def __exit__(self, *_: Any) -> None:
        for leftover in self.folder.glob(f".*{UNFINISHED}"):  # of a killed process, since this one has the lock
            leftover.unlink()
        self.lock.close()
        with suppress(OSError):  # it has parts, or files of others
            self.folder.rmdir()

    def parts(self) -> list[Path]:
        return sorted(self.folder.glob("*.parquet"))

    def left(self, paths: list[str], skip_unreadable: bool) -> list[str]:
        """Return the paths that are not embedded yet.

        Raises:
            ValueError: the existing file or parts were created with different settings.
        """
        finished = set()
        if self.use_finished:
            self.check(self.out)
            finished = set(parquet.paths_in(self.out))
        done = set(finished)
        for part in self.parts():
            is_kept = not self.overwrite or parquet.facts_of_file(part).get("overwrite")
            if is_kept and self.check(part) and finished.isdisjoint(there := parquet.paths_in(part)):
                done.update(there)
            else:
                part.unlink()  # to be overwritten, of other settings, or joined by a run that was killed right after
        if self.overwrite and done:
            kept = f"{len(done):,} embeddings of an interrupted --overwrite are kept"
            print(f"{kept}. To replace them, delete {self.folder}")
        if not skip_unreadable:  # try the unreadable images again
            self.unreadable = {}
        self.unreadable = {
            path: self.unreadable[path] for path in paths if path in self.unreadable and path not in done
        }
        if finished:
            new = set(paths).difference(finished)
            gone = finished.difference(paths)
            self.changes = f", {len(new):,} images are new, {len(gone):,} are gone"
        return [path for path in paths if path not in done and path not in self.unreadable]

    def check(self, file: Path) -> bool:
        """Return whether a file was created with the same settings as this job; if so, take over its list of
        unreadable images.

        Raises:
            ValueError: the settings differ and `overwrite` is False.
        """
        stored = parquet.facts_of_file(file)
        # earlier versions did not store the encoder, nor parts of the preprocessing, all but one the same ever since
        encoder = None if self.about["overrides"].get("lagging") else self.about["encoder"]
        stored = {"encoder": encoder, "columns": {}, **stored}
        record = {EARLIER_NAMES.get(name, name): value for name, value in stored["preprocessing"].items()}
        stored["preprocessing"] = self.about["preprocessing"] | EARLIER_DEFAULTS | record
        if as_absolute(stored["images"]) == self.about["images"]:  # earlier versions stored the path as it was typed
            stored["images"] = self.about["images"]
        different = [
            f"{name} was {stored[name]}, is now {self.about[name]}"
            for name in COMMON_FACTS
            if stored[name] != self.about[name]
        ]
        if changed := written_again(stored, self.about):
            different.append(f"{changed} has been written again")
        if different and not self.overwrite:
            raise ValueError(
                f"{file} was created with different settings or images ({'; '.join(different)}). Choose another "
                "--out, or pass --overwrite."
            )
        if not different:
            self.unreadable |= stored["unreadable"]
        return not different

    def add(self, encoder: Encoder, loader: DataLoader, total: int, skip_unreadable: bool) -> None:
        """Embed the batches of the loader and write them in parts."""
        with bar() as progress:
            task = progress.add_task("embedding", total=total, completed=total - len(loader.sampler))
            try:
                for paths, images, unreadable in loader:
                    for path, reason in unreadable.items():
                        if not skip_unreadable:
                            raise ValueError(
                                f"{path} in {self.about['images']} could not be read ({reason}). Fix or remove "
                                "it, or pass --skip_unreadable."
                            )
                    if paths:
                        self.pending.append((paths, finite(encoder.embed(images), "embeddings", paths).cpu().numpy()))
                    self.unreadable |= unreadable  # not earlier: an interrupted batch is embedded again as a whole
                    progress.advance(task, len(paths) + len(unreadable))
                    n_pending = sum(len(paths) for paths, _ in self.pending)
                    if n_pending >= ROWS or time.monotonic() > self.written + SECONDS_OF_PART:
                        self.flush()
            finally:
                self.flush()

    def flush(self) -> None:
        """Write the pending batches as a part."""
        if not self.pending:
            return
        paths, embeddings = zip(*self.pending, strict=True)
        parts = self.parts()
        number = int(parts[-1].stem) + 1 if parts else 0
        about = {**self.about, "unreadable": self.unreadable, "overwrite": self.overwrite}
        parquet.write_part(self.folder / f"{number:08d}.parquet", sum(paths, []), np.concatenate(embeddings), about)
        self.pending = []
        self.written = time.monotonic()

    def finish(self, paths: list[str], source: ImageSource) -> None:
        """Join the finished file and all parts into `out`, and print a summary."""
        rows = [path for path in paths if path not in self.unreadable]
        if not rows:
            path, reason = next(iter(self.unreadable.items()))
            raise ValueError(
                f"none of the {len(paths):,} images in {source.name} could be read, such as {path} ({reason}). Fix "
                "them, or pass another directory."
            )
        parts = self.parts()
        finished = [self.out] if self.use_finished else []
        if finished and not parts and parquet.paths_in(self.out) == rows:
            print(f"{self.out}: {len(rows):,} embeddings, complete and unchanged")
        else:
            about = {**self.about, "unreadable": self.unreadable}
            parquet.join(self.out, finished + parts, rows, source.labels(rows), about)
            print(f"{self.out}: {len(rows):,} embeddings{self.changes}")
        for part in parts:
            part.unlink()
        for path, reason in self.unreadable.items():
            print(f"unreadable, left out: {path} ({reason})")
        if self.unreadable:
            print(f"{len(self.unreadable):,} unreadable images were left out")
