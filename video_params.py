"""Settings of data sets of videos: how clips are taken and how files are read."""

from typing import Any

from attrs import fields, frozen

from fields import choice, number, numbers, path, positive
from files import MOST_WORKERS

MOST_FRAMES = 1024
OF_TRAINING = ("clip_speeds", "clip_jitter")  # drawn at random for its views; an evaluation has neither
HOW = ("video_decoder", "decoding_threads")  # sce_video sets them, and a preset may be tried on images


@frozen(kw_only=True, slots=False)  # as ViewParams
class VideoParams:
    """Settings of `dataset_name="kinetics"`, docs/video.md; other data sets refuse those that change a result."""

    # video: data sets of videos only. Each view is a clip of its own
    num_frames: int = positive(8, at_most=MOST_FRAMES)  # of a clip, evenly taken from its duration
    clip_duration: float = positive(2.56, by=1e-3)  # seconds
    clip_speeds: list[float] = numbers((1.0,), 0.01, 100)  # one is drawn for each clip; 2: of twice the duration
    clip_jitter: float = number(0.0, at_most=0.99)  # of the speed, at random: 0.2 is 0.8 to 1.2 times it
    video_decoder: str = choice("file", ("file", "frames"))  # frames: each video is a folder of image files
    frames_per_second: float = positive(30.0, by=1e-3)  # of folders of frames; a video file knows its own
    decoding_threads: int = positive(1, at_most=MOST_WORKERS)  # of each worker
    video_path_prefix: str | None = path()  # of the paths in train.csv, val.csv; None: the folder train, val
    evaluation_clips: int = positive(1, at_most=MOST_FRAMES)  # of each video, averaged; training: one for each view
    evaluation_crops: int = positive(1, at_most=MOST_FRAMES)  # of each of them: the middle; else along the longer side

    def check_videos(self, of_videos: bool, dataset_name: str) -> None:
        """Raises ValueError for what is set for a data set that has no use for it."""
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            if value != default and not of_videos and name not in HOW:
                raise ValueError(refusal(name, value, dataset_name))


def refusal(name: str, value: Any, dataset_name: str) -> str:
    way_out = "leave it out, or set dataset_name='kinetics'"
    return f"{name}={value!r} is for videos, not for dataset_name={dataset_name!r}: {way_out}"


DEFAULTS = {attribute.name: getattr(VideoParams(), attribute.name) for attribute in fields(VideoParams)}
