"""Chosen frames of a video: of a video file, decoded by PyAV, or of a folder that holds an image for each frame.

`choose` is called with the time of every frame in seconds, ascending from 0, and answers with the indices of the wanted
ones, in an array of any shape. Both readers return (frames, places): the wanted frames as uint8 [M, H, W, C], each
once, and where in them each of the indices is found.
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

Choose = Callable[[np.ndarray], np.ndarray]
Frames = tuple[np.ndarray, np.ndarray]
COUNTED = "avi"  # holds no times: packets come without, or with wrong ones


# ---- video files ----


def read_video(path: str, choose: Choose, channels: int, threads: int) -> Frames:
    """Compressed, the whole video passes through memory, which costs little; of it only the packets that the wanted
    frames need are decoded, and only these frames converted. Frames of phones are turned upright.

    Raises:
        ValueError: the file holds no frames, or a wanted one is damaged or of another size.
        OSError, av.FFmpegError: it is no video.
    """
    import av
    from av.stream import Disposition

    with av.open(path) as container:
        stream = next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)
        if stream is None:
            raise ValueError("it holds no video stream")
        check_size(stream.codec_context.width * stream.codec_context.height)
        packets = [packet for packet in container.demux(stream) if packet.size]
        codec = stream.codec_context
        codec.thread_type = "AUTO" if threads > 1 else "NONE"
        codec.thread_count = threads
        if codec.codec.intra_only:  # it would conceal damages; the others would then refuse files with open groups
            codec.options = {"err_detect": "explode"}
        counted = container.format.name == COUNTED or any(packet.pts is None for packet in packets)
        stamps = np.arange(len(packets)) if counted else np.unique([p.pts for p in packets if not p.is_discard])
        if not len(stamps):
            raise ValueError("it holds no frames")
        indices = choose((stamps - stamps[0]) * float(1 / stream.average_rate if counted else stream.time_base))
        numbers, places = np.unique(indices, return_inverse=True)
        missing = dict(zip(stamps[numbers].tolist(), numbers.tolist(), strict=True))
        decoded = enumerate(in_order(codec, packets)) if counted else by_time(codec, packets, set(missing))
        frames = joined_frames(converted(decoded, missing, channels), numbers.tolist())
    if missing:
        raise ValueError(f"frames {list(missing.values())} of {len(stamps)} could not be decoded")
    return frames, places.reshape(indices.shape)


def by_time(codec: Any, packets: list[Any], wanted: set[int]) -> Iterator[tuple[int, Any]]:
    """(time stamp, frame) of the wanted frames, and of others on the way to them: from the last keyframe before each.
    Then of all frames from the first packet, for what is missing still: after a "keyframe" of H.264's intra refresh,
    pictures become whole only little by little.

    Frames that neither are wanted nor does any other frame refer to are passed over: most of H.264's.
    """
    last: dict[int, int] = {}  # keyframe to start from: packet after which all frames wanted from there are complete
    keyframes = [i for i, packet in enumerate(packets) if packet.is_keyframe]
    for i, packet in enumerate(packets):
        if packet.pts in wanted:  # a frame that is shown before the keyframe it comes after belongs to the one before
            start = max((k for k in keyframes if k <= i and packets[k].pts <= packet.pts), default=0)
            last[start] = i
    others = "DEFAULT" if codec.codec.canonical_name == "av1" else "NONREF"  # dav1d: what is set first holds for all
    for start, end in sorted(last.items()):
        for packet in [*packets[start : end + 1], None]:  # None: give out what is held back
            if packet is not None:
                codec.skip_frame = "DEFAULT" if packet.pts in wanted else others
            yield from ((frame.pts, frame) for frame in codec.decode(packet) if not frame.is_corrupt)
        codec.flush_buffers()
    codec.skip_frame = "DEFAULT"
    yield from ((frame.pts, frame) for frame in in_order(codec, packets))


def in_order(codec: Any, packets: list[Any]) -> Iterator[Any]:
    """All frames, as they come out of the decoder."""
    return (frame for packet in [*packets, None] for frame in codec.decode(packet))


def converted(
    decoded: Iterable[tuple[int, Any]], missing: dict[int, int], channels: int
) -> Iterator[tuple[int, np.ndarray]]:
    """(number, [H, W, C]) of each frame whose number is `missing`, by its stamp, until none is."""
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # one for all frames: it takes as long to make as to use
    for stamp, frame in decoded:
        if stamp in missing:
            number = missing.pop(stamp)
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            pixels = reformatter.reformat(frame, format="gray" if channels == 1 else "rgb24").to_ndarray()
            if channels == 1:
                pixels = pixels[..., None]
            # as it is meant to be seen
            yield number, np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels
            if not missing:
                return


# ---- folders of frames ----


def read_folder(path: str, choose: Choose, channels: int, threads: int, frames_per_second: float) -> Frames:
    """Frames are in the order of the numbers in their names: frame2.jpg before frame10.jpg.

    Raises:
        ValueError: the folder holds no images, or one of them cannot be read; names it.
        OSError: it is no folder.
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
            pixels = np.asarray(read_image(os.path.join(path, name), channels))
        except Exception as error:
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
        return name, pixels.reshape(*pixels.shape[:2], channels)

    chosen = [names[index] for index in wanted]
    with ThreadPoolExecutor(threads) as pool:
        return joined_frames((pool.map if threads > 1 else map)(read, chosen), chosen), places.reshape(indices.shape)


def by_number(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


# ---- both ----


def joined_frames(frames: Iterable[tuple[Hashable, np.ndarray]], names: Sequence[Hashable]) -> np.ndarray:
    """[M, H, W, C] of (name, [H, W, C]) in any order: each is copied as it comes, so that none is held twice.

    Raises:
        ValueError: frames of two sizes.
    """
    whole = np.empty(0, np.uint8)
    rows = {name: row for row, name in enumerate(names)}
    for name, frame in frames:
        if not len(whole):
            whole = np.empty((len(names), *frame.shape), np.uint8)
        if frame.shape != whole.shape[1:]:
            sizes = " and ".join(f"{width} x {height}" for height, width, _ in (whole.shape[1:], frame.shape))
            raise ValueError(f"its frames are of two sizes, {sizes} (frame {name}): make them the same")
        whole[rows[name]] = frame
    return whole
