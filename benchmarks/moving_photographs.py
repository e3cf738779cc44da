"""Make a small set of videos: a camera moves over photographs. The motion is the class, and only the motion reveals it.

    python -m benchmarks.moving_photographs data --train 60 --val 30
    DATA_PATH=data self-supervised train sce_video --video_decoder file --transform_flip_probability 0 ...

A video has a few shots, each of a different photograph. The camera makes the same motion in all shots, at a speed that
is drawn for the video. Each set of photographs is shown with all eight motions, and in the middle of each shot, these
eight videos show the same picture. Training and validation have no photograph in common. The videos are written as
class folders of .mp4 files, which dataset_name="kinetics" reads. The photographs are those of scikit-learn and
scikit-image. A mirrored pan to the left is a pan to the right, so train without mirroring.
"""

import math
from pathlib import Path

import numpy as np
from attrs import frozen
from PIL import Image

from self_supervised.fields import as_path
from self_supervised.numerics import generator
from self_supervised.program import bar, one_line_errors
from self_supervised.runs.command_line import parser_of
from self_supervised.safe_files import atomic_folder, check_folder

PHOTOGRAPHS = {
    "train": ("astronaut", "brick", "chelsea", "coffee", "coins", "gravel", "hubble_deep_field",
              "immunohistochemistry", "stereo_motorcycle", "china.jpg"),
    "val": ("camera", "cell", "clock", "flower.jpg", "grass", "moon", "retina", "rocket"),
}  # fmt: skip
MOTIONS = {  # of the camera: to the right, downwards, zoom, turn to the right
    "pan_left": (-1, 0, 0, 0),
    "pan_right": (1, 0, 0, 0),
    "roll_left": (0, 0, 0, -1),
    "roll_right": (0, 0, 0, 1),
    "tilt_down": (0, 1, 0, 0),
    "tilt_up": (0, -1, 0, 0),
    "zoom_in": (0, 0, 1, 0),
    "zoom_out": (0, 0, -1, 0),
}
SLOWEST = (0.25, 0.25, math.log(1.2), math.radians(25))  # a second: widths of the window, logarithm of a factor, angle
FASTEST = (0.60, 0.60, math.log(1.6), math.radians(60))
SHOTS, FRAMES, FRAMES_PER_SECOND = 4, 17, 10  # of a video; of a shot; of both
SHORTER_SIDE, WINDOW = 160, (40, 64)  # pixels of a photograph, and of the part of it that the camera sees
REACH = 1.0  # window widths from the middle of a region to the farthest that a shot shows: 0.5 + 0.6 x 0.8 s


@frozen
class Region:
    photograph: Image.Image
    x: float  # of the middle, in pixels
    y: float
    window: float  # width and height, in pixels


def photograph(name: str) -> Image.Image:
    """Return a photograph in color, resized so that its shorter side has SHORTER_SIDE pixels.

    Raises:
        ImportError: scikit-image is not installed.
    """
    if name.endswith(".jpg"):
        from sklearn.datasets import load_sample_image

        pixels = load_sample_image(name)
    else:
        try:
            import skimage.data
        except ImportError as error:
            raise ImportError("the photographs are scikit-image's: pip install scikit-image") from error
        pixels = getattr(skimage.data, name)()
        pixels = pixels[0] if isinstance(pixels, tuple) else pixels  # the left one of two cameras
    image = Image.fromarray(pixels).convert("RGB")
    factor = SHORTER_SIDE / min(image.size)
    return image.resize([round(edge * factor) for edge in image.size], Image.Resampling.LANCZOS)


def regions(photographs: list[Image.Image], rng: np.random.Generator) -> list[Region]:
    """Return one region of each of SHOTS photographs, drawn so that every motion stays within the photograph."""
    drawn = []
    for number in rng.choice(len(photographs), SHOTS, replace=False):
        image, window = photographs[number], rng.uniform(*WINDOW)
        x, y = (rng.uniform(REACH * window, edge - REACH * window) for edge in image.size)
        drawn.append(Region(image, x, y, window))
    return drawn


def shot(region: Region, velocity: np.ndarray, size: int) -> np.ndarray:
    """Return the frames of a shot, uint8 [FRAMES, size, size, 3]. The middle one shows the region itself.

    Args:
        velocity: a row of MOTIONS, times a speed.
    """
    frames = []
    for i in range(FRAMES):
        right, down, zoom, turn = velocity * (i - FRAMES // 2) / FRAMES_PER_SECOND
        scale = region.window * math.exp(-zoom) / size  # pixels of the photograph in one of the frame
        a, b = scale * math.cos(turn), -scale * math.sin(turn)
        x, y = region.x + right * region.window, region.y + down * region.window
        where = (a, b, x - (a + b) * size / 2, -b, a, y - (a - b) * size / 2)
        how = Image.Transform.AFFINE
        frames.append(np.asarray(region.photograph.transform((size, size), how, where, Image.Resampling.BILINEAR)))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    """Write frames as H.264, at a quality at which the compression is not visible."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "12", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make(out: Path, n: dict[str, int], size: int = 64, seed: int = 0) -> Path:
    """Write n[SPLIT] videos of each motion as `out`/kinetics/SPLIT/MOTION/NUMBER.mp4, and return `out`/kinetics.

    Raises:
        ValueError: videos already exist; the size is odd, which H.264 does not support, or too small; n is below 1.
    """
    check_folder("out", out)
    folder = out / "kinetics"
    if folder.exists():
        raise ValueError(f"{folder} is there already: choose another folder")
    if size < 16 or size % 2 or min(n.values()) < 1:
        raise ValueError(f"size={size} must be even and at least 16, and of {n} videos there must be one at least")
    with atomic_folder(folder) as unfinished, bar() as progress:
        task = progress.add_task("videos", total=sum(n.values()) * len(MOTIONS))
        for which, (split, names) in enumerate(PHOTOGRAPHS.items()):
            rng, photographs = generator((seed, which)), [photograph(name) for name in names]
            for i in range(n[split]):
                shots = regions(photographs, rng)
                for motion, signs in MOTIONS.items():
                    path = unfinished / split / motion / f"{i:03d}.mp4"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    velocity = np.array(signs) * rng.uniform(SLOWEST, FASTEST)
                    write_video(path, np.concatenate([shot(region, velocity, size) for region in shots]))
                    progress.advance(task)
    return folder


@one_line_errors()
def main() -> None:
    parser = parser_of("moving_photographs", __doc__)
    parser.add_argument("out", type=as_path, metavar="DATA_PATH", help="the videos go into its folder kinetics")
    parser.add_argument("--train", type=int, default=60, metavar="N", help="videos of each of 8 motions")
    parser.add_argument("--val", type=int, default=30, metavar="N", help="likewise")
    parser.add_argument("--size", type=int, default=64, help="of the frames, in pixels")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(make(args.out.expanduser(), {"train": args.train, "val": args.val}, args.size, args.seed))


if __name__ == "__main__":
    main()
