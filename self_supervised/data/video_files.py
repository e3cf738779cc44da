"""Data set of videos: the frames of a clip, decoding and cropping in the loader's workers, and lists of videos.

A view is a clip of its own, uint8 [C, T, size, size]. A split is a directory of class folders, or a list `<split>.csv`
next to the directory `<split>`, with a line `path label` per video.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from attrs import frozen
from torch import Tensor

from model_params import EncoderAndDataParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import decoders, image_files
from self_supervised.data.class_labels import UNLABELED, class_numbers_of, labels_text
from self_supervised.data.file_search import PassedOver, folders_in, is_hidden, log_counts
from self_supervised.data.files import LabeledFiles, Sample, class_numbers_of_split
from self_supervised.data.folders import list_text
from self_supervised.data.foreign_paths import refuse_foreign
from self_supervised.data.image_files import CENTRAL, Box, draw_box, resized
from self_supervised.fields import as_path
from self_supervised.numerics import generator
from self_supervised.views.tensor_ops import LUMA

VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".ts", ".ogv"),
    *(".mts", ".m2ts", ".vob", ".asf"),
)
LIST_LINE = re.compile(r'(?:"(?P<quoted>[^"]+)"|(?P<plain>[^,"]+?))(?:(?:\s*,\s*|\s+)(?P<label>-?\d+))?')
# Signs of a third column: text after the file's name, or a number at the end of the path
TEXT_AFTER_NAME = re.compile(rf"({'|'.join(map(re.escape, VIDEO_EXTENSIONS))})[\s;][^/]*$", re.IGNORECASE)
NUMBER_AT_END = re.compile(r"\s-?\d+$")


# ---- frames of a clip ----


@frozen
class Sampling:
    """Settings that decide which frames of a video are a clip."""

    n_frames: int
    duration: float  # seconds of a clip at speed 1
    speeds: Sequence[float]  # one is drawn per clip, which covers `speed` times the duration
    jitter: float  # the speed is multiplied by a random factor from 1 - jitter to 1 + jitter


def clip_length(times: np.ndarray) -> float:
    """Return the length in seconds of a video with frames at these times.

    The last frame lasts as long as the median of the others.
    """
    return float(times[-1] + np.median(np.diff(times))) if len(times) > 1 else 0.0


def frames_in(times: np.ndarray, start: float, span: float, n_frames: int) -> np.ndarray:
    """Return the frame indices [n_frames] of the clip that covers `span` seconds from `start` on.

    If no frame begins within the clip, it is the one that is shown at its start.
    """
    first, after = np.searchsorted(times, (start, start + span))
    if first == after:
        first = max(first - 1, 0)
    return first + np.linspace(0, max(after - first - 1, 0), n_frames).astype(int)


def random_clip(rng: np.random.Generator, times: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return the frame indices [n_frames] of a clip at a random speed, which starts at a random time where it fits."""
    speed = sampling.speeds[rng.integers(len(sampling.speeds))] * rng.uniform(1 - sampling.jitter, 1 + sampling.jitter)
    span = sampling.duration * speed
    start = rng.uniform(0, max(clip_length(times) - span, 0))
    return frames_in(times, start, span, sampling.n_frames)


def even_clips(times: np.ndarray, n_clips: int, sampling: Sampling) -> np.ndarray:
    """Return the frame indices [n_clips, n_frames] of clips at speed 1, evenly spaced from start to end of the video.

    A single clip is taken from the middle.
    """
    latest = max(clip_length(times) - sampling.duration, 0)
    starts = np.linspace(0, latest, n_clips) if n_clips > 1 else [latest / 2]
    return np.stack([frames_in(times, start, sampling.duration, sampling.n_frames) for start in starts])


# ---- data set ----


class VideoFiles(LabeledFiles):
    """Data set of videos.

    With views, an item is one random clip per view, with one random resized crop for all its frames, drawn from (seed,
    epoch, index). Without views, it is n_clips x n_crops evenly placed clips, [n_clips * n_crops, C, T, size, size], or
    [C, T, size, size] if there is only one.

    Args:
        videos: (path, label) of each video.
        read: read(path, choose) -> (frames, places), a reader of data/decoders.py.
        n_clips: number of clips, from start to end of the video; 1: its middle.
        n_crops: number of crops per clip. 1: the central square. 3: left, middle and right squares of full height, or
            upper, middle and lower squares of full width (https://arxiv.org/abs/1812.03982, section 4).
    """

    def __init__(
        self,
        videos: list[Sample],
        read: Callable[[str, decoders.Choose], decoders.Frames],
        sampling: Sampling,
        size: int,
        views: list[ViewSettings],
        seed: int,
        skip_unreadable: bool = False,
        n_clips: int = 1,
        n_crops: int = 1,
    ):
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
        """Return one clip per view, [C, T, size, size]."""
        rng = generator((self.seed, self.epoch, index))
        differ = [rng.random() < view.time_difference_probability for view in self.views]

        def choose(times: np.ndarray) -> np.ndarray:
            """Return indices [views, 2, T]: the frames of a clip, and the frames to subtract from them."""
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
        """Return all crops of all clips, [n_clips * n_crops, C, T, size, size]; without the first axis if it is 1."""
        frames, places = self.read_frames(path, lambda times: even_clips(times, self.n_clips, self.sampling))
        crops = []
        for left, top, right, bottom in squares(frames.shape[2], frames.shape[1], self.n_crops):
            crops.append(resized_clip(frames[:, top:bottom, left:right], self.size))  # [C, M, size, size]
        clips = torch.stack([crop[:, place] for place in torch.from_numpy(places) for crop in crops])
        return clips if len(clips) > 1 else clips[0]


# ---- pixels ----


def resized_clip(frames: np.ndarray, size: int) -> Tensor:
    """Return frames [T, H, W, C], resized, as [C, T, size, size]."""
    return resized(torch.from_numpy(np.ascontiguousarray(frames)), size).transpose(0, 1).contiguous()


def squares(width: int, height: int, n: int) -> list[Box]:
    """Return the central square (n = 1), or n squares of the shorter side, evenly placed along the longer side."""
    if n == 1:
        side = round(min(width, height) * CENTRAL)
        lefts = [(width - side) / 2]
        tops = [(height - side) / 2]
    else:
        side = min(width, height)
        lefts = np.linspace(0, width - side, n)
        tops = np.linspace(0, height - side, n)
    corners = np.round(np.stack([lefts, tops], 1)).astype(int).tolist()
    return [(left, top, left + side, top + side) for left, top in corners]


def with_next(indices: np.ndarray, n_frames: int) -> np.ndarray:
    """Return [2, T]: indices of frames, and of the frame after each."""
    indices = np.minimum(indices, max(n_frames - 2, 0))  # the last frame, which none follows, becomes the one before
    return np.stack([indices, np.minimum(indices + 1, n_frames - 1)])


def time_difference(frames: np.ndarray, following: np.ndarray) -> np.ndarray:
    """Return the change from each frame to the following one, in gray, [T, H, W, C].

    Values are (255 + frame - following) / 2, so that 127.5 means no change. It replaces the colors of a view with
    probability `time_difference_probability` (SCE for video, as in eztorch).
    """
    luma = np.array(LUMA if frames.shape[3] == 3 else (1.0,), np.float32)
    change = (255 + (frames @ luma) - (following @ luma)) / 2
    gray = np.clip(np.rint(change), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], frames.shape[3], axis=3)


# ---- finding videos ----


def get_videos(params: EncoderAndDataParams, folder: Path, views: list[ViewSettings]) -> VideoFiles:
    """Return the videos of a split.

    Raises:
        ValueError: there are no videos, a line of a list is invalid, or PyAV is required and missing.
    """
    of_frames = params.video_decoder == "frames"
    train = folder.with_name("train")
    path = list_file(folder)
    if videos_are_there(train) and path.is_file() != list_file(train).is_file():
        check_that_unlabeled(path if path.is_file() else list_file(train), of_frames)
    refuse_foreign("video_path_prefix", params.video_path_prefix)
    prefix = folder if params.video_path_prefix is None else as_path(params.video_path_prefix)
    if path.is_file():
        videos = numbered_videos(path, prefix, of_frames)
        log_counts(path, len(videos), "videos", PassedOver())
        names: dict[int, str] = {}
    else:
        videos = videos_in_class_folders(folder, of_frames)
        numbers = class_numbers_of_split(train if train.is_dir() else folder)
        names = {number: name for name, number in numbers.items()}
    dataset = dataset_of_videos(params, videos, views)
    dataset.class_names = [names[number] for number in sorted(names)]
    if folder == train:
        dataset.about_labels = labels_text(
            {folder.name: videos}, names, "class folders", f"the list {path.name}", "video"
        )
    return dataset


def dataset_of_videos(params: EncoderAndDataParams, videos: list[Sample], views: list[ViewSettings]) -> VideoFiles:
    """Return a data set of these videos, with the settings of `params`.

    Raises:
        ValueError: PyAV is required and missing.
    """
    p = params
    of_frames = p.video_decoder == "frames"
    if not of_frames and importlib.util.find_spec("av") is None:
        raise ValueError(
            "video_decoder='file' needs PyAV, which is not installed. Run pip install av, or use 'frames'."
        )
    read = partial(decoders.read_video, channels=p.channels, threads=p.decoding_threads)
    if of_frames:
        read = partial(
            decoders.read_folder,
            channels=p.channels,
            threads=p.decoding_threads,
            frames_per_second=p.frames_per_second,
            exif_orientation=p.exif_orientation,
        )
    sampling = Sampling(p.num_frames, p.clip_duration, p.clip_speeds, p.clip_jitter)
    skip = p.unreadable_images == "skip"
    return VideoFiles(
        videos, read, sampling, p.crop_size, views, p.seed or 0, skip, p.evaluation_clips, p.evaluation_crops
    )


def videos_are_there(folder: Path) -> bool:
    """Return whether a split has a directory or a list."""
    return folder.is_dir() or list_file(folder).is_file()


def list_file(folder: Path) -> Path:
    """Return the list of the split with this directory."""
    return folder.with_name(f"{folder.name}.csv")


def listed(path: Path, prefix: Path, of_frames: bool) -> list[Sample]:
    """Return (path, label) of each video in the lines `path label` or `path,label` of a list; -1 if a line has no
    label.

    For frame folders, a video's file extension in the list (`.mp4`) is removed.
    """
    videos: dict[str, int] = {}  # path -> label
    for number, line in enumerate(map(str.strip, list_text(path).splitlines()), 1):
        if not line:
            continue
        match = LIST_LINE.fullmatch(line)
        plain = match["plain"] or "" if match else ""
        if not match or TEXT_AFTER_NAME.search(plain) or (NUMBER_AT_END.search(plain) and "," not in line):
            raise ValueError(
                f"line {number} of {path} must be a path and the number of its class, not {line!r}. Write `path class` "
                "or `path,class`, without the third column of other lists (`path frames class`, `path class frames`)."
            )
        video = prefix / (match["quoted"] or plain)
        video = video.with_suffix("") if of_frames and is_video(video) else video
        label = int(match["label"] or -1)
        if (before := videos.setdefault(str(video), label)) != label:
            raise ValueError(f"{video} has two labels in {path}: {before} and {label}. Keep one of its lines.")
    if not videos:
        raise ValueError(f"{path} lists no videos. Add a line `path label` for each.")
    return list(videos.items())


def numbered_videos(path: Path, prefix: Path, of_frames: bool) -> list[Sample]:
    """Return (path, class number) of each line of a list; labels are numbered without gaps, as in train.csv next to it.

    Raises:
        ValueError: the list has labels that train lacks.
    """
    videos = listed(path, prefix, of_frames)
    train = path.with_name("train.csv")
    of_train = listed(train, prefix, of_frames) if train.is_file() and train != path else videos
    labels = [None if label < 0 else label for _, label in videos]
    labels_of_train = [None if label < 0 else label for _, label in of_train]
    known = {**class_numbers_of(labels_of_train, {path.stem: labels}, path), None: UNLABELED}
    return [(video, known[label]) for (video, _), label in zip(videos, labels, strict=True)]


def check_that_unlabeled(path: Path, of_frames: bool) -> None:
    """Raise ValueError if the list of one split has labels, while the other split has class folders.

    The list's own numbers and the order of the folders' names would number classes differently.
    """
    if any(label >= 0 for _, label in listed(path, path.parent, of_frames)):
        raise ValueError(
            f"{path} numbers the classes, and the other split has class folders, which are numbered in the order of "
            "their names, so the labels would differ. List the videos of both splits, or of neither."
        )


def videos_in_class_folders(folder: Path, of_frames: bool) -> list[Sample]:
    """Return (path, class number) of the videos in the class folders of a split; see `class_numbers_of_split`.

    Raises:
        ValueError: there are no videos, or a class has none.
    """
    number_of = class_numbers_of_split(folder)
    what = "a folder of frames for each video" if of_frames else "videos"
    passed_over = PassedOver()
    if of_frames:
        of_class = {name: frame_folders(folder / name, passed_over) for name in number_of}
    else:
        paths_in = image_files.images_in_class_folders(folder, number_of, VIDEO_EXTENSIONS, passed_over)
        of_class = {name: sorted(folder / path for path in paths) for name, paths in paths_in.items()}
    for name, paths in of_class.items():
        if not paths:
            decoder = "frames" if of_frames else "file"
            raise ValueError(f"video_decoder={decoder!r}: {folder / name} must hold {what}{passed_over}")
    videos = [(str(path), number_of[name]) for name, paths in of_class.items() for path in paths]
    if not videos:
        raise ValueError(
            f"{folder} must hold one folder per class, each with {what}, or {list_file(folder)} must list the videos"
        )
    log_counts(folder, len(videos), "videos", passed_over)
    return videos


def frame_folders(of_class: Path, passed_over: PassedOver) -> list[Path]:
    """Return the frame folders in a class folder."""
    for path in of_class.iterdir():
        if is_hidden(path.name):
            passed_over.add("hidden", path)
        elif not path.is_dir():
            passed_over.add("outside the frame folders", path)
    return folders_in(of_class)


def is_video(path: Path) -> bool:
    """Return whether a path has the file extension of a video."""
    return path.suffix.lower() in VIDEO_EXTENSIONS
