"""A part of a batch whose training fits into a given memory: two steps are measured for each size that is tried, in a
process of its own."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import attrs
import torch
from rich.console import Console

from model_params import ModelParams
from self_supervised.program import is_out_of_memory
from self_supervised.runs.dry_run import Stop, empty_table, peak_memory, two_steps
from self_supervised.runs.run_options import RunOptions, bytes_of

FIRST = 64  # images: the memory of so many, and of twice as many, shows that of an image
SMALLEST_PART = 3  # images in a part: batch norm needs two, and parts of at most two end with one
FILLED = 0.95  # of the memory that the estimate may fill


@attrs.frozen
class Measured:
    """Two steps: peak memory in bytes and seconds of the second step; None: the memory was not enough."""

    bytes: int | None
    seconds: float = 0.0


def print_memory_plan(params: ModelParams, options: RunOptions) -> None:
    """Print the sizes that were measured, and the options with which the training fits into `options.fit_memory`.

    Raises:
        ValueError: there are several processes, or not even single images fit.
    """
    limit = bytes_of(options.fit_memory or "")
    n_gpus = torch.cuda.device_count() if options.devices == "auto" and options.accelerator != "cpu" else 1
    if options.n_processes > 1 or n_gpus > 1:
        raise ValueError("fit_memory measures a single process. Pass --devices 1, and the batch_size of one process.")
    options = attrs.evolve(options, devices=1, num_nodes=1, strategy="auto")
    images = params.batch_size
    if params.global_batch_size:
        images = params.global_batch_size // options.accumulate_grad_batches
    tried: dict[tuple[int, int], Measured] = {}  # (images of the loss, encoded at once) -> measured

    def measure(batch: int, part: int) -> int | None:
        changes = {"batch_size": batch, "global_batch_size": None, "micro_batch_size": part if part < batch else None}
        if (batch, part) not in tried:
            tried[batch, part] = in_own_process(attrs.evolve(params, **changes), options)
        return tried[batch, part].bytes

    part = first_guess(images, limit, measure)
    while (needed := measure(images, part)) is None or needed > limit:
        if part <= SMALLEST_PART:
            raise ValueError(f"fit_memory={options.fit_memory}: {part} images need more. Choose a smaller encoder.")
        part = max(SMALLEST_PART, 2 ** ((part - 1).bit_length() - 1))
    made = empty_table(
        f"Memory, at most {options.fit_memory}", "images of the loss", "encoded at once", "peak", "s/step"
    )
    for (batch, size), result in tried.items():
        peak = "not enough" if result.bytes is None else f"{result.bytes / 1e9:.2f} GB"
        made.add_row(f"{batch:,}", f"{size:,}", peak, f"{result.seconds:.3g}")
    console = Console(highlight=False, markup=False)
    console.print(made)
    console.print(proposal(images, part, options.accumulate_grad_batches), soft_wrap=True)


def first_guess(images: int, limit: int, measure: Callable[[int, int], int | None]) -> int:
    """Return the number of images to encode at once, from the memory of two small batches."""
    if images <= 2 * FIRST:
        return images
    one, two = measure(FIRST, FIRST), measure(2 * FIRST, 2 * FIRST)
    if one is None or two is None:
        return FIRST
    of_image = max(1.0, (two - one) / FIRST)
    fitting = int((FILLED * limit - one) / of_image) + FIRST
    return images if fitting >= images else max(SMALLEST_PART, 2 ** (max(1, fitting).bit_length() - 1))


def proposal(images: int, part: int, accumulated: int) -> str:
    """Return the options with which a batch of `images` fits if `part` of them are encoded at once."""
    if part >= images:
        return f"The batch of {images:,} images fits: no other options are needed."
    total = images * accumulated
    steps = next(n for n in range(1, total + 1) if total % n == 0 and total // n <= part)
    accumulation = (
        f"Or --global_batch_size {total} --accumulate_grad_batches {steps}: less time, but only the {total // steps:,} "
        "images of a batch are compared. "
    )
    return (
        f"--micro_batch_size {part} fits: the same loss of {images:,} images, encoded in {-(-images // part)} parts. "
        f"{accumulation if 2 * (total // steps) > part else ''}"  # no divisor is near, such as that of a prime number
        "--activation_checkpointing makes room for larger parts."
    )


def in_own_process(params: ModelParams, options: RunOptions) -> Measured:
    """Measure two steps in a new process, whose peak memory is theirs, and which the system may end for lack of it."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_measured, params, options).result()
        except BrokenProcessPool:
            return Measured(None)


def _measured(params: ModelParams, options: RunOptions) -> Measured:
    for stream in (1, 2):  # nothing is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    stop = Stop()
    try:
        _, trainer = two_steps(params, options, stop)
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            return Measured(None)
        raise
    return Measured(peak_memory(trainer.strategy.root_device), stop.seconds_per_step)
