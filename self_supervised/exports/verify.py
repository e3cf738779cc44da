"""Verification that an exported file gives the encoder's embeddings, in a process without this project's modules."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.numerics import finite

# largest difference of each output, relative to its largest absolute value
TOLERANCES = {"embeddings": 1e-5, "probabilities": 1e-3}  # a classifier multiplies differences by its weights


@torch.no_grad()
def sample_images(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """Return two photographs and two noise images, normalized, [4, C, H, W], and their embeddings [4, E]."""
    p = encoder.params
    photographs = torch.from_numpy(np.stack(load_sample_images().images)).permute(0, 3, 1, 2)
    photographs = photographs.repeat(1, -(-p.channels // 3), 1, 1)[:, : p.channels]
    noise = torch.randint(256, (2, p.channels, p.crop_size, p.crop_size), generator=torch.Generator().manual_seed(0))
    images = torch.cat([encoder.prepare(photographs), encoder.prepare(noise.to(torch.uint8))]).contiguous()
    return images, finite(encoder(images), "embeddings of the images to compare")


def verified(file: Path, code: str, images: Tensor, expected: dict[str, Tensor]) -> float:
    """Return the largest relative difference of the embeddings that `code` computes with the file in a new process.

    Args:
        expected: "embeddings", and "probabilities" if the file has a classifier.

    Raises:
        RuntimeError: the code fails, or its outputs differ by more than TOLERANCES.
    """
    folder = file.parent
    (folder / "load.py").write_text(code)
    np.save(folder / "images.npy", images.numpy())
    program = Path(__file__).with_name("fresh.py")
    command = [sys.executable, "-P", program, "load.py", file.name, "images.npy", "outputs.npz", *expected]
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if run.returncode:
        reason = (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1]
        raise RuntimeError(f"the exported file cannot be loaded in a new process and was removed: {reason}")
    with np.load(folder / "outputs.npz") as outputs:
        differences = {name: checked_difference(name, outputs[name], of_ours) for name, of_ours in expected.items()}
    return differences["embeddings"]


def checked_difference(name: str, found: np.ndarray, expected: Tensor) -> float:
    """Return the largest difference of an output, relative to the largest absolute value of ours."""
    if found.shape != expected.shape:
        raise RuntimeError(
            f"the exported file gives {name} of shape {found.shape} instead of {tuple(expected.shape)} and was removed"
        )
    scale = float(expected.abs().max()) or 1.0
    difference = float(np.abs(found - expected.numpy()).max()) / scale
    if not difference <= TOLERANCES[name]:
        raise RuntimeError(
            f"the exported file gives different {name} (by {difference:.1e} of the largest value) and was removed"
        )
    return difference
