"""Try learning rates of a recipe on CIFAR-10 with images that the training has not seen; no test image is read.

    python -m benchmarks.sweep cifar10_laptop                        # every preset but distill
    python -m benchmarks.sweep cifar10_laptop --presets vicreg byol
    python -m benchmarks.sweep cifar10_laptop --presets simsiam --fraction 1 --factors 1 3

Each preset has the same tries: a third of its usual learning rate, this rate, and three times as much, or --factors
times the usual rate. A try trains on four fifths of the training images for --fraction of the recipe's epochs, and
whatever the recipe counts in epochs is shorter by the same factor. A logistic regression and kNN (k = 20) are fitted to
the features of the four fifths and scored on the last fifth. Every finished try is a row of sweep_KIND.csv and is not
repeated.
"""

import itertools
import math
import time

import pytorch_lightning as pl
from attrs import evolve

from benchmarks import harness, race
from benchmarks.cifar10 import accuracies_of, arguments, chosen_presets
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised import recipes
from self_supervised.data import data_sets, loading, subsets
from self_supervised.demo import features_of
from self_supervised.networks import encoders
from self_supervised.training.precision import best_precision

FACTORS = (1 / 3, 1, 3)
IN_EPOCHS = ("warmup_epochs", "prototypes_frozen_epochs", "queue_from_epoch")
HELD_OUT = 0.2  # fraction of the images of every class


def usual_lr(preset: str) -> float:
    """The learning rate that a recipe on CIFAR-10 has before a sweep: the tries do not move with what they choose."""
    return recipes.ON_CIFAR10[preset].get("lr", PRESETS[preset]().lr)


def tried(params: ModelParams, fraction: float, reading: dict[str, int]) -> harness.Row:
    """Train on one part of the training images, and return the accuracies on the other part."""
    images = data_sets.get_dataset(params, params.dataset.train_splits)
    parts = [images.subset(rows) for rows in subsets.held_out(images.labels, HELD_OUT)]
    steps = max(1, round(fraction * params.max_epochs * (len(parts[0]) // params.batch_size)))
    method = SelfSupervisedMethod(params, **{name: fraction * getattr(params, name) for name in IN_EPOCHS})
    trainer = pl.Trainer(max_epochs=-1, max_steps=steps, precision=best_precision(method), **harness.QUIET_TRAINER)
    facts = {"steps": steps, "minutes": "", "precision": trainer.precision, "commit": harness.commit()}
    start = time.perf_counter()
    try:
        trainer.fit(method, loading.get_loader(params, parts[0], training=True))
    except FloatingPointError as error:
        print(f"lr={params.lr}: {error}")
        return {"linear %": math.nan, "kNN-20 %": math.nan, **facts}
    facts["minutes"] = round((time.perf_counter() - start) / 60, 1)
    read = evolve(params, **{"transform_crop_size": None, **reading})
    if read.pooling_size > 1:
        encoders.pool_cells(method.model, read)
    scores = accuracies_of(*(x for part in parts for x in features_of(method.model, read, part)))
    return {**scores, **facts}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--fraction", type=float, default=0.3, help="length of a try, relative to the recipe's (0.3)")
    parser.add_argument("--factors", type=float, nargs="+", default=FACTORS, help="tries / usual rate (1/3, 1 and 3)")
    args = parser.parse_args(argv)
    harness.silence()
    kind, settings = recipes.KINDS[args.kind], {"seed": 0, "evaluations": [], "num_data_workers": 0}
    presets = chosen_presets(parser, args)
    if args.quick:
        presets, settings = ["simclr"], {**settings, **race.QUICK, "max_epochs": 1}
    name = "sweep_quick" if args.quick else f"sweep_{args.kind}"
    rows = harness.finished(args.out / f"{name}.csv")
    rows_before = len(rows)
    for preset, factor in itertools.product(presets, args.factors[:1] if args.quick else args.factors):
        params = recipes.recipe(preset, args.kind, **settings, lr=float(f"{factor * usual_lr(preset):.3g}"))
        known = {"preset": preset, "lr": params.lr, "fraction": args.fraction}
        if not harness.has(rows, known):
            rows.append({**known, **tried(params, args.fraction, {} if args.quick else kind.reading)})
            harness.report(name, rows, args.out)
    harness.explain_nothing_new(args.out / f"{name}.csv", rows_before)


if __name__ == "__main__":
    main()
