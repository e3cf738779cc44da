"""Video files and frame folders for tests, whose frames show their number."""

from pathlib import Path

import av
import numpy as np
from PIL import Image

STEP = 16  # gray levels between two digits, far more than a codec's error


def frame(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """Return a frame [H, W, 3] that shows a number: the tens as gray in the left half, the ones in the right half.

    A red stripe is at the top.
    """
    pixels = np.zeros((height, width, 3), np.uint8)
    tens, ones = divmod(number, 10)
    pixels[:, : width // 2] = 20 + STEP * tens
    pixels[:, width // 2 :] = 20 + STEP * ones
    pixels[: height // 4] = (220, 30, 30)
    return pixels


def number_of(pixels: np.ndarray) -> int:
    """Return the number that a frame [H, W, C] shows, read from its lower half."""
    lower = pixels[pixels.shape[0] // 2 :].astype(float)
    quarter = pixels.shape[1] // 4
    grays = (lower[:, :quarter].mean(), lower[:, -quarter:].mean())
    tens, ones = (round((gray - 20) / STEP) for gray in grays)
    return 10 * tens + ones


def write_video(
    path: Path, n: int = 50, codec: str = "libx264", fps: int = 10, stamps=None, size=(64, 48), pattern=frame, **options
) -> Path:
    """Write a video of n frames. `stamps` are their times in units of 1 / fps, for a varying frame rate."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options.pop("container", {})) as container:
        stream = container.add_stream(codec, rate=fps, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for i in range(n):
            image = av.VideoFrame.from_ndarray(pattern(i, *size), format="rgb24")
            image.pts = i if stamps is None else stamps[i]
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def write_frames(folder: Path, n: int = 50, suffix: str = "jpg", size=(64, 48)) -> Path:
    folder.mkdir(parents=True)
    for i in range(n):
        Image.fromarray(frame(i, *size)).save(folder / f"frame{i}.{suffix}", quality=95)
    return folder
