"""The online linear classifier: trained beside the method on the embeddings that training makes anyway, which get no
gradient from it (SimCLR, https://arxiv.org/abs/2002.05709, B.9, has one to watch training by)."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from self_supervised import distributed
from self_supervised.data.class_labels import UNLABELED


def loss_and_accuracy(classifier: nn.Linear, embeddings: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of the batch's labeled images [N, E], [N]: the mean cross entropy, which DDP's average makes that over all
    processes, and the share in percent, over all processes, of which the class is the most likely one.

    Raises:
        ValueError: there are no labels, or classes that the classifier does not have.
    """
    n_classes = classifier.out_features
    if labels is None or labels.dim() != 1:
        raise ValueError("online_classifier=True needs one label of each image, -1 where there is none")
    if not labels.is_cuda and len(labels) and (highest := labels.max()) >= n_classes:  # a GPU would have to wait
        raise ValueError(
            f"the loader yields the label {highest}, but online_classifier=True has the {n_classes} classes of "
            "dataset_name: choose that of the loader's images"
        )
    logits = logits_of(classifier, embeddings.detach())
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELED, reduction="sum")
    right = (logits.argmax(1) == labels).sum()
    counts = distributed.gather(torch.stack([(labels != UNLABELED).sum(), right]).unsqueeze(0)).sum(0)
    loss = total / (counts[0] / distributed.world_size()).clamp(min=1 / distributed.world_size())
    return loss, 100 * counts[1] / counts[0]


def logits_of(classifier: nn.Linear, embeddings: Tensor) -> Tensor:
    """[N, E] -> [N, classes], in float32 or more, also where the weights are in half precision."""
    parts = (embeddings, classifier.weight, classifier.bias)
    dtype = torch.promote_types(torch.promote_types(embeddings.dtype, classifier.weight.dtype), torch.float32)
    return F.linear(*(part.to(dtype) for part in parts))


@contextmanager
def gradients_aside(classifier: nn.Linear) -> Iterator[None]:
    """Meanwhile the classifier has none: clipped together, they would shorten those of the method."""
    kept = {parameter: parameter.grad for parameter in classifier.parameters()}
    for parameter in kept:
        parameter.grad = None
    yield
    for parameter, gradient in kept.items():
        parameter.grad = gradient


def accuracies(classifier: nn.Linear | None, embeddings: Tensor, labels: Tensor | None) -> dict[str, float]:
    """In percent, of the labeled images among [N, E], [N]: the class is the most likely, one of the five likeliest."""
    if classifier is None or labels is None or not (labeled := labels != UNLABELED).any():
        return {}
    with torch.no_grad():
        logits, y = logits_of(classifier, embeddings[labeled]), labels[labeled]
    rank = (~(logits < logits.gather(1, y.unsqueeze(1)))).sum(1) - 1  # 0: the right class alone is the most likely
    return {f"valid_online_acc{k}": 100.0 * (rank < k).float().mean().item() for k in (1, 5)}
