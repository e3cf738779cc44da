"""Clips of videos: decoded and cropped in workers, augmented, trained on; ours against PyAV, torchvision v2, torchaug.

    python -m benchmarks.video

decode   From files of 10 s, 340 x 256 at 30 frames a second (H.264 as x264 makes it, a keyframe each 250 frames), and
         from folders of the same frames as JPEG: two clips a video, 8 frames of 2.56 s each, a random resized crop to
         224 pixels, as uint8 batches from 1 and 2 workers. The peer is PyAV in a plain loop: for each clip open, seek,
         convert the frames from its start to its end, take 8 of them, crop. And torchcodec, which
         could be in PyAV's place in ours: for each video open, decode the frames of both clips, crop; it needs an
         FFmpeg of the system.
augment  MoCo v2's recipe with a crop to 224 pixels on clips of 8 frames of 256 pixels, one core, one draw a clip.
         torchvision v2 frame by frame draws for each frame: its speed is what is compared.
step     SCE with torchvision's R3D-18 on clips of 8 frames of 112 pixels, two views, by `Trainer.fit`, and the share of
         the augmentations in it.
memory   Resident memory of the process over 300 steps that read videos in a worker: to stay flat.

To reach: augmentations 4x torchaug and torchvision v2 frame by frame; memory at the end within 2 % of that at 60 steps.
"""

import math
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytorch_lightning as pl
import torch
from attrs import evolve, frozen
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks import harness, peers
from moco import SelfSupervisedMethod
from model_params import SCEParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets
from self_supervised.data.image_files import draw_box
from self_supervised.numerics import generator
from self_supervised.views.augmentations import augment

OURS = {"file": "ours, files", "frames": "ours, folders of frames"}
PYAV, TORCHCODEC = "PyAV, plain loop", "torchcodec"
PHOTOGRAPHS = load_sample_images().images


@frozen
class Work:
    folder: str
    n_videos: int = 12
    seconds: int = 10
    width: int = 340
    height: int = 256
    fps: int = 30
    size: int = 224
    n_frames: int = 8
    duration: float = 2.56
    clips: int = 16  # of a batch to augment
    step_batch: int = 2
    step_size: int = 112
    steps: int = 300  # over which memory is watched

    @property
    def settings(self) -> dict:
        video = {"num_frames": self.n_frames, "clip_duration": self.duration, "frames_per_second": self.fps}
        return {"dataset_name": "kinetics", "encoder_arch": "module", "evaluations": [], "seed": 0, "K": 512, **video}


QUICK = {"n_videos": 4, "seconds": 3, "width": 64, "height": 48, "fps": 10, "size": 32, "clips": 8}
QUICK |= {"step_size": 16, "steps": 10}


# ---- videos ----


def moving(work: Work, video: int, i: int) -> np.ndarray:
    """Frame i: a window that wanders over a photograph, [height, width, 3]."""
    source = PHOTOGRAPHS[video % 2]
    room, angle = (source.shape[0] - work.height, source.shape[1] - work.width), i / 50 + video
    top, left = (int(r / 2 * (1 + math.sin(angle * f))) for r, f in zip(room, (1, 1.3), strict=True))
    return np.ascontiguousarray(source[top : top + work.height, left : left + work.width])


def make_videos(work: Work) -> None:
    """Files in file/kinetics/train/CLASS, folders of frames in frames/kinetics/train/CLASS."""
    for video in range(work.n_videos):
        frames = [moving(work, video, i) for i in range(work.seconds * work.fps)]
        of_class = Path("kinetics") / "train" / f"class{video % 2}" / f"{video:04d}"
        folder = Path(work.folder) / "frames" / of_class
        folder.mkdir(parents=True)
        for i, frame in enumerate(frames):
            Image.fromarray(frame).save(folder / f"{i:05d}.jpg", quality=90)
        path = (Path(work.folder) / "file" / of_class).with_suffix(".mp4")
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=work.fps)
            stream.width, stream.height, stream.pix_fmt = work.width, work.height, "yuv420p"
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())


# ---- decoding ----


def ours(work: Work, decoder: str) -> Dataset:
    os.environ["DATA_PATH"] = str(Path(work.folder) / decoder)
    params = SCEParams(**work.settings, video_decoder=decoder, transform_crop_size=work.size)
    return data_sets.get_dataset(params, ("train",), params.views)


class PlainLoop(Dataset):
    """PyAV as its documentation shows it; the crop by torch, as ours."""

    def __init__(self, work: Work):
        self.work, self.files, self.view = work, ours(work, "file").files, ViewSettings(crop_size=work.size)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        path, label = self.files[index]
        rng = generator((1, index))
        return [self.clip(path, rng) for _ in range(2)], label

    def clip(self, path: str, rng: np.random.Generator) -> Tensor:
        w, frames = self.work, []
        with av.open(path) as container:
            stream = container.streams.video[0]
            start = rng.uniform(0, max(float(stream.duration * stream.time_base) - w.duration, 0))
            container.seek(int(start / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if frame.time >= start + w.duration:
                    break
                if frame.time >= start:
                    frames.append(frame.to_ndarray(format="rgb24"))
        chosen = np.stack([frames[i] for i in np.linspace(0, len(frames) - 1, w.n_frames).astype(int)])
        return self.cropped(torch.from_numpy(chosen).permute(0, 3, 1, 2), rng)

    def cropped(self, frames: Tensor, rng: np.random.Generator) -> Tensor:
        """[T, C, H, W] -> [C, T, size, size]"""
        w = self.work
        left, top, right, bottom = draw_box(rng, (w.width, w.height), self.view)
        crop = frames[..., top:bottom, left:right].contiguous()
        return nn.functional.interpolate(crop, (w.size,) * 2, mode="bilinear", antialias=True).transpose(0, 1)


class TorchCodec(PlainLoop):
    """torchcodec as its documentation advises: one decoder a video, exact seeks, all wanted frames at once."""

    def __getitem__(self, index: int) -> tuple[list[Tensor], int]:
        from torchcodec.decoders import VideoDecoder

        (path, label), w, rng = self.files[index], self.work, generator((1, index))
        decoder = VideoDecoder(path, num_ffmpeg_threads=1)
        starts = rng.uniform(0, max(decoder.metadata.duration_seconds - w.duration, 0), 2)
        span = w.duration * w.fps
        chosen = [np.linspace(start * w.fps, start * w.fps + span - 1, w.n_frames).astype(int) for start in starts]
        frames = decoder.get_frames_at(np.concatenate(chosen).tolist()).data
        return [self.cropped(part, rng) for part in frames.chunk(2)], label


def torchcodec_is_there() -> bool:
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: no FFmpeg that it knows
        print(f"left out: torchcodec ({str(error).strip().splitlines()[0]})", file=sys.stderr)
        return False
    return True


def all_batches(dataset: Dataset, workers: int) -> None:
    for clips, _ in DataLoader(dataset, 4, num_workers=workers):
        assert len(clips) == 2 and clips[0].dtype == torch.uint8


def decode(work: Work, rounds: int) -> list[harness.Row]:
    sets = {**{name: ours(work, decoder) for decoder, name in OURS.items()}, PYAV: PlainLoop(work)}
    if torchcodec_is_there():
        sets[TORCHCODEC] = TorchCodec(work)
    runs = {(n, who): partial(all_batches, dataset, n) for n in (1, 2) for who, dataset in sets.items()}
    times = harness.in_turns(runs, rounds)
    rates = {key: 2 * work.n_videos / seconds for key, seconds in times.items()}
    return [row(f"decode, {n} workers", who, rates[n, who], rates[n, OURS["file"]]) for n, who in runs]


# ---- augmentations ----


def clip_by_torchaug(size: int, clips: Tensor) -> Callable[[], Tensor]:
    from torchaug.ta_tensors import BatchVideos

    transform, floats = peers.torchaug(size), (clips.transpose(1, 2).float() / 255).contiguous()  # [N, T, C, H, W]
    return lambda: transform(BatchVideos(floats))


def augmenting(work: Work, rounds: int) -> list[harness.Row]:
    side = min(work.width, work.height)
    frames = np.stack([moving(work, i // work.n_frames, i) for i in range(work.clips * work.n_frames)])
    frames = torch.from_numpy(frames[:, :side, :side].copy()).permute(0, 3, 1, 2)
    clips = frames.unflatten(0, (work.clips, work.n_frames)).transpose(1, 2).contiguous()
    few, view, v2 = (
        clips[: max(1, work.clips // 8)],
        [ViewSettings(crop_size=work.size)],
        peers.torchvision_v2(work.size),
    )
    runs = {
        "ours": (lambda: augment(clips, 0, view, peers.MEAN, peers.STD), len(clips)),
        "torchvision v2, frame by frame": (lambda: [v2(f) for clip in few for f in clip.unbind(1)], len(few)),
        "torchvision v2, clip by clip": (lambda: [v2(clip.transpose(0, 1)) for clip in few], len(few)),
    }
    if harness.installed("torchaug"):
        half = clips[: len(clips) // 2]
        runs["torchaug"] = (clip_by_torchaug(work.size, half), len(half))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draws = 1 if rounds == 1 else 10 * rounds  # the peers' work depends on what each call draws
    times = harness.in_turns({name: run for name, (run, _) in runs.items()}, draws)
    torch.set_num_threads(threads)
    rates = {name: n / times[name] for name, (_, n) in runs.items()}
    targets = {"torchvision v2, frame by frame": 4, "torchaug": 4}
    return [row("augment, 1 core", who, rates[who], rates["ours"], targets.get(who, "")) for who in runs]


# ---- the step, and memory ----


class Watched(pl.Callback):
    """When each step ended, and resident MB at the end of some of them."""

    def __init__(self, every: int):
        self.every, self.ends, self.megabytes = every, [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.ends.append(time.perf_counter())
        if trainer.global_step % self.every == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.megabytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def fit(model: SelfSupervisedMethod, loader: DataLoader | None, watched: Watched, steps: int) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    limits = {"max_steps": steps, "max_epochs": -1, "limit_val_batches": 0, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="auto", devices=1, callbacks=[watched], **quiet, **limits)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, *([] if loader is None else [loader]))


def step(work: Work) -> list[harness.Row]:
    size, n, steps = work.step_size, work.step_batch, 6
    settings = work.settings | {"encoder_arch": "r3d_18", "batch_size": n, "transform_crop_size": size}
    model = SelfSupervisedMethod(SCEParams(**settings))
    shape = (n * steps, 3, work.n_frames, size * 8 // 7, size * 8 // 7)
    clips, watched = torch.randint(256, shape, dtype=torch.uint8), Watched(steps)
    fit(model, DataLoader(TensorDataset(clips), n), watched, steps)
    seconds = np.median(np.diff(watched.ends))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    views = harness.in_turns({"views": lambda: model.augment(clips[:n].to(device), 0)}, steps)["views"]
    return [row("step", "ours, R3D-18", n / seconds), row("step", "its augmentations alone", n / views)]


def long_run(work: Work) -> list[float]:
    """MB at every thirtieth of the steps; meant for a process of its own. All of them are one epoch: each video is
    listed several times."""
    videos, many = ours(work, "file").files, Path(work.folder) / "many" / "kinetics"
    many.mkdir(parents=True)
    listed = [f"{path},{label}" for path, label in videos * -(-2 * work.steps // len(videos))]
    (many / "train.csv").write_text("\n".join(listed))
    os.environ["DATA_PATH"] = str(many.parent)
    torch.set_num_threads(1)
    few = {"batch_size": 2, "transform_crop_size": min(work.size, 64), "num_data_workers": 1}
    encoder = nn.Sequential(nn.AdaptiveAvgPool3d((2, 2, 2)), nn.Flatten())
    watched = Watched(max(1, work.steps // 30))
    fit(SelfSupervisedMethod(SCEParams(**work.settings, **few), encoder=encoder), None, watched, work.steps)
    return watched.megabytes


def memory(work: Work, quick: bool) -> list[harness.Row]:
    megabytes = long_run(work) if quick else harness.in_fresh_process(long_run, work)[0]
    settled, end = megabytes[len(megabytes) // 5], megabytes[-1]
    values = {"steps": work.steps, "MB after a fifth": settled, "MB at the end": end, "ratio": end / settled}
    return [{**values, "to reach": 1.02}]


def row(what: str, who: str, rate: float, fastest: float | None = None, target: float | str = "") -> harness.Row:
    faster = "" if fastest is None else fastest / rate
    return {"what": what, "who": who, "clips/s": rate, "ours is faster by": faster, "to reach": target}


def main(argv: list[str] | None = None) -> list[harness.Row]:
    options = harness.arguments(__doc__, rounds=3).parse_args(argv)
    rounds = 1 if options.quick else options.rounds
    with tempfile.TemporaryDirectory() as folder:
        work = evolve(Work(folder), **(QUICK if options.quick else {}))
        make_videos(work)
        rows = [*augmenting(work, rounds), *decode(work, rounds), *step(work)]
        harness.report("video", rows, options.out, "torchvision", "av", *harness.installed("torchaug"))
        harness.report("video_memory", memory(work, options.quick), options.out, "av")
    return rows


if __name__ == "__main__":
    main()
