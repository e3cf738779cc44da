"""Readers of selected frames: from a video file, decoded by PyAV, or from a frame folder, with one image per frame.

A reader calls `choose` with the time of every frame in seconds, ascending from 0; `choose` returns the indices of the
requested frames, in an array of any shape. The reader returns (frames, places): each requested frame once, uint8
[M, H, W, C], and for each index its position in `frames`, in the shape of the indices.
"""

import os
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from self_supervised.data.array_files import check_size
from self_supervised.data.file_search import ARRAY_SUFFIX, image_suffixes, is_hidden
from self_supervised.data.image_files import read_image

Choose = Callable[[np.ndarray], np.ndarray]  # times [T] -> indices
Frames = tuple[np.ndarray, np.ndarray]  # frames, places
COUNTED = "avi"  # container without time stamps, whose packets have none or wrong ones: frames are counted instead


# ---- video files ----


def read_video(path: str, choose: Choose, channels: int, threads: int) -> Frames:
    """Return the requested frames of a video file; see the module for `choose` and the result.

    All packets are read, still compressed, which costs little. Only those that the requested frames need are decoded,
    and only the requested frames are converted to RGB or gray. Rotated videos, as from phones, are turned upright.

    Raises:
        ValueError: the file holds no frames, or a requested one is corrupt or of another size.
        OSError, av.FFmpegError: the file is not a video.
    """
    import av
    from av.stream import Disposition

    with av.open(path) as container:
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise ValueError("the file holds no video stream")
        check_size(stream.codec_context.width * stream.codec_context.height)
        packets = [packet for packet in container.demux(stream) if packet.size]
        codec = stream.codec_context
        codec.thread_type = "AUTO" if threads > 1 else "NONE"
        codec.thread_count = threads
        if codec.codec.intra_only:  # conceals corrupt data by default; other codecs would then refuse open groups
            codec.options = {"err_detect": "explode"}
        counted = container.format.name == COUNTED or any(packet.pts is None for packet in packets)
        stamps = np.arange(len(packets)) if counted else shown_times(packets)
        if not len(stamps):
            raise ValueError("the file holds no frames")
        indices = choose((stamps - stamps[0]) * float(1 / stream.average_rate if counted else stream.time_base))
        numbers, places = np.unique(indices, return_inverse=True)
        missing = dict(zip(stamps[numbers].tolist(), numbers.tolist(), strict=True))
        decoded = enumerate(in_order(codec, packets)) if counted else by_time(codec, packets, set(missing))
        frames = joined_frames(converted(decoded, missing, channels), numbers.tolist())
    if missing:
        raise ValueError(f"frames {list(missing.values())} of {len(stamps)} could not be decoded")
    return frames, places.reshape(indices.shape)


def shown_times(packets: list[Any]) -> np.ndarray:
    """Return the ascending time stamps of the frames that are shown.

    Frames shown before the first keyframe are left out: in a video that was cut at the keyframe of an open group, they
    need frames that were cut off.
    """
    start = next((packet.pts for packet in packets if packet.is_keyframe), None)
    return np.unique([p.pts for p in packets if not p.is_discard and (start is None or p.pts >= start)])


def by_time(codec: Any, packets: list[Any], wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """Yield (time stamp, frame) of the frames in `wanted`, and of others that are decoded on the way.

    Decoding starts at the last keyframe before each wanted frame, and skips unwanted frames that no other frame
    references: most frames of H.264. Then all frames are yielded from the first packet on, for those that are still
    missing: after a "keyframe" of H.264's intra refresh, pictures become complete only gradually.
    """
    last: dict[int, int] = {}  # index of a keyframe's packet -> index of the last packet to decode from there
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for i, packet in enumerate(packets):
        if packet.pts in wanted:  # a frame stored after a keyframe but shown before it needs the previous keyframe
            start = max((k for k in keyframes if k <= i and packets[k].pts <= packet.pts), default=0)
            last[start] = i
    others = "DEFAULT" if codec.codec.canonical_name == "av1" else "NONREF"  # dav1d keeps the first value it gets
    for start, end in sorted(last.items()):
        for packet in [*packets[start : end + 1], None]:  # None flushes the decoder
            if packet is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else others
            yield from ((frame.pts, frame) for frame in codec.decode(packet) if not frame.is_corrupt)
        codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    yield from ((frame.pts, frame) for frame in in_order(codec, packets))


def in_order(codec: Any, packets: list[Any]) -> Iterator[Any]:
    """Return all frames, in the order in which the decoder returns them."""
    return (frame for packet in [*packets, None] for frame in codec.decode(packet))


def converted(
    decoded: Iterable[tuple[int, Any]], missing: dict[int, int], channels: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (number, pixels [H, W, C]) of each missing frame, and stop when none is missing.

    Args:
        decoded: (time stamp, frame) of frames, in any order.
        missing: time stamp -> number of the frame. Entries are removed as their frames come.
    """
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # one for all frames: creating it takes as long as using it
    for stamp, frame in decoded:
        if stamp in missing:
            number = missing.pop(stamp)
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is corrupt")
            pixels = reformatter.reformat(frame, format="gray" if channels == 1 else "rgb24").to_ndarray()
            if channels == 1:
                pixels = pixels[..., None]
            if frame.rotation:
                pixels = np.rot90(pixels, round(frame.rotation / 90))
            yield number, pixels
            if not missing:
                return


# ---- frame folders ----


def read_folder(
    path: str, choose: Choose, channels: int, threads: int, frames_per_second: float, exif_orientation: bool = True
) -> Frames:
    """Return the requested frames of a frame folder; see the module for `choose` and the result.

    Frames are ordered by the numbers in their names: frame2.jpg before frame10.jpg.

    Raises:
        ValueError: the folder holds no images, or one of them cannot be read. The message names it.
        OSError: `path` is not a directory.
    """
    suffixes = set(image_suffixes()) - {ARRAY_SUFFIX}
    names = (name for name in os.listdir(path) if os.path.splitext(name)[1].lower() in suffixes and not is_hidden(name))
    names = sorted(names, key=by_number)
    if not names:
        raise ValueError("the folder holds no images")
    indices = choose(np.arange(len(names)) / frames_per_second)
    wanted, places = np.unique(indices, return_inverse=True)

    def read(name: str) -> tuple[str, np.ndarray]:
        try:
            pixels = np.asarray(read_image(os.path.join(path, name), channels, None, exif_orientation))
        except Exception as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
        return name, pixels.reshape(*pixels.shape[:2], channels)

    chosen = [names[index] for index in wanted]
    with ThreadPoolExecutor(threads) as pool:
        return joined_frames((pool.map if threads > 1 else map)(read, chosen), chosen), places.reshape(indices.shape)


def by_number(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


# ---- common to both ----


def joined_frames(frames: Iterable[tuple[Hashable, np.ndarray]], names: Sequence[Hashable]) -> np.ndarray:
    """Return frames as one array [M, H, W, C], in the order of `names`.

    Args:
        frames: (name, [H, W, C]) in any order. Each is copied as it comes, so that memory holds no frame twice.

    Raises:
        ValueError: the frames are of two sizes.
    """
    joined = np.empty(0, np.uint8)
    rows = {name: row for row, name in enumerate(names)}
    for name, frame in frames:
        if not len(joined):
            joined = np.empty((len(names), *frame.shape), np.uint8)
        if frame.shape != joined.shape[1:]:
            sizes = " and ".join(f"{width} x {height}" for height, width, _ in (joined.shape[1:], frame.shape))
            raise ValueError(f"its frames are of two sizes, {sizes} (frame {name}). Resize them to one.")
        joined[rows[name]] = frame
    return joined
