"""Encoders to compare a trained one with: a random one of the same architecture, and what it started from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import attrs
import torch
from pytorch_lightning.utilities import rank_zero_warn

from catalogue import OWN_MODULE
from encoders import get_encoder
from foreign_paths import ForeignPath
from model_params import OF_ONE_KIND
from weights import Encoder, load_encoder


def compared(trained: Encoder, starting_weights: str | Path | None) -> dict[str, Encoder]:
    """A random encoder of the same architecture (one's own module has none), and the starting weights, if any."""
    found, p = {}, trained.params
    if p.encoder_arch != OWN_MODULE:
        found["random"] = random_encoder(trained)
    source = starting_weights or trained.started_from
    if isinstance(source, ForeignPath):
        rank_zero_warn(
            f"the checkpoint started from {str(source)!r}, it says. That file is not read unless you ask for it: pass "
            "starting_weights to compare with it"
        )
    elif source is not None:
        same = (
            "dataset_name",
            "encoder_arch",
            "in_channels",
            "transform_crop_size",
            "image_mean",
            "image_std",
            *OF_ONE_KIND,
        )
        same = {name: getattr(p, name) for name in same} | {"low_resolution_stem": p.low_resolution}
        with seeded():  # a stem of another kind starts from random weights
            found["starting"] = load_encoder(source, **same)
    return found


def random_encoder(trained: Encoder) -> Encoder:
    """Freshly initialized, otherwise the same."""
    with seeded():
        model, _ = get_encoder(attrs.evolve(trained.params, encoder_weights=None))
    report = attrs.evolve(trained.report, source="no file", layout="random weights of seed 0", left_out=())
    return Encoder(model, trained.params, report)


@contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
