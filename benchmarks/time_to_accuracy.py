"""Wall-clock seconds from random weights to an accuracy on CIFAR-10, without labels, with a ResNet-18.

    python -m benchmarks.time_to_accuracy sce --torch_compile
    python -m benchmarks.time_to_accuracy byol --epochs 300 --minutes 8.5 --save byol.ckpt       # a first half,
    python -m benchmarks.time_to_accuracy byol --epochs 300 --minutes 17 --resume byol.ckpt      # and the second

Every few epochs, the library's own validation fits the linear probe and kNN on the features of the whole training set
and scores them on the test set. Seconds are counted twice: of training alone (compiling included), and with
evaluations. A resumed run continues both counts. time_to_accuracy_PRESET.csv is complete after every evaluation.

Goals on one H200:

- 85.6 % linear in 2.5 minutes (SimCLR, 100 epochs; published: 20 minutes, A100)
- 90 % linear in 5 minutes (SCE or BYOL, 200 epochs)
- 90 % kNN in 11.7 minutes (published: 99 minutes, A100)
"""

import argparse
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Timer

from benchmarks import harness
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams

ACCURACIES = (85.6, 90.0)  # to be timed, in percent
COMMON = {
    **{"dataset_name": "cifar10", "encoder_arch": "resnet18", "transform_apply_blur": False},
    **{"evaluations": ["linear_probe", "knn"], "probe_on_training_set": True},
}
OF_PRESETS = {  # longer trainings than those of the recipe cifar10_gpu
    "simclr": {
        **{"max_epochs": 100, "batch_size": 512, "lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": 5},
        **{"mlp_hidden_dim": 2048, "mlp_normalization": "bn", "transform_grayscale_probability": 0.1},
    },
    "sce": {
        **{"max_epochs": 200, "batch_size": 256, "lr": 0.06, "weight_decay": 5e-4, "warmup_epochs": 5},
        **{"dim": 256, "K": 4096, "m": 0.99},
    },
    "byol": {
        **{"max_epochs": 200, "batch_size": 256, "lr": 1.0, "weight_decay": 1e-5, "warmup_epochs": 10},
        **{"dim": 256, "mlp_hidden_dim": 4096, "m": 0.99, "lars_eta": 0.02},
        "transform_solarize_probability": [0.0, 0.2],
    },
}
QUICK = {  # seconds on a CPU
    **{"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "max_epochs": 1, "batch_size": 256},
    **{"warmup_epochs": 0, "K": 64, "mlp_hidden_dim": 32, "dim": 16},
}


class EvaluationClock(pl.Callback):
    """Callback that adds a row after each evaluation. Checkpoints have its state: a resumed run continues the count."""

    def __init__(self, seed: int, write: Callable[[list[harness.Row]], None]):
        self.seed, self.write, self.rows = seed, write, []
        self.seconds, self.mark = {"training": 0.0, "evaluation": 0.0, "between": 0.0}, time.perf_counter()

    def count(self, activity: str) -> None:
        """Add the time since the last call to the seconds of an activity."""
        harness.synchronize()
        before, self.mark = self.mark, time.perf_counter()
        self.seconds[activity] += self.mark - before

    def on_train_start(self, *_: Any) -> None:
        self.count("between")

    def on_train_end(self, *_: Any) -> None:
        self.count("training")

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count("training" if trainer.state.fn == "fit" else "between")

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.count("evaluation")
        scores, training = trainer.callback_metrics, self.seconds["training"]
        row = {
            "seed": self.seed,
            "epoch": trainer.current_epoch + (trainer.state.fn == "fit"),  # it is counted when it is over
            "training s": training,
            "with evaluations s": training + self.seconds["evaluation"],
            "linear %": float(scores["valid_class_acc_trainset"]),
            "kNN-200 %": float(scores["valid_knn200_acc_trainset"]),
        }
        self.rows.append(row)
        self.write(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.rows = state["seconds"], state["rows"]


def run(args: argparse.Namespace, params: ModelParams, clock: EvaluationClock) -> None:
    """Train, save the checkpoint, and evaluate the encoder if the last epoch was not evaluated."""
    on_gpu = torch.cuda.is_available()
    timer = [Timer(timedelta(minutes=args.minutes), interval="epoch")] if args.minutes else []
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if on_gpu else "32-true",
        benchmark=True,
        max_epochs=params.max_epochs,
        check_val_every_n_epoch=args.every,
        num_sanity_val_steps=0,
        callbacks=[clock, *timer],
        **harness.QUIET_TRAINER,
    )
    model = SelfSupervisedMethod(params)
    trainer.fit(model, ckpt_path=args.resume)
    if args.save:
        trainer.save_checkpoint(args.save, weights_only=False)
    if not clock.rows or clock.rows[-1]["epoch"] < trainer.current_epoch:
        trainer.validate(model, verbose=False)


def summary(rows: list[harness.Row]) -> str:
    lines = []
    for name in ("linear %", "kNN-200 %"):
        for accuracy in ACCURACIES:
            first = next((row for row in rows if row[name] >= accuracy), None)
            when = f"{first['training s']:.0f} s of training, epoch {first['epoch']}" if first else "not reached"
            lines.append(f"{accuracy} {name}: {when}")
    return "\n".join(lines)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.arguments(__doc__, rounds=1)
    parser.add_argument("preset", nargs="?", choices=OF_PRESETS, default="sce")
    parser.add_argument("--epochs", type=int, help="length of the run, and of its schedules")
    parser.add_argument("--batch_size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--torch_compile", nargs="?", const=True, default=False, metavar="MODE")
    parser.add_argument("--every", type=int, default=10, help="epochs between evaluations (10)")
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which training has taken so long in all")
    parser.add_argument("--save", help="a checkpoint of the end")
    parser.add_argument("--resume", help="a checkpoint to go on from")
    args = parser.parse_args(argv)
    if args.rounds > 1 and (args.save or args.resume):
        parser.error("--save and --resume are for --rounds 1: further rounds are runs with further seeds")
    return args


def settings(args: argparse.Namespace, seed: int) -> ModelParams:
    given = {"max_epochs": args.epochs, "batch_size": args.batch_size, "lr": args.lr}
    given = {name: value for name, value in given.items() if value is not None}
    compiled = {"torch_compile": args.torch_compile}
    quick = QUICK if args.quick else {}
    chosen = {**COMMON, **OF_PRESETS[args.preset], **quick, **given, **compiled}
    return PRESETS[args.preset](**chosen, seed=seed)


def main(argv: list[str] | None = None) -> None:
    args, finished = arguments(argv), []
    harness.silence()

    def write(rows: list[harness.Row]) -> None:
        harness.report(f"time_to_accuracy_{args.preset}", finished + rows, args.out)

    for seed in range(args.rounds):
        clock = EvaluationClock(seed, write)
        run(args, settings(args, seed), clock)
        finished = finished + clock.rows
        print(f"\n{args.preset}, seed {seed}:\n{summary(clock.rows)}", flush=True)


if __name__ == "__main__":
    main()
