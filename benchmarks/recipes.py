"""Repeat the runs behind the result of a recipe, and print it as a row of self_supervised/recipes.py.

    python -m benchmarks.recipes simclr digits --seeds 3
    python -m benchmarks.recipes simclr folder --seeds 3      # 2,500 images of CIFAR-10 as PNG files

An encoder is scored on test images, whose labels select nothing, with the training images as neighbors: as for
`self-supervised demo`.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytorch_lightning as pl

from benchmarks import harness
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised import recipes
from self_supervised.catalogue import DATASETS
from self_supervised.data import loading
from self_supervised.demo import features
from self_supervised.evaluation import validation

IMAGES_PER_CLASS = 250
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False, "logger": False}


def write_folder(out: Path) -> None:
    """Write the first images of each class of CIFAR-10 as PNG files in class directories."""
    params = PRESETS["simclr"](dataset_name="cifar10")
    dataset = loading.get_dataset(params, ("train",))
    names = DATASETS["cifar10"].class_names.split()
    written = dict.fromkeys(range(len(names)), 0)
    for image, label in (dataset[i] for i in range(len(dataset))):
        if written[int(label)] < IMAGES_PER_CLASS:
            path = out / names[int(label)] / f"{written[int(label)]:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.asarray(image.permute(1, 2, 0))).save(path)
            written[int(label)] += 1
        if min(written.values()) == IMAGES_PER_CLASS:
            return


def run(params: ModelParams) -> dict[str, float]:
    """Return kNN accuracy before and after one training, and its minutes."""
    model = SelfSupervisedMethod(params)
    before = validation.knn(*features(model.model, params))["valid_knn20_acc"]
    start = time.process_time()
    pl.Trainer(accelerator="auto", max_epochs=params.max_epochs, num_sanity_val_steps=0, **QUIET).fit(model)
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
    return f"Result({both('random')}, {both('trained')}, {minutes:.1f}{seeds})"


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("recipe", choices=recipes.KINDS)
    parser.add_argument("--seeds", type=int, default=3, help="number of runs (3)")
    parser.add_argument("--data_path", help="directory of images for the recipe folder; default: made from CIFAR-10")
    args, more = parser.parse_known_args(given)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning|lightning_fabric|torch")
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {}
        if args.recipe == "folder":
            if not args.data_path:
                write_folder(Path(folder))
            settings["data_path"] = args.data_path or folder
        for seed in range(args.seeds):
            params = recipes.recipe(args.preset, args.recipe, evaluations=[], seed=seed, **settings)
            runs.append(run(params))
            print(f"seed {seed}: {runs[-1]}", flush=True)
    print(f"{args.preset}, {args.recipe}: {row(runs)}\n{harness.machine()}")


if __name__ == "__main__":
    main()
