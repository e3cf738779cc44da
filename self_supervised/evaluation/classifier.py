"""Classifier of images: a linear layer on the embeddings of a frozen encoder, fitted to a few labeled images.

It is stored as a checkpoint of LinearClassifierMethod, together with the encoder.
"""

import copy
from pathlib import Path

import attrs
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from attrs import frozen
from torch import Tensor, nn

from linear_classifier import LinearClassifierMethod
from self_supervised.catalogue import OWN_MODULE
from self_supervised.evaluation.linear_models import linear_logits, standardized, within_span
from self_supervised.evaluation.probes import DECAY_OF_FEW, DECAYS
from self_supervised.fields import plain
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.networks.layouts import OURS
from self_supervised.safe_files import atomic_file
from self_supervised.setting_groups import PATH_FIELDS

HELD_OUT_FOLDS = 5
PROBABILITY_PRECISION = 1e-6  # of the scores
DECAYS_OF_FEW = tuple(decay for decay in DECAYS if decay >= 0.1)  # weaker ones make most probabilities 0 or 1


class ImageClassifier(nn.Module):
    """Frozen encoder, the layer that turns its embeddings into logits, and the names of the classes."""

    def __init__(self, encoder: Encoder, head: nn.Module, class_names: list[str]):
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.class_names = class_names
        self.eval()

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities [N, C] of the classes for uint8 images [N, C, H, W] of any size.

        For multiple clips per video, they are those of the mean embedding.
        """
        return self.head(self.encoder.embed(images)).softmax(1)

    def save(self, path: Path) -> None:
        """Write a checkpoint that LinearClassifierMethod, load_encoder and `classifier_of` read. It names none of the
        images on which the encoder was trained."""
        p = self.encoder.params
        names = {"class_names": self.class_names, "n_classes": len(self.class_names)}
        if p.dataset.multi_label:  # but each image of this classifier has one class
            names["dataset_name"] = "folder"
        parts = {"model": self.encoder.model, "classifier": self.head}
        content = {
            "state_dict": {f"{part}.{key}": x for part, m in parts.items() for key, x in m.state_dict().items()},
            "hyper_parameters": plain(attrs.asdict(p)) | dict.fromkeys(PATH_FIELDS) | names,
            "pytorch-lightning_version": pl.__version__,
        }
        with atomic_file(path) as unfinished, unfinished.open("wb") as file:
            torch.save(content, file)


def classifier_of(encoder: Encoder) -> ImageClassifier | None:
    """Return the classifier in the checkpoint from which the encoder was loaded: one that `ImageClassifier.save` or
    LinearClassifierMethod wrote. None if there is none."""
    name = f"{LinearClassifierMethod.CLASSIFIER}.weight"
    if encoder.report.layout != OURS.name or name not in encoder.report.left_out:
        return None
    own = copy.deepcopy(encoder.model) if encoder.params.encoder_arch == OWN_MODULE else None
    method = LinearClassifierMethod.load_from_checkpoint(encoder.report.source, encoder=own).cpu()
    if encoder.params.pooling_size != method.params.pooling_size:
        raise ValueError(
            f"pooling_size={encoder.params.pooling_size}, but the classifier reads pooling_size="
            f"{method.params.pooling_size}: leave it out"
        )
    names = method.hparams.class_names or [str(i) for i in range(method.n_outputs)]
    head = nn.Sequential(method.normalize or nn.Identity(), method.classifier)
    return ImageClassifier(encoder, head.requires_grad_(False), names)


# ---- fitting ----


@frozen
class Fit:
    """Linear classifier, and what it would have predicted for each image without that image's label."""

    head: nn.Linear
    decay: float  # L2, scikit-learn's 1 / C
    predicted: np.ndarray  # class [N] of each image when it was held out; -1 for the only image of a class


def fit_few(x: Tensor, target: Tensor) -> Fit:
    """Fit logistic regression on standardized embeddings x [N, E] with classes `target` [N] from 0 to C - 1.

    L2 is the one of DECAYS_OF_FEW with the lowest cross entropy in a stratified cross-validation of the labeled images;
    if every class has a single image, it is DECAY_OF_FEW. Accuracy would leave many values equal.
    """
    n, width = x.shape
    units = torch.cat([torch.eye(width), torch.zeros(1, width)]).double()  # their logits are weights + bias, and bias
    scaled, units = standardized(x.double(), units)
    fold = fold_of_each(target.numpy())
    rows = torch.from_numpy(np.flatnonzero(fold >= 0))
    decay = DECAY_OF_FEW
    predicted = np.full(n, -1)
    if len(rows):
        inner, _ = within_span(scaled, scaled)
        logits = {decay: held_out_logits(inner, target, fold, decay)[rows] for decay in DECAYS_OF_FEW}
        decay = min(logits, key=lambda decay: float(F.cross_entropy(logits[decay], target[rows])))
        predicted[rows] = logits[decay].argmax(1).numpy()
    _, of_units = linear_logits(scaled, units, target, decay, PROBABILITY_PRECISION)
    head = nn.Linear(width, of_units.shape[1]).requires_grad_(False)
    head.weight.copy_((of_units[:-1] - of_units[-1]).T)
    head.bias.copy_(of_units[-1])
    return Fit(head, decay, predicted)


def fold_of_each(target: np.ndarray) -> np.ndarray:
    """Return the fold [N] in which each image is held out, always the same ones. The images of a class are spread over
    the folds; the only image of a class is in none (-1), so that all classifiers know all classes."""
    rng = np.random.default_rng(0)
    fold = np.full(len(target), -1)
    first = 0
    for label in range(target.max() + 1):
        rows = rng.permutation(np.flatnonzero(target == label))
        if len(rows) > 1:
            fold[rows] = (first + np.arange(len(rows))) % HELD_OUT_FOLDS
            first += len(rows)  # so that the folds have the same size
    return fold


def held_out_logits(x: Tensor, target: Tensor, fold: np.ndarray, decay: float) -> Tensor:
    """Return the logits [N, C] of each image by the classifier that is fitted to the other folds."""
    logits = x.new_zeros(len(x), int(target.max()) + 1)
    for i in np.unique(fold[fold >= 0]):
        held_out = torch.from_numpy(fold == i)
        logits[held_out] = linear_logits(x[~held_out], x[held_out], target[~held_out], decay, PROBABILITY_PRECISION)[1]
    return logits
