"""Projection and prediction heads."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

import batchrenorm
import ws_resnet
from self_supervised.catalogue import GROUPS

NORMALIZATION_LAYERS = {
    "bn": nn.BatchNorm1d,
    "ln": nn.LayerNorm,
    "gn": partial(nn.GroupNorm, GROUPS),
    "br": batchrenorm.BatchRenorm1d,
}
AFFINE = {"ln": "elementwise_affine"}  # what a normalization calls its weight and bias, if not "affine"


class MLP(nn.Module):
    """(Linear, normalization, ReLU) x (n_layers - 1), Linear, last normalization. No layers at all: the identity.

    Args:
        hidden_dim: width of the hidden layers; or a list, one for each of them.
        normalization, last_normalization: a key of NORMALIZATION_LAYERS, or None.
        weight_standardization: of all layers but the last, as in the original.
        bias: of all linear layers but the last.
        last_bias: of the last linear layer.
        last_affine: whether the last normalization has weights and biases.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int | Sequence[int],
        output_dim: int,
        n_layers: int,
        normalization: str | None = None,
        weight_standardization: bool = False,
        bias: bool = True,
        last_bias: bool = True,
        last_normalization: str | None = None,
        last_affine: bool = True,
    ):
        super().__init__()
        if n_layers == 0 and input_dim != output_dim:
            raise ValueError(
                f"a head of 0 layers cannot turn {input_dim} dimensions into dim={output_dim}: set dim={input_dim}"
            )
        linear = ws_resnet.Linear if weight_standardization else nn.Linear
        widths = [hidden_dim] * max(0, n_layers - 1) if isinstance(hidden_dim, int) else hidden_dim
        layers = []
        for width in widths:
            layers.append(linear(input_dim, width, bias))
            if normalization is not None:
                layers.append(NORMALIZATION_LAYERS[normalization](width))
            layers.append(nn.ReLU())
            input_dim = width
        layers.append(nn.Linear(input_dim, output_dim, last_bias) if n_layers else nn.Identity())
        if last_normalization is not None:
            affine = {AFFINE.get(last_normalization, "affine"): last_affine}
            layers.append(NORMALIZATION_LAYERS[last_normalization](output_dim, **affine))
        self.net = nn.Sequential(*layers) if len(layers) > 1 else layers[0]  # the original's names of parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
