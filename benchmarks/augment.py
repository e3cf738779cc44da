"""Views per second: MoCo v2's recipe with blur at 32, 96 and 224 pixels, one core and two, ours against the peers'.

    python -m benchmarks.augment

Every contestant starts from decoded images: uint8 arrays (ours, torchvision v2), PIL images (torchvision's classical
pipeline, lightly), float batches (kornia, torchaug), and ends with normalized floats, each image with its own draw. On
two cores the pipelines that take one image after another run in two processes, as in a DataLoader's workers, but send
nothing back; the others run on two threads.

To reach on one core: at 32 pixels 15x PIL and lightly, 4x kornia and torchaug; at 96 pixels 4x all of them; at 224
pixels, from images of 256, 2x PIL.
"""

import multiprocessing
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks import harness, peers
from self_supervised.catalogue import ViewSettings
from self_supervised.views.augmentations import augment

SIZES = {32: (32, 512), 96: (96, 128), 224: (256, 48)}  # pixels of a view: (of an image, images of a batch)
TARGETS = {
    32: {"pil": 15, "lightly": 15, "kornia": 4, "torchaug": 4},
    96: {"pil": 4, "lightly": 4, "kornia": 4, "torchaug": 4},
    224: {"pil": 2},
}
BATCHED = ("kornia", "torchaug")


def photographs(n: int, size: int) -> Tensor:
    """Squares of scikit-learn's two photographs, uint8 [n, 3, size, size] in channels_last memory."""
    rng, sources, squares = np.random.default_rng(0), load_sample_images().images, []
    for i in range(n):
        source, side = sources[i % 2], int(rng.integers(200, 400))
        top, left = rng.integers(0, source.shape[0] - side), rng.integers(0, source.shape[1] - side)
        square = Image.fromarray(source[top : top + side, left : left + side])
        squares.append(np.asarray(square.resize((size, size), Image.Resampling.BILINEAR)))
    return torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)


held: dict[str, list] = {}  # the images, as tensors and as PIL images: in this process and in those of the pool


def hold(images: Tensor) -> None:
    torch.set_num_threads(1)
    held["tensors"] = list(images)
    held["pil"] = [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).numpy()]


def one_by_one(name: str, size: int, first: int, after: int) -> None:
    """One view of each of these images with a peer's pipeline of single images."""
    transform = getattr(peers, name)(size)
    for image in held["tensors" if name == "torchvision_v2" else "pil"][first:after]:
        transform(image)


def contestants(size: int, images: Tensor, pool) -> dict[str, tuple[Callable, int]]:
    """name: (what makes one view of each image, how many images). The slow ones get fewer images."""
    few, view = max(2, len(images) // 8), [ViewSettings(crop_size=size)]
    makers: dict[str, tuple[Callable, int]] = {
        "ours": (lambda: augment(images, 0, view, peers.MEAN, peers.STD), len(images))
    }
    for name in ("pil", "torchvision_v2", *harness.installed("lightly")):
        if pool is None:
            makers[name] = (lambda name=name: one_by_one(name, size, 0, few), few)
        else:
            halves = [(name, size, 0, few // 2), (name, size, few // 2, few)]
            makers[name] = (lambda halves=halves: pool.starmap(one_by_one, halves, chunksize=1), few)
    floats = (images[: max(2, len(images) // 2)].float() / 255).contiguous()
    for name in harness.installed(*BATCHED):
        transform = getattr(peers, name)(size)
        makers[name] = (lambda transform=transform: transform(floats), len(floats))
    return makers


def measure(size: int, cores: int, rounds: int, quick: bool) -> list[harness.Row]:
    source, n = SIZES[size]
    images = photographs(8 if quick else n, source)
    hold(images)
    pool = None if cores == 1 else multiprocessing.get_context("spawn").Pool(cores, hold, (images,))
    torch.set_num_threads(cores)
    runs = contestants(size, images, pool)
    times = harness.in_turns({name: run for name, (run, _) in runs.items()}, rounds)
    if pool is not None:
        pool.terminate()
    rates = {name: runs[name][1] / times[name] for name in runs}
    targets = TARGETS[size] if cores == 1 else {}
    return [
        {
            "pixels": size,
            "cores": cores,
            "who": name,
            "views/s": rate,
            "us/view": 1e6 / rate,
            "ours is faster by": rates["ours"] / rate,
            "to reach": targets.get(name, ""),
        }
        for name, rate in rates.items()
    ]


def main(argv: list[str] | None = None) -> list[harness.Row]:
    options = harness.arguments(__doc__, rounds=9).parse_args(argv)
    rounds = 1 if options.quick else options.rounds
    threads = torch.get_num_threads()
    rows = [row for cores in (1, 2) for size in SIZES for row in measure(size, cores, rounds, options.quick)]
    torch.set_num_threads(threads)
    harness.report("augment", rows, options.out, "torchvision", *harness.installed("lightly", "kornia", "torchaug"))
    return rows


if __name__ == "__main__":
    main()
