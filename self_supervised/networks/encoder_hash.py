"""Hashes that identify an encoder, and the checkpoint that it is from."""

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch

from self_supervised.catalogue import OWN_MODULE
from self_supervised.networks.encoders import embeddings_of
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.safe_files import file_hash


def encoder_hash(encoder: Encoder) -> str:
    """Return a hash of the encoder's structure (strides and paddings are not in the tensors) and of its tensors.

    For a user's own module, the hash includes its output for two fixed images: its `forward` is in neither.
    """
    digest = hashlib.sha256(repr(encoder.model).encode())
    if encoder.params.pooling_size > 1:  # timm's layers do not show it
        digest.update(f"pooling_size {encoder.params.pooling_size}".encode())
    if encoder.params.encoder_arch == OWN_MODULE:
        digest.update(outputs(encoder).tobytes())
    for name, tensor in sorted(encoder.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoint_hash(encoder: Encoder) -> str:
    """Return the SHA-256 of the checkpoint file; of the tensors if there is no file (published weights by name)."""
    if (path := Path(encoder.report.source)).is_file():
        return file_hash(path)
    tensors = hashlib.sha256()
    for name, tensor in encoder.model.state_dict().items():
        tensors.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return tensors.hexdigest()


def outputs(encoder: Encoder) -> np.ndarray:
    """Return embeddings of two fixed random images, rounded to six digits.

    They are computed in float64 on the CPU, so that they are the same on every device. If the module does not support
    float64, only their mean and spread are returned, rounded to three digits: float32 differs between processors.
    """
    images = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *encoder.params.input_shape)))
    decimals = 6
    with torch.no_grad():
        try:
            x = embeddings_of(copy.deepcopy(encoder.model).to("cpu", torch.float64), images)
        except (RuntimeError, TypeError):  # another dtype inside, or a module that cannot be copied
            x = encoder(images.to(encoder.device, torch.float32)).cpu().double()
            x, decimals = torch.stack([x.mean(), x.std()]), 3
    return (x / x.abs().max().clamp(min=1e-30)).round(decimals=decimals).add(0.0).numpy()  # no -0.0
