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
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}
AFFINE = {"ln": "elementwise_affine"}  # name of the argument for weight and bias, if not "affine"


class MLP(nn.Module):
    """Multi-layer perceptron: (Linear, normalization, activation) x (n_layers - 1), Linear, last normalization.

    With `n_layers=0` it has no linear layer, but may have the last normalization.

    Args:
        input_dim: width of the input.
        hidden_dim: width of the hidden layers, or a list with one width per hidden layer.
        output_dim: width of the output.
        n_layers: number of linear layers.
        normalization: a key of NORMALIZATION_LAYERS for the hidden layers, or None.
        weight_standardization: whether to standardize the weights of all linear layers except the last.
        bias: whether all linear layers except the last have a bias.
        last_bias: whether the last linear layer has a bias.
        last_normalization: a key of NORMALIZATION_LAYERS for the output, or None.
        last_affine: whether the last normalization has weights and biases.
        activation: a key of ACTIVATIONS.

    Raises:
        ValueError: `n_layers=0`, but input and output differ in width.
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
        activation: str = "relu",
    ):
        super().__init__()
        if n_layers == 0 and input_dim != output_dim:
            raise ValueError(
                f"dim={output_dim}: a head of 0 layers keeps its input's {input_dim} dimensions. Set "
                f"projection_mlp_layers=1 or, without a teacher, dim={input_dim}."
            )
        linear = ws_resnet.Linear if weight_standardization else nn.Linear
        widths = [hidden_dim] * max(0, n_layers - 1) if isinstance(hidden_dim, int) else hidden_dim
        layers = []
        for width in widths:
            layers.append(linear(input_dim, width, bias))
            if normalization is not None:
                layers.append(NORMALIZATION_LAYERS[normalization](width))
            layers.append(ACTIVATIONS[activation]())
            input_dim = width
        layers.append(nn.Linear(input_dim, output_dim, last_bias) if n_layers else nn.Identity())
        if last_normalization is not None:
            affine = {AFFINE.get(last_normalization, "affine"): last_affine}
            layers.append(NORMALIZATION_LAYERS[last_normalization](output_dim, **affine))
        # A single layer is `net` itself: names of parameters are those of the original's checkpoints.
        self.net = nn.Sequential(*layers) if len(layers) > 1 else layers[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)
