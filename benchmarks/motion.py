"""Pretrain SCE on moving photographs, and compare the encoder with a random one and with chance: has it learned motion?

    python -m benchmarks.motion data --seeds 0 1 2

Makes the videos of benchmarks.moving_photographs in DATA_PATH unless they exist. Each seed is one initialization and
one pretraining without labels, which takes ten minutes on two cores. Then kNN, a linear classifier and retrieval are
fitted on frozen features of the training videos, and scored on the videos of other photographs, for the random and the
trained encoder. The features are those of one clip in the middle of a video, or the mean of ten from its beginning to
its end, or of ten still images. moving_photographs.csv has means and sample standard deviations over seeds.

Within so few steps, a lagging model would hardly leave its initial weights. Hence m=0: keys come from the encoder of
the step before. All views are gray, so that colors do not tell videos apart.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn

from benchmarks import harness
from benchmarks.moving_photographs import MOTIONS, make
from moco import SelfSupervisedMethod
from model_params import SCEParams
from self_supervised.evaluate import evaluate_checkpoint
from self_supervised.fields import as_path

VIDEOS = {"train": 60, "val": 30}  # of each motion
SETTINGS = {
    "dataset_name": "kinetics", "transform_crop_size": 32, "num_frames": 8, "clip_duration": 0.8,
    "transform_crop_scale_min": 0.5, "transform_crop_scale_max": 1.0, "transform_grayscale_probability": 1.0,
    "transform_apply_blur": False, "transform_flip_probability": 0.0, "batch_size": 128, "num_data_workers": 1,
    "sce_coefficient": 0.9, "T": 0.2, "m": 0.0, "use_momentum_schedule": False,
    "use_negative_examples_from_queue": False, "dim": 64, "mlp_hidden_dim": 128,
    "projection_mlp_last_normalization": "same", "optimizer_name": "adamw", "lr": 4e-3, "weight_decay": 1e-4,
    "warmup_epochs": 1, "evaluations": [],
}  # fmt: skip
CLIPS = {  # of a video, averaged; a clip of a thousandth of a second repeats one frame
    "1 clip": {"evaluation_clips": 1},
    "10 clips": {"evaluation_clips": 10},
    "10 still images": {"evaluation_clips": 10, "clip_duration": 0.001},
}
METRICS = {
    "kNN, k = 5": ("knn", "knn5_acc1"), "kNN, k = 20": ("knn", "knn20_acc1"), "linear": ("linear", "acc1"),
    "retrieval at 1": ("retrieval", "recall1"), "retrieval at 5": ("retrieval", "recall5"),
}  # fmt: skip
Scores = dict[str, float]


class SmallEncoder(nn.Sequential):
    """Four convolutions in space and time: clips [N, 3, T, H, W] -> [N, 8 width]."""

    def __init__(self, width: int = 16):
        layers: list[nn.Module] = []
        widths = (3, width, 2 * width, 4 * width, 8 * width)
        for i, (kernel, stride) in enumerate((((3, 5, 5), (1, 2, 2)), (3, (2, 2, 2)), (3, (1, 2, 2)), (3, (2, 2, 2)))):
            padding = tuple(side // 2 for side in kernel) if isinstance(kernel, tuple) else kernel // 2
            layers += [nn.Conv3d(widths[i], widths[i + 1], kernel, stride, padding, bias=False)]
            layers += [nn.BatchNorm3d(widths[i + 1]), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())


def scores(model: SelfSupervisedMethod, trainer: pl.Trainer, path: Path) -> Scores:
    """Return the scores of a model, which is saved to `path` first."""
    trainer.save_checkpoint(path, weights_only=False)
    protocols = sorted({protocol for protocol, _ in METRICS.values()})
    results, how = {}, {"encoder": SmallEncoder(), "baselines": False, "fresh": True}
    for clips, reading in CLIPS.items():
        runs = evaluate_checkpoint(path, protocols, **reading, **how)["runs"]
        of = {run["protocol"]: run["scores"] for run in runs}
        results |= {f"{name}, {clips}": of[key][metric] for name, (key, metric) in METRICS.items()}
    return results


def run(seed: int, epochs: int, out: Path) -> dict[str, Scores]:
    """Return the scores of the "random" and the "trained" encoder, and the processor time of the pretraining."""
    torch.manual_seed(seed)
    params = SCEParams(**SETTINGS, encoder_arch="module", seed=seed, max_epochs=epochs)
    model = SelfSupervisedMethod(params, encoder=SmallEncoder())
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, limit_val_batches=0, logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.strategy.connect(model)  # so that a model can be saved before it is trained
    results = {"random": scores(model, trainer, out / f"random_{seed}.ckpt")}
    start = time.process_time()
    trainer.fit(model)
    results["seconds"] = {"of pretraining": round(time.process_time() - start)}
    return results | {"trained": scores(model, trainer, out / f"trained_{seed}.ckpt")}


def row_of(name: str, runs: list[dict[str, Scores]]) -> harness.Row:
    k = int(name.split(",")[0].split()[-1]) if name.startswith("retrieval") else 1
    told = {}
    for kind in ("random", "trained"):
        values = [results[kind][name] for results in runs]
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        told[f"{kind} encoder"] = f"{statistics.fmean(values):.1f}{deviation}"
    return {**told, "chance": round(100 * (1 - (1 - 1 / len(MOTIONS)) ** k), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.motion", allow_abbrev=False)
    parser.add_argument("data", type=as_path, metavar="DATA_PATH", help="made unless it is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--out", type=as_path, default=Path("runs/motion"), help="folder of checkpoints and scores")
    parser.add_argument("--results", type=as_path, default=harness.RESULTS, help="folder of the CSV file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["DATA_PATH"] = str(args.data.resolve())
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.data / "kinetics").is_dir():
        make(args.data, VIDEOS)
    runs = []
    for seed in args.seeds:
        runs.append(run(seed, args.epochs, args.out))
        print(f"seed {seed}: {runs[-1]}", flush=True)
    rows = [{"videos of other photographs (%)": name, **row_of(name, runs)} for name in runs[0]["random"]]
    harness.report("moving_photographs", rows, args.results, "torchvision")


if __name__ == "__main__":
    main()
