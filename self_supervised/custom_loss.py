"""A user's own loss in place of a row of `losses.get_loss`."""

import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from self_supervised.losses import PairLoss, Scalars
from self_supervised.numerics import at_least_float32

CustomLoss = Callable[[Tensor, Tensor, Tensor | None], Scalars | Tensor]


def as_pair_loss(loss: CustomLoss) -> PairLoss:
    """Return a user's loss(q, k, queue_keys), of a pair of views, as a function that returns a dict like `get_loss`'s.

    It gets queries and keys [N, D] of this process (`distributed.gather` joins those of all; with "swav" and "dino",
    scores of prototypes) and the queue [K, D], or None. It returns the loss, or a dict with "loss" and scalars to log.

    Raises:
        TypeError: it is not a function of three arguments, or returns something else.
        ValueError: it is a module with weights, which would be neither trained nor stored.
    """
    if not callable(loss):
        raise TypeError(f"loss={loss!r}: not a function. Pass a function of (q, k, queue).")
    try:
        inspect.signature(loss).bind("q", "k", "queue")
    except TypeError as error:
        raise TypeError(f"loss: {error}. Pass a function of (q, k, queue).") from error
    except ValueError:  # a function of C without a signature
        pass
    if isinstance(loss, nn.Module) and loss.state_dict():
        raise ValueError("loss: a module with weights, which would not be trained. Pass a function without weights.")

    return partial(call_custom_loss, loss)


def call_custom_loss(loss: CustomLoss, q: Tensor, k: Tensor, queue: Tensor | None) -> Scalars:
    returned = loss(q, k, queue)
    scalars = returned if isinstance(returned, dict) else {"loss": returned}
    if not isinstance(scalars.get("loss"), Tensor) or not all(isinstance(one, Tensor) for one in scalars.values()):
        raise TypeError(f'loss: it returned {returned!r}. Return a tensor, or a dict of tensors with "loss".')
    return {name: at_least_float32(value) for name, value in scalars.items()}
