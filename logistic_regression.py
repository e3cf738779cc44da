"""Multinomial logistic regression on the features' device: scikit-learn's optimum, on a CPU in a third of its time."""

import torch
from torch import Tensor


@torch.no_grad()
def logistic_regression(x: Tensor, y: Tensor, decay: float) -> tuple[Tensor, Tensor]:
    """Weights [E, C] and bias [C] that minimize the summed cross entropy of x [N, E] + decay / 2 |weights|^2.

    L-BFGS in coordinates v, b in which the curvature is the identity where it starts: 10 to 30 steps, not hundreds.
    """
    n, n_classes = len(x), int(y.max()) + 1
    scale = n * x.shape[1] * n_classes**2  # divides the loss: small gradients, which L-BFGS trusts from its first step
    curvature = (x.T @ x / n_classes).add_(torch.eye(x.shape[1], device=x.device), alpha=decay)
    factor, bias_factor = torch.linalg.cholesky(curvature / scale), (n / n_classes / scale) ** 0.5
    v, b = x.new_zeros(x.shape[1], n_classes), x.new_zeros(n_classes)
    tolerance, rows = 1e-3 * (n / scale) ** 0.5, torch.arange(n, device=x.device)
    search = {"max_iter": 100, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([v, b], tolerance_grad=tolerance, tolerance_change=0, **search)

    def weights() -> tuple[Tensor, Tensor]:
        return torch.linalg.solve_triangular(factor.T, v, upper=True), b / bias_factor

    def loss_and_gradient() -> Tensor:
        weight, bias = weights()
        log_p = (x @ weight + bias).log_softmax(1)
        error = log_p.exp()
        error[rows, y] -= 1
        gradient = ((error.T @ x).T + decay * weight) / scale  # x.T @ error takes 15 times as long on a CPU
        v.grad = torch.linalg.solve_triangular(factor, gradient, upper=False).contiguous()
        b.grad = error.sum(0) / scale / bias_factor
        return (decay / 2 * weight.square().sum() - log_p[rows, y].sum()) / scale

    optimizer.step(loss_and_gradient)
    return weights()
