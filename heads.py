"""Projection and prediction heads."""

from functools import partial

from torch import Tensor, nn

import batchrenorm
import ws_resnet

GROUPS = 32  # of group norm
NORMALIZATIONS = {
    "bn": nn.BatchNorm1d,
    "ln": nn.LayerNorm,
    "gn": partial(nn.GroupNorm, GROUPS),
    "br": batchrenorm.BatchRenorm1d,
}


class MLP(nn.Module):
    """(Linear, normalization, ReLU) x (n_layers - 1), Linear. No layers at all: the identity.

    Args:
        normalization: a key of NORMALIZATIONS, or None.
        weight_standardization: of all layers but the last, as in the original.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        output_dim: int,
        n_layers: int,
        normalization: str | None = None,
        weight_standardization: bool = False,
    ):
        super().__init__()
        if n_layers == 0 and input_dim != output_dim:
            raise ValueError(
                f"a head of 0 layers cannot turn {input_dim} dimensions into dim={output_dim}: set dim={input_dim}"
            )
        linear = ws_resnet.Linear if weight_standardization else nn.Linear
        layers = []
        for _ in range(n_layers - 1):
            layers.append(linear(input_dim, hidden_dim))
            if normalization is not None:
                layers.append(NORMALIZATIONS[normalization](hidden_dim))
            layers.append(nn.ReLU())
            input_dim = hidden_dim
        last = nn.Linear(input_dim, output_dim) if n_layers else nn.Identity()
        self.net = nn.Sequential(*layers, last) if layers else last  # the original's names of parameters

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
