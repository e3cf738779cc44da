"""Class folders of JPEG files -> two normalized views of 224 pixels an image: ours, torchvision with PIL, lightly.

    python -m benchmarks.loader            # 5,000 files of about 100 kB and 500 x 375 pixels; 6 minutes on 2 cores
    python -m benchmarks.loader --packed   # only the second table: decoding alone, and packed images; 2 minutes
    python -m benchmarks.loader --urls     # only the third table: shards from a server on loopback; 1 minute
    python -m benchmarks.loader --quick

The files are crops of the photographs that scikit-learn and matplotlib bring along. Every contestant starts its workers
and goes once through the same images; all of that is timed. Ours makes the views in the main process, on the GPU if
there is one; the row "uint8" is what it delivers when a GPU makes them. Memory is the largest resident set of the
parent and of one worker, in fresh processes; workers share much of it with their parent.

The second table has epochs of uint8 crops, with pack_images=True: the first epoch packs the files, the second one reads
what was packed. Decoding alone is that of PIL and of torchcodec (`pip install torchcodec`), on one core, from memory.

The third table is that of benchmarks/remote.py.
"""

import io
import os
import re
import resource
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import matplotlib.cbook
import torch
from attrs import evolve, frozen
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import ImageFolder

from benchmarks import harness, peers, remote
from self_supervised.catalogue import ViewSettings
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.data.file_search import data_path
from self_supervised.data.image_files import ImageFiles, collate_crops, samples_in_class_folders
from self_supervised.data.packed_files import pack_files
from self_supervised.fields import as_path
from self_supervised.numerics import generator
from self_supervised.views import augmentations

CLASSES = 10
OURS, UINT8, TORCHVISION, LIGHTLY = "ours", "ours, uint8", "torchvision, PIL", "lightly"


@frozen
class Work:
    """What is read, and how."""

    folder: str
    n_files: int = 5000
    images: int = 512  # of them in one turn
    images_of_epoch: int = 1024  # of them in one turn of the second table
    remembered: int = 192  # of them where memory is measured
    batch_size: int = 64
    size: int = 224
    width: int = 500
    height: int = 375
    bytes: int = 90_000  # the quality is the lowest of QUALITIES with as much


QUICK = {
    "n_files": 40,
    "images": 40,
    "images_of_epoch": 40,
    "remembered": 16,
    "batch_size": 8,
    "size": 32,
    "width": 100,
    "height": 75,
}
QUALITIES = (90, 95, 97, 98, 99)


# ---- files ----


def photographs() -> list[Image.Image]:
    hopper = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return [*map(Image.fromarray, load_sample_images().images), Image.open(hopper).convert("RGB")]


def write_file(index: int, work: Work, photos: list[Image.Image]) -> int:
    """A crop of a photograph, perhaps mirrored, that follows from the index. Returns its number of bytes."""
    path = Path(work.folder) / f"class{index % CLASSES}" / f"{index:05d}.jpg"
    if path.is_file():
        return path.stat().st_size
    rng = generator((0, index))
    photo = photos[index % len(photos)]
    width, height = (round(side * rng.uniform(0.9, 1.1)) for side in (work.width, work.height))
    scale = rng.uniform(0.6, 1) * min(photo.width / width, photo.height / height)
    left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    image = ImageOps.mirror(image) if rng.random() < 0.5 else image
    for quality in QUALITIES:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        if file.tell() >= work.bytes:
            break
    path.write_bytes(file.getvalue())
    return file.tell()


def make_files(work: Work) -> None:
    """Write the files that are not there yet, in threads, because PIL frees Python's lock."""
    for i in range(CLASSES):
        (Path(work.folder) / f"class{i}").mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        sizes = list(pool.map(partial(write_file, work=work, photos=photographs()), range(work.n_files)))
    print(f"{len(sizes):,} files of {sum(sizes) / len(sizes) / 1000:.0f} kB on average", flush=True)


# ---- contestants: batches of two views, normalized floats [N, 3, size, size] ----


def some(dataset: Dataset, images: int) -> Subset:
    """Return evenly spaced images of a data set, so many."""
    return Subset(dataset, [i * len(dataset) // images for i in range(images)])


def ours(work: Work, images: int, workers: int, to_float: bool = True) -> Iterator[list[Tensor]]:
    views, device = [ViewSettings(crop_size=work.size)] * 2, "cuda" if torch.cuda.is_available() else "cpu"
    for i, (crops, _) in enumerate(our_loader(some(image_files(work), images), work, workers)):
        if to_float:
            crops = augmentations.augment([c.to(device) for c in crops], (0, i), views, peers.MEAN, peers.STD)
        yield crops


def image_files(work: Work) -> ImageFiles:
    folder, views = Path(work.folder), [ViewSettings(crop_size=work.size)] * 2
    return ImageFiles(folder, samples_in_class_folders(folder), 3, work.size, views, seed=0)


def our_loader(dataset: Dataset, work: Work, workers: int) -> ResumableDataLoader:
    options = {"sampler": ResumableSampler(dataset, 1, 0, seed=0), "num_workers": workers, "collate_fn": collate_crops}
    return ResumableDataLoader(dataset, work.batch_size, **options)


class TwoViews:
    def __init__(self, transform: Callable):
        self.transform = transform

    def __call__(self, image: Image.Image) -> list[Tensor]:
        return [self.transform(image), self.transform(image)]


def torchvision_pil(work: Work, images: int, workers: int) -> Iterator[list[Tensor]]:
    dataset = some(ImageFolder(work.folder, TwoViews(peers.pil(work.size))), images)
    for views, _ in DataLoader(dataset, work.batch_size, shuffle=True, num_workers=workers):
        yield views


def lightly(work: Work, images: int, workers: int) -> Iterator[list[Tensor]]:
    """As its documentation does: LightlyDataset in PyTorch's loader."""
    from lightly.data import LightlyDataset
    from lightly.transforms import MoCoV2Transform

    transform = MoCoV2Transform(input_size=work.size, normalize={"mean": peers.MEAN, "std": peers.STD})
    dataset = some(LightlyDataset(work.folder, transform=transform), images)
    for views, _, _ in DataLoader(dataset, work.batch_size, shuffle=True, num_workers=workers):
        yield views


CONTESTANTS = {
    OURS: ours,
    UINT8: partial(ours, to_float=False),
    TORCHVISION: torchvision_pil,
    LIGHTLY: lightly,
}


def epoch(name: str, work: Work, images: int, workers: int) -> None:
    """Run one epoch, and check the number of images, and the shape and type of the views."""
    n, dtype = 0, torch.uint8 if name == UINT8 else torch.float32
    for views in CONTESTANTS[name](work, images, workers):
        assert [(view.shape[1:], view.dtype) for view in views] == [((3, work.size, work.size), dtype)] * 2
        n += len(views[0])
    assert n == images


# ---- measuring ----


def memory(name: str, work: Work, workers: int) -> tuple[float, float]:
    """Peak resident MB of the parent and of its largest worker; meant for a process of its own."""
    epoch(name, work, work.remembered, workers)
    parent = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())  # ru_maxrss knows who started us
    return int(parent[1]) / 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024


def decode(contents: list[bytes], scale: int) -> None:
    for content in contents:
        with Image.open(io.BytesIO(content)) as image:
            if scale > 1:
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()


def floor(work: Work, rounds: int) -> list[harness.Row]:
    """How fast PIL alone decodes the files, from memory, on one core."""
    paths = sorted(Path(work.folder).glob("*/*.jpg"))
    contents = [paths[i * len(paths) // work.images].read_bytes() for i in range(work.images)]
    runs = {f"floor: PIL decodes at 1/{scale}": partial(decode, contents, scale) for scale in (1, 2)}
    return [row(name, 0, work.images / time) for name, time in harness.in_turns(runs, rounds).items()]


def uint8_epoch(dataset: ImageFiles, work: Work, workers: int, pack: bool = False) -> None:
    """An epoch of uint8 crops; `pack`: after packing the files anew."""
    if pack:
        shutil.rmtree(data_path(), ignore_errors=True)
        pack_files(dataset, workers)
    assert sum(len(labels) for _, labels in our_loader(dataset, work, workers)) == len(dataset) >= work.images_of_epoch


def decode_with_torchcodec(contents: list[bytes]) -> None:
    from torchcodec.decoders import decode_image

    for content in contents:
        decode_image(content, mode="RGB")


def measure_packed(work: Work, rounds: int) -> list[harness.Row]:
    """The second table. `over PIL` is per core; a worker is a core, and so is the process without workers."""
    paths = sorted(Path(work.folder).glob("*/*.jpg"))
    contents = [paths[i * len(paths) // work.images].read_bytes() for i in range(work.images)]
    runs: dict[tuple[int, str], Callable] = {(0, "PIL decodes"): partial(decode, contents, 1)}
    if harness.installed("torchcodec"):
        runs[0, "torchcodec decodes"] = partial(decode_with_torchcodec, contents)
    every = image_files(work)
    indices = range(0, len(every), max(1, len(every) // work.images_of_epoch))
    files, packed = every.subset(indices), every.subset(indices)
    for workers in (0, 1, 2):
        runs[workers, "ours, files"] = partial(uint8_epoch, files, work, workers)
        runs[workers, "ours, packed, first epoch"] = partial(uint8_epoch, packed, work, workers, True)
        runs[workers, "ours, packed, second epoch"] = partial(uint8_epoch, packed, work, workers)
    times = harness.in_turns(runs, rounds, warmup=0)
    rates = {key: (work.images if "decodes" in key[1] else len(files)) / time for key, time in times.items()}
    keys = ("workers", "contestant", "images/s", "over its first epoch", "over PIL")
    rows = []
    for (workers, name), rate in rates.items():
        first = rate / rates[workers, "ours, packed, first epoch"] if "second" in name else ""
        over_pil = rate / max(1, workers) / rates[0, "PIL decodes"]
        rows.append(dict(zip(keys, (workers, name, rate, first, over_pil), strict=True)))
    return rows


def row(name: str, workers: int, rate: float, ratio="", megabytes=("", "")) -> harness.Row:
    keys = ("workers", "contestant", "images/s", "ours is faster by", "parent MB", "worker MB")
    return dict(zip(keys, (workers, name, rate, ratio, *megabytes), strict=True))


def measure(work: Work, names: list[str], rounds: int, quick: bool) -> list[harness.Row]:
    rows, pairs = floor(work, rounds), list(product((1, 2), names))
    for name in names:  # compilers and caches
        epoch(name, work, work.batch_size, 1)
    runs = {f"{workers} {name}": partial(epoch, name, work, work.images, workers) for workers, name in pairs}
    rates = {key: work.images / time for key, time in harness.in_turns(runs, rounds, warmup=0).items()}
    for workers, name in pairs:
        run = (memory, name, work, workers)
        megabytes = memory(*run[1:]) if quick else harness.in_fresh_process(*run)[0]
        rate = rates[f"{workers} {name}"]
        rows.append(row(name, workers, rate, rates[f"{workers} {OURS}"] / rate, megabytes))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--folder", type=as_path, help="where the files are made, and kept (a temporary folder)")
    parser.add_argument("--packed", action="store_true", help="the second table alone")
    parser.add_argument("--urls", action="store_true", help="the third table alone")
    options = parser.parse_args(argv)
    packages = ["torchvision", "pillow", *harness.installed("lightly")]
    names = [name for name in CONTESTANTS if name != LIGHTLY or LIGHTLY in packages]
    with tempfile.TemporaryDirectory() as temporary:
        work = Work(str(options.folder or temporary))
        work = evolve(work, **QUICK) if options.quick else work
        make_files(work)
        rounds = 1 if options.quick else options.rounds
        if not (options.packed or options.urls):
            harness.report("loader", measure(work, names, rounds, options.quick), options.out, *packages)
        os.environ["DATA_PATH"] = str(Path(temporary) / "packed")
        if not options.urls:
            packages = ["torchvision", "pillow", *harness.installed("torchcodec")]
            harness.report("loader_packed", measure_packed(work, rounds), options.out, *packages)
        if not options.packed:
            rows = remote.measure(sorted(Path(work.folder).glob("*/*.jpg")), work.batch_size, rounds)
            harness.report("loader_urls", rows, options.out, "fsspec", "aiohttp")


if __name__ == "__main__":
    main()
