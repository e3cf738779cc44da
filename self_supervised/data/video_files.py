"""Videos, decoded and cropped in the loader's workers: a view is a clip of its own, uint8 [C, T, size, size].

A split is class folders of videos, or a list `<split>.csv` beside the folder `<split>`, a line `path label` for each.
"""

import importlib.util
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from model_params import EncoderAndDataParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import decoders, image_files
from self_supervised.data.class_labels import UNLABELED, class_numbers_of
from self_supervised.data.file_search import PassedOver, folders_in, is_hidden, tell
from self_supervised.data.files import LabeledFiles, Sample, class_numbers_of_split
from self_supervised.data.foreign_paths import refuse_foreign
from self_supervised.data.image_files import CENTRAL, Box, draw_box, resized
from self_supervised.views.augmentations import generator
from self_supervised.views.tensor_ops import LUMA


@frozen
class Sampling:
    """How clips are taken from a video."""

    n_frames: int
    duration: float  # seconds
    speeds: Sequence[float]  # one is drawn for each clip: it covers that many times its duration
    jitter: float  # and 1 - jitter to 1 + jitter times that


def clip_length(times: np.ndarray) -> float:
    """Seconds of a video with frames at these times: the last one lasts as long as its neighbors do."""
    return float(times[-1] + np.median(np.diff(times))) if len(times) > 1 else 0.0


def frames_in(times: np.ndarray, start: float, span: float, n_frames: int) -> np.ndarray:
    """Indices [n_frames] of the clip that starts there; where no frame begins within it, the one that is shown then."""
    first, after = np.searchsorted(times, (start, start + span))
    if first == after:
        first = max(first - 1, 0)
    return first + np.linspace(0, max(after - first - 1, 0), n_frames).astype(int)


def random_clip(rng: np.random.Generator, times: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Indices [n_frames] of a clip that starts anywhere where it fits into the video."""
    speed = sampling.speeds[rng.integers(len(sampling.speeds))] * rng.uniform(1 - sampling.jitter, 1 + sampling.jitter)
    span = sampling.duration * speed
    start = rng.uniform(0, max(clip_length(times) - span, 0))
    return frames_in(times, start, span, sampling.n_frames)


def even_clips(times: np.ndarray, n_clips: int, sampling: Sampling) -> np.ndarray:
    """Indices [n_clips, n_frames] of clips at speed 1, from the beginning of the video to its end; of 1, its middle."""
    latest = max(clip_length(times) - sampling.duration, 0)
    starts = np.linspace(0, latest, n_clips) if n_clips > 1 else [latest / 2]
    return np.stack([frames_in(times, start, sampling.duration, sampling.n_frames) for start in starts])


# ---- Videos, decoded and cropped in the loader's workers: a view is a clip of its own, uint8 [C, T, size, size] ----


VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"),
    *(".mts", ".m2ts", ".vob", ".asf"),
)
LIST_LINE = re.compile(r'(?:"(?P<quoted>[^"]+)"|(?P<plain>[^,"]+?))(?:(?:\s*,\s*|\s+)(?P<label>-?\d+))?')
BEHIND = re.compile(rf"({'|'.join(map(re.escape, VIDEO_EXTENSIONS))})[\s;][^/]*$", re.IGNORECASE)  # the file's name
NUMBER = re.compile(r"\s-?\d+$")


class VideoFiles(LabeledFiles):
    """With views: one random clip a view, and one random resized crop for all its frames, drawn from (seed, epoch,
    video). Without: n_clips x n_crops evenly placed ones, [n_clips * n_crops, C, T, size, size], or the only one.

    Args:
        videos: (path, label) of each.
        read: read(path, choose) -> (frames, places), a reader of data/decoders.py.
        n_clips: from the beginning of the video to its end; of one, its middle.
        n_crops: of one, the central square. 3: left, middle and right squares of the whole height, or upper, middle and
            lower ones of the whole width (https://arxiv.org/abs/1812.03982, section 4).
    """

    def __init__(
        self, videos: list[Sample], read, sampling: Sampling, size: int, views: list[ViewSettings], seed: int,
        skip_unreadable: bool = False, n_clips: int = 1, n_crops: int = 1,
    ):  # fmt: skip
        super().__init__(videos, "video", skip_unreadable, not views)
        self.read_frames = read
        self.sampling = sampling
        self.size = size
        self.views = views
        self.seed = seed
        self.n_clips = n_clips
        self.n_crops = n_crops

    def __getitem__(self, index: int) -> tuple[Tensor | list[Tensor], int]:
        return self.readable(index)

    def read(self, index: int) -> Tensor | list[Tensor]:
        return self.random_clips(index) if self.views else self.even_clips(self.files[index][0])

    def random_clips(self, index: int) -> list[Tensor]:
        """[C, T, size, size] of each view."""
        rng = generator((self.seed, self.epoch, index))
        differ = [rng.random() < view.time_difference_probability for view in self.views]

        def choose(times: np.ndarray) -> np.ndarray:
            """[views, 2, T]: frames, and the frames to be taken from them."""
            chosen = [random_clip(rng, times, self.sampling) for _ in self.views]
            return np.stack([with_next(c, len(times)) if d else [c, c] for c, d in zip(chosen, differ, strict=True)])

        frames, places = self.read_frames(self.files[index][0], choose)
        result = []
        for view, (place, after), differs in zip(self.views, places, differ, strict=True):
            left, top, right, bottom = draw_box(rng, (frames.shape[2], frames.shape[1]), view)
            crop = frames[:, top:bottom, left:right]
            crop = time_difference(crop[place], crop[after]) if differs else crop[place]
            result.append(resized_clip(crop, view.crop_size))
        return result

    def even_clips(self, path: str) -> Tensor:
        frames, places = self.read_frames(path, lambda times: even_clips(times, self.n_clips, self.sampling))
        found = []
        for left, top, right, bottom in squares(frames.shape[2], frames.shape[1], self.n_crops):
            found.append(resized_clip(frames[:, top:bottom, left:right], self.size))  # [C, M, size, size]
        found = torch.stack([crop[:, place] for place in torch.from_numpy(places) for crop in found])
        return found if len(found) > 1 else found[0]


# ---- pixels ----


def resized_clip(frames: np.ndarray, size: int) -> Tensor:
    """[T, H, W, C] -> [C, T, size, size]"""
    return resized(torch.from_numpy(np.ascontiguousarray(frames)), size).transpose(0, 1).contiguous()


def squares(width: int, height: int, n: int) -> list[Box]:
    """The central square, or as many squares of the shorter side, evenly placed along the longer one."""
    side = round(min(width, height) * (CENTRAL if n == 1 else 1))
    if n == 1:
        lefts, tops = [(width - side) / 2], [(height - side) / 2]
    else:
        lefts, tops = np.linspace(0, width - side, n), np.linspace(0, height - side, n)
    corners = np.round(np.stack([lefts, tops], 1)).astype(int).tolist()
    return [(left, top, left + side, top + side) for left, top in corners]


def with_next(indices: np.ndarray, n_frames: int) -> np.ndarray:
    """[2, T]: the frames and those that follow them in the video; the last frame makes way for the one before."""
    indices = np.minimum(indices, max(n_frames - 2, 0))
    return np.stack([indices, np.minimum(indices + 1, n_frames - 1)])


def time_difference(frames: np.ndarray, following: np.ndarray) -> np.ndarray:
    """[T, H, W, C] -> what changes from each frame to the following one of the video, in gray: (255 + now - next) / 2,
    so that 127.5 is no change. In place of colors where a view draws it (SCE for video, as in eztorch)."""
    luma = np.array(LUMA if frames.shape[3] == 3 else (1.0,), np.float32)
    change = (255 + (frames @ luma) - (following @ luma)) / 2
    gray = np.clip(np.rint(change), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], frames.shape[3], axis=3)


# ---- lists of videos ----


def get_videos(params: EncoderAndDataParams, folder: Path, views: list[ViewSettings]) -> VideoFiles:
    """The videos of a split by the settings of `params`.

    Raises:
        ValueError: no videos; a line of a list that is not understood; PyAV is wanted and missing.
    """
    of_frames = params.video_decoder == "frames"
    train = folder.with_name("train")
    path = list_file(folder)
    if videos_are_there(train) and path.is_file() != list_file(train).is_file():
        check_that_unlabeled(path if path.is_file() else list_file(train), of_frames)
    refuse_foreign("video_path_prefix", params.video_path_prefix)
    prefix = folder if params.video_path_prefix is None else Path(params.video_path_prefix).expanduser()
    if path.is_file():
        videos = numbered_videos(path, prefix, of_frames)
        tell(path, len(videos), "videos", PassedOver())
    else:
        videos = videos_in_class_folders(folder, of_frames)
    return as_set(params, videos, views)


def as_set(params: EncoderAndDataParams, videos: list[Sample], views: list[ViewSettings]) -> VideoFiles:
    """Videos that are known, read by the settings of `params`. Raises ValueError if PyAV is wanted and missing."""
    p = params
    of_frames = p.video_decoder == "frames"
    if not of_frames and importlib.util.find_spec("av") is None:
        raise ValueError("video_decoder='file' needs PyAV, which is not installed: pip install av, or use 'frames'")
    how = {"channels": p.channels, "threads": p.decoding_threads}
    if of_frames:
        read = partial(decoders.read_folder, **how, frames_per_second=p.frames_per_second)
    else:
        read = partial(decoders.read_video, **how)
    sampling = Sampling(p.num_frames, p.clip_duration, p.clip_speeds, p.clip_jitter)
    skip = p.unreadable_images == "skip"
    places = (p.evaluation_clips, p.evaluation_crops)
    return VideoFiles(videos, read, sampling, p.crop_size, views, p.seed or 0, skip, *places)


def videos_are_there(folder: Path) -> bool:
    return folder.is_dir() or list_file(folder).is_file()


def list_file(folder: Path) -> Path:
    """Of the split whose videos are in `folder`."""
    return folder.with_name(f"{folder.name}.csv")


def listed(path: Path, prefix: Path, of_frames: bool) -> list[Sample]:
    """(path, label) of each line `path label` or `path,label`; without a label, -1. With folders of frames, a suffix of
    the path (`.mp4`) falls away."""
    videos = []
    for number, line in enumerate(map(str.strip, path.read_text(encoding="utf-8-sig").splitlines()), 1):
        if not line:
            continue
        found = LIST_LINE.fullmatch(line)
        plain = found["plain"] or "" if found else ""
        if not found or BEHIND.search(plain) or (NUMBER.search(plain) and "," not in line):
            raise ValueError(
                f"line {number} of {path} must be a path and the number of its class, not {line!r}: write `path class` "
                "or `path,class`, without the third column of other lists (`path frames class`, `path class frames`)"
            )
        video = prefix / (found["quoted"] or plain)
        video = video.with_suffix("") if of_frames and is_video(video) else video
        videos.append((str(video), int(found["label"] or -1)))
    if not videos:
        raise ValueError(f"{path} lists no videos")
    return videos


def numbered_videos(path: Path, prefix: Path, of_frames: bool) -> list[Sample]:
    """(path, class) of each line, numbered without gaps by the labels in the list of train beside it.

    Raises:
        ValueError: there are labels that train lacks.
    """
    videos = listed(path, prefix, of_frames)
    train = path.with_name("train.csv")
    of_train = listed(train, prefix, of_frames) if train.is_file() and train != path else videos
    labels = [None if label < 0 else label for _, label in videos]
    labels_of_train = [None if label < 0 else label for _, label in of_train]
    known = {**class_numbers_of(labels_of_train, {path.stem: labels}, path), None: UNLABELED}
    return [(video, known[label]) for (video, _), label in zip(videos, labels, strict=True)]


def check_that_unlabeled(path: Path, of_frames: bool) -> None:
    """Raises ValueError: a list of one split numbers classes, and class folders of the other are numbered by name."""
    if any(label >= 0 for _, label in listed(path, path.parent, of_frames)):
        raise ValueError(
            f"{path} numbers the classes, and the neighboring split has class folders, numbered in the order of their "
            "names, so that the labels would differ: list the videos of both, or of neither"
        )


def videos_in_class_folders(folder: Path, of_frames: bool) -> list[Sample]:
    """(path, class) of each, numbered as class_numbers does."""
    number_of = class_numbers_of_split(folder)
    what = "a folder of frames for each video" if of_frames else "videos"
    passed_over = PassedOver()
    if of_frames:
        of_class = {name: frame_folders(folder / name, passed_over) for name in number_of}
    else:
        found_in = image_files.images_in_class_folders(folder, number_of, VIDEO_EXTENSIONS, passed_over)
        of_class = {name: sorted(folder / path for path in found) for name, found in found_in.items()}
    for name, found in of_class.items():
        if not found:
            decoder = "frames" if of_frames else "file"
            raise ValueError(f"{folder / name} must hold {what} (video_decoder={decoder!r}){passed_over}")
    videos = [(str(path), number_of[name]) for name, found in of_class.items() for path in found]
    if not videos:
        raise ValueError(f"{folder} must hold one folder per class, each with {what}, or {list_file(folder)} list them")
    tell(folder, len(videos), "videos", passed_over)
    return videos


def frame_folders(of_class: Path, passed_over: PassedOver) -> list[Path]:
    """The folders directly in that of a class."""
    for path in of_class.iterdir():
        if is_hidden(path.name) or not path.is_dir():
            passed_over.add("hidden" if is_hidden(path.name) else "beside the folders of frames", path)
    return folders_in(of_class)


def is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEO_EXTENSIONS
