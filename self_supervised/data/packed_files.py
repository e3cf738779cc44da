"""Image files that are decoded once: reduced images, uint8, in a few large files from which later epochs and runs read.

`$DATA_PATH/packed/<name>-<side>-<hash>` belongs to one source of images, one size and one way of reading. Each part in
it has at most PART images: `pixels.bin`, image after image, and `index.json`, with the path, signature and shape of
each. An image whose signature (size and time of its file) has changed is packed again, into a new part.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from pytorch_lightning.utilities import rank_zero_info
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from self_supervised.data.file_search import data_path
from self_supervised.data.image_files import CENTRAL, ImageFiles, central_square, read_any, resized
from self_supervised.data.shard_urls import UnreachableShard
from self_supervised.folder_lock import LOCK_FILE, in_use_message, locked, owner_of
from self_supervised.safe_files import UNFINISHED, atomic_folder, check_folder, remove

PART = 2**14  # images of a part: as many are lost, at most, if packing is interrupted
BATCH = 16  # images that a worker hands over at once
WAIT_FOR_PACKING = 7 * 86400  # seconds to wait for another process that packs the same images
SAMPLE = 16  # images from which the space on disk is estimated
PIXEL_FILE, INDEX = "pixels.bin", "index.json"
PathSignature = tuple[str, str]  # path and signature of an image
opened: dict[Path, int] = {}  # descriptors, which forked workers share; spawned ones open the files again


@frozen
class PackedPixels:
    """Places of the packed pixels of a data set's images.

    Args:
        files: pixels of each part.
        part: number of the part of each image [N]; -1: it is not packed.
        start: position of its first byte [N].
        shape: [N, 3]; zeros for an image that could not be read.
        changed: whether an earlier state of the image is packed [N].
    """

    files: list[Path]
    part: np.ndarray
    start: np.ndarray
    shape: np.ndarray
    changed: np.ndarray

    def __call__(self, index: int) -> np.ndarray | None:
        """Return the pixels of an image; None if it could not be read when it was packed, or if the file is gone:
        another training deletes it if the images have changed."""
        pixels = np.empty(self.shape[index], np.uint8)
        if self.part[index] < 0 or pixels.size == 0:
            return None
        # faster than a memory map, whose pages would have to be released, lest all of them become resident
        try:
            n = os.preadv(descriptor(self.files[self.part[index]]), [pixels], self.start[index])
        except OSError:
            return None
        if n != pixels.size:
            raise ValueError(f"{self.files[self.part[index]]} was truncated. Delete it to pack the images again.")
        return pixels


def descriptor(file: Path) -> int:
    """Return the descriptor of a file, which stays open until `remove_superseded` deletes the file."""
    if file not in opened:
        opened[file] = os.open(file, os.O_RDONLY)
    return opened[file]


# ---- packing ----


def pack_files(images: ImageFiles, workers: int) -> None:
    """Let `images` read packed pixels, after packing those that are new or have changed.

    One process packs while others wait. Complete parts of an interrupted packing are kept.

    Raises:
        UnreadableFile: an image cannot be read, and unreadable ones are not skipped.
        ValueError: the directory is not writable, or the disk has too little space.
    """
    folder = cache_folder(images)
    stamps = signatures_of(images)
    pixels = find(folder, stamps)
    if (pixels.part < 0).any():
        check_folder("DATA_PATH", folder)
        if owner := owner_of(folder / LOCK_FILE):
            rank_zero_info(f"pack_images=True: waiting, {in_use_message(folder / LOCK_FILE, owner)}")
        with locked(folder, wait=WAIT_FOR_PACKING):
            pixels = find(folder, stamps)  # another process may have packed them in the meantime
            if (pixels.part < 0).any():
                write_missing(folder, images, stamps, pixels, workers)
                remove_superseded(folder, dict(stamps))
                pixels = find(folder, stamps)
    images.packed_pixels = pixels


def use_packed(images: ImageFiles) -> None:
    """Let `images` read packed pixels of those images that are packed, and all others from their files."""
    images.packed_pixels = find(cache_folder(images), signatures_of(images))


def signatures_of(images: ImageFiles) -> list[PathSignature]:
    return [(os.path.abspath(path), repr(signature)) for path, signature, _ in images.signatures()]


def cache_folder(images: ImageFiles) -> Path:
    """Return the directory for the packed images of this source, size and way of reading."""
    side = packed_side(images)
    root = Path(os.path.abspath(images.root))
    kind = "crops" if images.views else "squares"
    settings: tuple = (str(root), kind, side, images.channels, images.pixel_range, images.exif_orientation)
    if column := getattr(images.source, "image_key", None):
        settings += (column,)
    digest = hashlib.sha256(repr(settings).encode()).hexdigest()[:8]
    return data_path().absolute() / "packed" / f"{root.name[:80]}-{side}-{kind}-{digest}"


def packed_side(images: ImageFiles) -> int:
    """Return the shorter side of packed images: 8/7 of the largest view; of central squares, which evaluations see,
    their own."""
    return round(max(view.crop_size for view in images.views) / CENTRAL) if images.views else images.size


def find(folder: Path, stamps: list[PathSignature]) -> PackedPixels:
    """Return where the images with these stamps are packed."""
    n = len(stamps)
    places = PackedPixels([], np.full(n, -1), np.zeros(n, int), np.zeros((n, 3), int), np.zeros(n, bool))
    number = {path: i for i, (path, _) in enumerate(stamps)}
    for index in folder.glob(f"part-*/{INDEX}"):
        content = json.loads(index.read_text())
        shapes = np.array(content["shapes"])
        ends = shapes.prod(1).cumsum()
        if (pixels := index.with_name(PIXEL_FILE)).stat().st_size != ends[-1]:  # truncated, for example by copying
            continue
        for row, (path, signature) in enumerate(content["stamps"]):
            if (i := number.get(path)) is None:
                continue
            if stamps[i][1] == signature:
                places.part[i] = len(places.files)
                places.start[i] = ends[row] - shapes[row].prod()
                places.shape[i] = shapes[row]
            else:
                places.changed[i] = True
        places.files.append(pixels)
    return places


def write_missing(
    folder: Path, images: ImageFiles, stamps: list[PathSignature], packed: PackedPixels, workers: int
) -> None:
    """Write new parts with the images that are not in the parts found."""
    for leftover in folder.glob(f".*{UNFINISHED}"):  # of a process that was killed
        remove(leftover)
    missing = np.flatnonzero(packed.part < 0)
    reduced = ReducedImages(images, missing)
    announce(folder, reduced, int(packed.changed[missing].sum()))
    for start in range(0, len(missing), PART):
        part = ReducedImages(images, missing[start : start + PART])
        images.read_ahead(part.indices)  # of shards from URLs
        loader = DataLoader(part, BATCH, num_workers=workers, collate_fn=joined)
        shapes = []
        with atomic_folder(folder / f"part-{os.urandom(8).hex()}") as unfinished:
            with open(unfinished / PIXEL_FILE, "wb") as file:
                for pixels, shapes_of_batch in track(loader, f"images {start + 1:,} to {start + len(part):,}"):
                    file.write(pixels.numpy())
                    shapes += shapes_of_batch
            rows = [stamps[i] for i in part.indices]
            (unfinished / INDEX).write_text(json.dumps({"stamps": rows, "shapes": shapes}))


def announce(folder: Path, reduced: "ReducedImages", n_changed: int) -> None:
    """Log what will be packed and how much space it takes; ValueError if the disk has less."""
    n = len(reduced)
    sample = np.unique(np.linspace(0, n - 1, SAMPLE).astype(int)).tolist()
    needed = sum(reduced[i].nbytes for i in sample) / len(sample) * n / 1e9
    free = shutil.disk_usage(folder).free / 1e9
    root = reduced.images.root
    if needed > free:
        raise ValueError(
            f"pack_images=True: {n:,} images of {root} need about {needed:.2f} GB in {folder}, where {free:.2f} GB are "
            "free. Make room, set DATA_PATH to a directory on a larger disk, or leave out pack_images."
        )
    changed = f", {n_changed:,} of which have changed" if n_changed else ""
    print(
        f"pack_images=True: packing {n:,} images of {root}{changed}, in {folder}: about {needed:.2f} GB of "
        f"{free:.0f} GB that are free",
        flush=True,
    )


def remove_superseded(folder: Path, signatures: dict[str, str]) -> None:
    """Delete the parts all of whose images have changed. Images outside the data set count as unchanged."""
    for index in folder.glob(f"part-*/{INDEX}"):
        rows = json.loads(index.read_text())["stamps"]
        if all(signatures.get(path, signature) != signature for path, signature in rows):
            if (pixels := index.with_name(PIXEL_FILE)) in opened:  # a deleted file takes space until it is closed
                os.close(opened.pop(pixels))
            remove(index.parent)


# ---- reducing ----


class ReducedImages(Dataset):
    """Data set of the pixels to be packed, uint8, of the images with these indices.

    An image that cannot be read, if such are skipped, has the shape (0, 0, 0).
    """

    def __init__(self, images: ImageFiles, indices: np.ndarray):
        self.images = images
        self.indices = indices.tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> np.ndarray:
        index = self.indices[place]
        try:
            return reduced_pixels(self.images, self.images.files[index][0])
        except UnreachableShard:  # as in LabeledFiles
            raise
        except Exception as error:  # on corrupt files, readers raise exceptions of many types
            self.images.refuse(index, error)
            return np.empty((0, 0, 0), np.uint8)


def reduced_pixels(images: ImageFiles, path: str) -> np.ndarray:
    """Return an image [H, W, C] whose shorter side is reduced to `packed_side`, or, for an evaluation, the central
    square [C, size, size]."""
    image = read_any(path, images.source.open(path), images.channels, images.pixel_range, images.exif_orientation)
    if not images.views:
        return central_square(image, images.size).numpy()
    pixels = np.atleast_3d(np.array(image))
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    side = packed_side(images)
    if shorter <= side:
        return pixels
    size = (side * height // shorter, side * width // shorter)  # as in torchvision
    return resized(torch.from_numpy(pixels)[None], size)[0].permute(1, 2, 0).numpy()


def joined(batch: list[np.ndarray]) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    """Return all pixels of a batch in one row, and the shape of each image."""
    return torch.from_numpy(np.concatenate([pixels.ravel() for pixels in batch])), [pixels.shape for pixels in batch]
