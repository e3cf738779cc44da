"""The floating-point precision of a training: chosen for the machine, and float32 where a CPU's bfloat16 is wrong."""

import copy
import os
import statistics
import time
from functools import cache
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from self_supervised.convolutions import PointConv2d
from self_supervised.networks.encoders import FASTEST_LAYOUT

VARIABLE = "SELF_SUPERVISED_PRECISION"  # environment variable with the precision that "auto" means
LEAST_SPEEDUP = 1.1  # of bfloat16: less is within the noise of a measurement on a busy machine
ROUNDS, SECONDS = 3, 1.0  # most rounds of the measurement, and seconds after which no further round begins
BFLOAT16_ON_CPU = ("bf16-mixed", "16-mixed", "bf16-true")  # Lightning turns float16 into bfloat16 there
CONVERTS_WEIGHTS = ("bf16-true", "16-true", "64-true")
AMPERE = (8, 0)  # compute capability of the first GPUs that multiply bfloat16


# ---- The choice ----


def best_precision(method: Any, accelerator: str = "auto", n_processes: int = 1) -> str:
    """Return the fastest safe precision of a method on this machine, for pl.Trainer(precision=...), and log the reason.

    Args:
        method: SelfSupervisedMethod or LinearClassifierMethod. On a CPU, passes of its encoder are timed.
        accelerator, n_processes: kind of device and number of processes of the Trainer.
    """
    precision, reason = choose(method, accelerator, n_processes)
    rank_zero_info(f"precision: {precision} ({reason})")
    return precision


def choose(method: Any, accelerator: str = "auto", n_processes: int = 1) -> tuple[str, str]:
    """Return (precision, reason). Processes on different GPUs may choose differently; monitor.py refuses that."""
    if precision := os.environ.get(VARIABLE):
        return precision, VARIABLE
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        if torch.cuda.get_device_capability() >= AMPERE:
            return "bf16-mixed", "this GPU has bfloat16"
        return "32-true", "this GPU has no bfloat16"
    if accelerator not in ("auto", "cpu") or torch.backends.mps.is_available() and accelerator == "auto":
        return "32-true", "bfloat16 is for NVIDIA's GPUs and for CPUs"
    if not has_bfloat16():
        return "32-true", "this processor has no bfloat16"
    if any(isinstance(layer, nn.Conv3d) and layer.kernel_size[0] > 1 for layer in method.model.modules()):
        return "32-true", "PyTorch's bfloat16 gradients of convolutions over time are wrong on CPUs"
    if n_processes > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        return "32-true", "the processor's speed is only measured for a single process"
    try:
        ratio = speedup(method.model, method.params.input_shape)
    except RuntimeError as error:
        return "32-true", f"the encoder cannot be computed in bfloat16: {str(error).splitlines()[0]}"
    reason = f"this processor computes bfloat16 {ratio:.1f} times as fast as float32"
    return ("bf16-mixed" if ratio >= LEAST_SPEEDUP else "32-true"), reason


def has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def speedup(encoder: nn.Module, shape: tuple[int, ...]) -> float:
    """Return by which factor bfloat16 shortens the encoder's forward and backward pass, on a few random images."""
    encoder = copy.deepcopy(encoder).train()
    keep_exact(encoder)
    times: dict[bool, list[float]] = {True: [], False: []}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        images = torch.randn(32 if shape[-1] <= 64 else 8, *shape)  # with fewer, casts of weights would dominate
        images = images.to(memory_format=FASTEST_LAYOUT[images.dim()])
        end = time.perf_counter() + SECONDS
        for turn in range(1 + ROUNDS):
            for half in times:
                start = time.perf_counter()
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    output = encoder(images)
                output.float().sum().backward()
                times[half].append(time.perf_counter() - start)
            if turn > 0 and time.perf_counter() > end:
                break
    float32, bfloat16 = (statistics.median(times[half][1:]) for half in (False, True))  # the first prepares kernels
    return float32 / bfloat16


# ---- Layers whose bfloat16 gradients are wrong on CPUs ----


def keep_exact(module: nn.Module) -> list[RemovableHandle]:
    """Make the layers for which `has_wrong_gradient` holds compute in float32 under a CPU's autocast."""
    kinds = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.LayerNorm
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    before = [layer.register_forward_pre_hook(begin_float32) for layer in layers]
    return before + [layer.register_forward_hook(end_float32, always_call=True) for layer in layers]


def begin_float32(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor] | None:
    x = inputs[0]
    if x.device.type != "cpu" or not torch.is_grad_enabled() or not has_wrong_gradient(layer, x.shape):
        return None
    if torch.is_autocast_enabled("cpu"):
        layer.in_float32 = True
        torch.set_autocast_enabled("cpu", False)
        return (x.float(),)
    if x.dtype == torch.bfloat16:
        raise ValueError(
            f"precision='bf16-true': PyTorch's bfloat16 gradient of {layer} is wrong for inputs of {tuple(x.shape)} on "
            "CPUs. Use 'bf16-mixed', which computes this layer in float32."
        )
    return None


def end_float32(layer: nn.Module, _: Any, output: Tensor | None) -> Tensor | None:
    if not layer.__dict__.pop("in_float32", False):
        return None
    torch.set_autocast_enabled("cpu", True)
    return None if output is None else output.to(torch.get_autocast_dtype("cpu"))


def has_wrong_gradient(layer: nn.Module, shape: torch.Size) -> bool:
    """Return whether the bfloat16 gradient of this layer's weight may be wrong on a CPU, for an input of this shape.

    With torch 2.14, layer norm sums the gradients of all rows in bfloat16, so that most of them are lost among many.
    In the gradients of convolutions, taps that only see padding may be left uninitialized (1e34, NaN), as may all
    taps if the stride skips a single pixel, or over time; some of these kernels also write out of bounds. The gradients
    of other layers agree with float32 to rounding.
    """
    if isinstance(layer, nn.LayerNorm) or (isinstance(layer, nn.Conv3d) and layer.kernel_size[0] > 1):
        return True
    sizes = shape[-len(layer.kernel_size) :]
    if isinstance(layer, PointConv2d) and layer.is_linear(*sizes):
        return False
    if isinstance(layer.padding, str):
        return min(sizes) < max(layer.kernel_size)
    axes = zip(sizes, layer.kernel_size, layer.stride, layer.padding, layer.dilation, strict=True)
    return any(has_blind_tap(*axis) for axis in axes)


@cache
def has_blind_tap(size: int, kernel: int, stride: int, padding: int, dilation: int) -> bool:
    """Return whether, along one axis, some tap of the kernel only sees padding, or the stride skips a single pixel."""
    if size == 1 and stride > 1:
        return True
    outputs = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    starts = range(-padding, -padding + outputs * stride, stride)
    return any(all(not 0 <= start + tap * dilation < size for start in starts) for tap in range(kernel))


def refuse_another_type(method: Any) -> None:
    """Raise ValueError if weights are not in float32 and the Trainer, which does not convert them, would train them in
    their own type. Another Trainer may have left them so."""
    precision = method.trainer.precision
    types = {w.dtype for w in method.parameters() if w.requires_grad and w.is_floating_point()} - {torch.float32}
    if types and precision not in CONVERTS_WEIGHTS:
        raise ValueError(
            f"precision={precision!r}: the weights are {types.pop()}, perhaps left by another Trainer. Call float() on "
            "the method first."
        )


def refuse_half_precision(precision: str, m: float) -> None:
    """Raise ValueError if the lagging model, which keeps m of itself at each step, would be in half precision."""
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"precision={precision!r} is too low for the lagging model: half precision rounds its updates, which "
            f"have the weight 1 - m = {1 - m:.2g}, to zero. Use {precision.replace('true', 'mixed')!r}."
        )
