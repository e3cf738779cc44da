"""Repeat the runs behind the result of a recipe, and print it as a row of self_supervised/recipes.py.

    python -m benchmarks.recipes simclr digits --seeds 3
    python -m benchmarks.recipes simclr folder            # writes images of $DATA_PATH/cifar10 as PNG files first

An encoder is scored on the test images, with the training images as neighbors, as by `self-supervised demo`.
benchmarks.cifar10 repeats the recipes for CIFAR-10.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytorch_lightning as pl
from torch import nn

from benchmarks import harness
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised import recipes
from self_supervised.data import data_sets
from self_supervised.demo import features
from self_supervised.evaluation import validation

IMAGES = {"train": 3000, "test": 1000}  # of the recipe folder: the first images of CIFAR-10


def write_folder(root: Path) -> None:
    """Write images of CIFAR-10 as PNG files, such as train/frog/00000.png."""
    params = PRESETS["simclr"](dataset_name="cifar10")
    names = params.dataset.class_names.split()
    for split, number in IMAGES.items():
        images = data_sets.get_dataset(params, (split,))
        for i in range(number):
            image, label = images[i]
            path = root / split / names[int(label)] / f"{i:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(path)


def run(params: ModelParams) -> dict[str, float]:
    """Return kNN accuracy before and after one training, and its minutes."""
    model = SelfSupervisedMethod(params)
    before = validation.knn(*features(model.model, params))["valid_knn20_acc"]
    start = time.process_time()
    length = {"max_epochs": params.max_epochs, "num_sanity_val_steps": 0}
    pl.Trainer(accelerator="auto", **length, **harness.QUIET_TRAINER).fit(model)
    minutes = (time.process_time() - start) / 60  # of the processor: the machine may do other work
    return {
        "random": before,
        "trained": validation.knn(*features(model.model, params))["valid_knn20_acc"],
        "minutes": minutes,
    }


def row(runs: list[dict[str, float]]) -> str:
    """Return the result of runs with different seeds as it stands in recipes.py."""

    def both(name: str) -> tuple[float, float | None]:
        values = [one[name] for one in runs]
        return round(statistics.mean(values), 1), round(statistics.stdev(values), 1) if len(values) > 1 else None

    minutes = statistics.mean(one["minutes"] for one in runs)
    seeds = "" if len(runs) == 3 else f", seeds={len(runs)}"
    return f"Outcome({both('random')}, {both('trained')}, {minutes:.1f}{seeds})"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("recipe", choices=[kind for kind in recipes.KINDS if not kind.startswith("cifar10")])
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (3)")
    args = parser.parse_args(given)
    harness.silence()
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"evaluations": [], "num_data_workers": 0}  # minutes include reading the images
        if args.recipe == "folder":
            write_folder(Path(folder))
            settings["data_path"] = folder
        runs = []
        for seed in range(args.seeds):
            params = recipes.recipe(args.preset, args.recipe, **settings, seed=seed)
            runs.append(run(params))
            print(f"seed {seed}: {runs[-1]}", flush=True)
        pixels = validation.knn(*features(nn.Flatten(), params))["valid_knn20_acc"]
    print(f"{args.preset}, {args.recipe}: {row(runs)}; pixels: {pixels:.1f}\n{harness.machine()}")


if __name__ == "__main__":
    main()
