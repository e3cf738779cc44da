"""Train the presets of a recipe on digits or on image files, and score their encoders: the results of recipes.py.

    python -m benchmarks.recipes digits
    python -m benchmarks.recipes folder --presets simclr --seeds 0    # images of CIFAR-10, written as PNG files first

An encoder is scored on the test images, with the training images as neighbors, as by `self-supervised demo`. Each run
is a row of recipes.csv, and a row that is there is not repeated: delete those of a changed recipe. benchmarks.cifar10
repeats the recipes for CIFAR-10.
"""

import itertools
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


def run(params: ModelParams) -> harness.Row:
    """Return kNN accuracies (k = 20) before and after one training and without an encoder, and minutes."""
    model = SelfSupervisedMethod(params)
    before = knn(model.model, params)
    start = time.process_time()
    length = {"max_epochs": params.max_epochs, "num_sanity_val_steps": 0}
    pl.Trainer(accelerator="auto", **length, **harness.QUIET_TRAINER).fit(model)
    minutes = (time.process_time() - start) / 60  # of the processor: the machine may do other work
    facts = {"minutes": round(minutes, 2), "date": time.strftime("%Y-%m-%d"), "commit": harness.commit()}
    return {"random": before, "trained": knn(model.model, params), "pixels": knn(nn.Flatten(), params), **facts}


def knn(encoder: nn.Module, params: ModelParams) -> float:
    return round(validation.knn(*features(encoder, params))["valid_knn20_acc"], 2)


def main(argv: list[str] | None = None) -> None:
    parser = harness.arguments(__doc__, rounds=1)
    kinds = ["digits", "folder"]
    parser.add_argument("recipe", nargs="?", choices=kinds, default=kinds[0], help=f"kind of recipe ({kinds[0]})")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, metavar="PRESET", help="all that have the recipe")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="seeds (0 1 2)")
    args = parser.parse_args(argv)
    harness.silence()
    settings: dict[str, Any] = {"evaluations": [], "num_data_workers": 0}  # minutes include reading the images
    if args.quick:
        args.presets, args.seeds, settings["max_epochs"] = ["vicreg"], [0], 1
    name = "recipes_quick" if args.quick else "recipes"
    rows = harness.finished(args.out / f"{name}.csv")
    rows_before = len(rows)
    with tempfile.TemporaryDirectory() as folder:
        if args.recipe == "folder":
            write_folder(Path(folder))
            settings["data_path"] = folder
        for preset, seed in itertools.product(args.presets or recipes.KINDS[args.recipe].rows, args.seeds):
            known = {"recipe": args.recipe, "preset": preset, "seed": seed}
            if not harness.has(rows, known):
                params = recipes.recipe(preset, args.recipe, **settings, seed=seed)
                rows.append({**known, **run(params)})
                harness.report(name, rows, args.out)
    harness.explain_nothing_new(args.out / f"{name}.csv", rows_before)


if __name__ == "__main__":
    main()
