"""Online linear classifier: trained alongside the method on the embeddings of its training step, without gradients to
the encoder. It scores like a classifier that is trained afterwards (SimCLR, https://arxiv.org/abs/2002.05709, B.6)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_params import ModelParams
from self_supervised import distributed
from self_supervised.data import facts
from self_supervised.data.class_labels import UNLABELED
from self_supervised.numerics import rank_of


def build(width: int, params: ModelParams) -> nn.Linear:
    """Return a classifier of embeddings of this width. Raises ValueError if the data set has no labels."""
    return nn.Linear(width, params.n_classes or facts.require_labels(facts.n_classes(params), params))


def loss_and_accuracy(classifier: nn.Linear, embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean cross entropy and the accuracy of a batch's labeled images.

    The loss is scaled so that DDP's average is the mean over the labeled images of all processes. The accuracy is in
    percent, over all processes.

    Args:
        classifier: the linear layer.
        embeddings: [N, E]
        labels: [N], -1 for unlabeled images.

    Raises:
        ValueError: there are no labels, or labels that the classifier does not have.
    """
    if labels is None or labels.dim() != 1:
        raise ValueError(
            "online_classifier=True needs one label per image. Yield labels [N], with -1 for unlabeled images."
        )
    n_classes = classifier.out_features
    if not labels.is_cuda and len(labels) and (highest := labels.max()) >= n_classes:  # on a GPU, the check would wait
        raise ValueError(
            f"the loader yields the label {highest}, but online_classifier=True has the {n_classes} classes of "
            "dataset_name. Set dataset_name to the data set of the loader's images."
        )
    logits = logits_of(classifier, embeddings.detach())
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELED, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    counts = distributed.gather(torch.stack([(labels != UNLABELED).sum(), right]).unsqueeze(0)).sum(0)
    loss = total / (counts[0] / distributed.world_size()).clamp(min=1 / distributed.world_size())
    return loss, 100 * counts[1] / counts[0]


def logits_of(classifier: nn.Linear, embeddings: Tensor) -> Tensor:
    """Return the logits [N, classes] of embeddings [N, E] in float32 or more, even with weights in half precision."""
    parts = (embeddings, classifier.weight, classifier.bias)
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, classifier.weight.dtype), torch.float32)
    return F.linear(*(part.to(dtype) for part in parts))


@contextmanager
def hide_gradients(classifier: nn.Linear) -> Iterator[None]:
    """Hide the classifier's gradients while those of the method are clipped, so that they do not count in the norm."""
    kept = {parameter: parameter.grad for parameter in classifier.parameters()}
    for parameter in kept:
        parameter.grad = None
    yield
    for parameter, gradient in kept.items():
        parameter.grad = gradient


def accuracies(classifier: nn.Linear | None, embeddings: Tensor, labels: Tensor | None) -> dict[str, float]:
    """Return top-1 and top-5 accuracy, in percent, of the labeled images among [N, E], [N]; {} if there are none."""
    if classifier is None or labels is None or not (labeled := labels != UNLABELED).any():
        return {}
    with torch.no_grad():
        rank = rank_of(labels[labeled], logits_of(classifier, embeddings[labeled]))
    return {f"valid_online_acc{k}": 100.0 * (rank < k).float().mean().item() for k in (1, 5)}
