"""Pretrain, then score: the encoder before and after, and a linear classifier on it.

    python train.py simclr --dataset_name cifar10 --low_resolution_stem false --max_epochs 3 --linear_epochs 5

The first argument is a preset; every field of ModelParams is an option. DATA_PATH says where data sets are.
"""

import argparse
import ast
import json
import time
from pathlib import Path

import attrs
import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams


def value(text: str):
    """3 -> int, 0.3 -> float, true -> bool, none -> None, [1, 0.1] -> list, everything else a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        return text


def arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter, allow_abbrev=False)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--out", type=Path, help="folder of the run; default: runs/PRESET_DATASET")
    parser.add_argument(
        "--linear_epochs", type=int, default=0, help="train LinearClassifierMethod this long afterwards"
    )
    parser.add_argument("--linear_lr", type=float, default=30.0)
    parser.add_argument("--precision", choices=["32-true", "16-mixed", "bf16-mixed"], default="32-true")
    fields = parser.add_argument_group("fields of ModelParams (see model_params.py)")
    for field in attrs.fields(ModelParams):
        fields.add_argument(f"--{field.name}", type=value, default=argparse.SUPPRESS, metavar="VALUE")
    return parser.parse_args()


def trainer(out: Path, name: str, epochs: int, precision: str) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=epochs,
        precision=precision,
        logger=[CSVLogger(out, name=name, version=""), TensorBoardLogger(out, name=name, version="")],
        enable_checkpointing=False,
        callbacks=[RichProgressBar()],
        num_sanity_val_steps=0,
    )


def main() -> None:
    args = vars(arguments())
    preset, out, precision = args.pop("preset"), args.pop("out"), args.pop("precision")
    linear_epochs, linear_lr = args.pop("linear_epochs"), args.pop("linear_lr")
    params = PRESETS[preset](**args)
    out = out or Path("runs") / f"{preset}_{params.dataset_name}"
    model = SelfSupervisedMethod(params)
    results = {"preset": preset, "epochs": params.max_epochs}

    pretraining = trainer(out, "pretraining", params.max_epochs, precision)
    results["random encoder"] = pretraining.validate(model, verbose=False)[0]
    start = time.time()
    pretraining.fit(model)
    results["pretraining minutes"] = (time.time() - start) / 60
    pretraining.save_checkpoint(out / "pretrained.ckpt")
    results["trained encoder"] = pretraining.validate(model, verbose=False)[0]

    if linear_epochs:
        linear = LinearClassifierMethod.from_moco_checkpoint(out / "pretrained.ckpt", lr=linear_lr)
        stage = trainer(out, "linear", linear_epochs, precision)
        start = time.time()
        stage.fit(linear)
        results["linear minutes"] = (time.time() - start) / 60
        results["linear classifier"] = {
            k: v.item() for k, v in stage.callback_metrics.items() if k.startswith("valid_")
        }
        stage.save_checkpoint(out / "linear.ckpt")
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
