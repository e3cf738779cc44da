"""Linear models on the features' device. Multinomial logistic regression: scikit-learn's optimum, sooner
(docs/performance.md)."""

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], tuple[Tensor, Tensor]]  # scores [N, K] -> (their summed loss, its gradient [N, K])


def within_span(train_x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    """The same features in coordinates of the span of the training features, where there are fewer images than
    features: the optimum of a linear model lies in it, as weights outside it only cost decay."""
    if train_x.shape[1] <= len(train_x):
        return train_x, test_x
    basis = torch.linalg.qr(train_x.T).Q
    return train_x @ basis, test_x @ basis


@torch.no_grad()
def logistic_regression(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights [E, C] and bias [C] that minimize the summed cross entropy of x [N, E] + decay / 2 |weights|^2."""
    n_classes = int(y.max()) + 1
    rows = torch.arange(len(x), device=x.device)

    def cross_entropy(scores: Tensor) -> tuple[Tensor, Tensor]:
        log_p = scores.log_softmax(1)
        error = log_p.exp()
        error[rows, y] -= 1
        return -log_p[rows, y].sum(), error

    return fit_linear(x, cross_entropy, n_classes, decay, flatness=n_classes)


@torch.no_grad()
def fit_linear(
    x: Tensor,
    loss: Loss,
    n_outputs: int,
    decay: float,
    flatness: float,
    bias: bool = True,
    precision: float = 1e-3,
    gram: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Weights [E, K] and bias [K] that minimize loss(x @ weights + bias) + decay / 2 |weights|^2, for a convex loss.

    L-BFGS in coordinates v, b in which the curvature is the identity where it starts: 10 to 30 steps, not hundreds.

    Args:
        flatness: 1 / the second derivative of an image's loss by a score, about.
        bias: if not, it stays 0.
        precision: of the scores, about.
        gram: x.T @ x, if it is known.
    """
    n = len(x)
    scale = n * x.shape[1] * n_outputs**2  # divides the loss: small gradients, which L-BFGS trusts from its first step
    curvature = (x.T @ x if gram is None else gram) / flatness
    rounding = 1e-6 * float(curvature.trace())  # smaller eigenvalues are noise in float32, and may be negative
    curvature.diagonal().add_(max(decay, rounding))
    factor = torch.linalg.cholesky(curvature / scale)
    bias_factor = (n / flatness / scale) ** 0.5
    v = x.new_zeros(x.shape[1], n_outputs)
    b = x.new_zeros(n_outputs)
    tolerance = precision * (n / scale) ** 0.5
    search = {"max_iter": 100, "line_search_fn": "strong_wolfe"}
    fitted = [v, b] if bias else [v]
    optimizer = torch.optim.LBFGS(fitted, tolerance_grad=tolerance, tolerance_change=0, **search)

    def weights() -> tuple[Tensor, Tensor]:
        return torch.linalg.solve_triangular(factor.T, v, upper=True), b / bias_factor

    def loss_and_gradient() -> Tensor:
        weight, bias = weights()
        value, error = loss(x @ weight + bias)
        gradient = ((error.T @ x).T + decay * weight) / scale  # x.T @ error takes 15 times as long on a CPU
        v.grad = torch.linalg.solve_triangular(factor, gradient, upper=False).contiguous()
        b.grad = error.sum(0) / scale / bias_factor
        return (decay / 2 * weight.square().sum() + value) / scale

    optimizer.step(loss_and_gradient)
    return weights()
