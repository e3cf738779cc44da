"""The encoders that a trained one is compared with: random weights, and those from which its training started."""

from pathlib import Path

import attrs
from pytorch_lightning.utilities import rank_zero_warn

from model_params import DATASET_DEFAULTS, EncoderAndDataParams
from self_supervised import catalogue
from self_supervised.data.foreign_paths import ForeignPath, refuse_changed
from self_supervised.networks import encoders
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.pretrained import load_encoder
from self_supervised.networks.published import is_published, published
from self_supervised.numerics import seeded
from self_supervised.setting_groups import MEAN_AND_STD, SAME_IN_STARTING


def compared(trained: Encoder, starting_weights: str | Path | None) -> dict[str, Encoder]:
    """Return the encoders to compare a trained one with, by name.

    "random" has the same architecture; there is none for a user's own module. "starting" has the weights from which
    the pretraining started: `starting_weights`, or those that the checkpoint names.
    """
    baselines = {}
    if trained.params.encoder_arch != catalogue.OWN_MODULE:
        baselines["random"] = random_encoder(trained)
    source = starting_weights or trained.started_from
    if isinstance(source, ForeignPath):
        rank_zero_warn(
            f"the checkpoint started from {str(source)!r}. That file is only read if you pass starting_weights"
        )
    elif source is not None:
        try:
            if not starting_weights:
                refuse_changed(source, trained.report.started_from_hash)
            baselines["starting"] = starting_encoder(trained.params, str(source))
        except OSError as error:
            if starting_weights:
                raise
            rank_zero_warn(f"the weights from which the training started are left out: {error}")
    return baselines


def starting_encoder(p: EncoderAndDataParams, source: str) -> Encoder:
    """Return the encoder before a training with these settings, which started from the file or name `source`."""
    same = {name: getattr(p, name) for name in (*SAME_IN_STARTING, *DATASET_DEFAULTS)}
    same["low_resolution_stem"] = p.low_resolution
    same |= {"stem_variant": p.stem_variant} if p.low_resolution else {}
    if p.encoder_arch in catalogue.INCEPTIONS:
        same |= dict.fromkeys(MEAN_AND_STD, catalogue.OF_INCEPTIONS[:1] * p.channels)
    if source.startswith("timm:") and source.split(".")[0] == p.encoder_arch.split(".")[0]:
        same["encoder_arch"] = source  # the same architecture with other weights
    with seeded(0):
        return published(source, same, new_stem=True) if is_published(source) else load_encoder(source, **same)


def random_encoder(trained: Encoder) -> Encoder:
    """Return an encoder with random weights of seed 0, otherwise like `trained`."""
    with seeded(0):
        model, _ = encoders.get_encoder(attrs.evolve(trained.params, encoder_weights=None))
    report = attrs.evolve(trained.report, source="no file", layout="random weights of seed 0", left_out=())
    return Encoder(model, trained.params, report)
