"""Memory and time of a step whose batch is encoded in parts (`micro_batch_size`), and of one whose activations are
computed again (`activation_checkpointing`), beside plain steps.

    python -m benchmarks.micro_batches
    python -m benchmarks.micro_batches --batch 512 --part 64 --rounds 3
    python -m benchmarks.micro_batches --only activation_checkpointing

SimCLR, ResNet-18 with the standard stem, two views of 32 or 96 pixels. Each row has a process of its own; seconds are
the median of the steps after the first. To reach: 2,048 images in 32 parts within 2 GB and within 10 % of the memory of
a batch of one part's size, and at most 1.4x the time of the whole batch where that fits. For activations: ResNet-50 at
224 pixels, 64 images; to reach: half the memory.
"""

import argparse
import statistics
import time

import pytorch_lightning as pl
import torch

from benchmarks.harness import QUIET_TRAINER, Row, arguments, in_fresh_process, report, silence
from moco import SelfSupervisedMethod
from model_params import PRESETS


class Clock(pl.Callback):
    def __init__(self):
        self.times = [time.perf_counter()]

    def on_train_batch_end(self, *_):
        self.times.append(time.perf_counter())


def seconds_per_step(settings: dict, steps: int) -> float:
    """Return the median time of a step after the first."""
    silence()
    torch.set_num_threads(1)
    params = PRESETS["simclr"](dataset_name="cifar10", low_resolution_stem=False, evaluations=[], seed=0, **settings)
    batch, pixels = params.batch_size, params.crop_size
    clock, images = Clock(), torch.randint(256, (batch * steps, 3, pixels, pixels), dtype=torch.uint8)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images), batch_size=batch)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[clock], **QUIET_TRAINER)
    trainer.fit(SelfSupervisedMethod(params), loader)
    return statistics.median(later - before for before, later in zip(clock.times[1:], clock.times[2:], strict=False))


def row(shown: dict, settings: dict, steps: int) -> Row:
    seconds, megabytes = in_fresh_process(seconds_per_step, settings, steps)
    figures = {"peak MB": round(megabytes), "s/step": seconds, "images/s": settings["batch_size"] / seconds}
    return {**shown, **figures}


def micro_batches(options: argparse.Namespace, steps: int) -> list[Row]:
    part = 4 if options.quick else options.part
    batches = {32: 16} if options.quick else {32: options.batch, 96: options.batch // 4}
    return [
        row(
            {"pixels": pixels, "images of the loss": images, "encoded at once": size or images},
            {"transform_crop_size": pixels, "batch_size": images, "micro_batch_size": size},
            steps,
        )
        for pixels, batch in batches.items()
        for images, size in ((part, None), (batch, part), (batch, None))
    ]


def activation_checkpointing(options: argparse.Namespace, steps: int) -> list[Row]:
    size = (
        {"transform_crop_size": 32, "batch_size": 2}
        if options.quick
        else {"transform_crop_size": 224, "batch_size": 64}
    )
    settings = {**size, "encoder_arch": "resnet18" if options.quick else "resnet50"}
    return [
        row({"activations": name}, {**settings, "activation_checkpointing": again}, steps)
        for name, again in (("kept", False), ("computed again", True))
    ]


TABLES = {"micro_batches": micro_batches, "activation_checkpointing": activation_checkpointing}


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument(
        "--batch", type=int, default=2048, help="images of the loss; a quarter of them at 96 pixels (2048)"
    )
    parser.add_argument("--part", type=int, default=64, help="images that are encoded at once (64)")
    parser.add_argument("--only", choices=TABLES, help="one of the tables")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)  # as in the processes: the file names the threads
    steps = 2 if options.quick else options.rounds + 1
    for name in [options.only] if options.only else TABLES:
        report(name, TABLES[name](options, steps), options.out)


if __name__ == "__main__":
    main()
