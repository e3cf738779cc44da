"""The settings of the projection and prediction heads. Only ModelParams inherits them."""

from typing import TYPE_CHECKING, Any

from attrs import frozen

from fields import choice, list_of_numbers, non_negative, positive
from heads import NORMALIZATIONS

if TYPE_CHECKING:
    from model_params import ModelParams

LARGEST_WIDTH, MOST_LAYERS = 2**17, 20
HEADS = ("projection", "prediction")
LAST_NORMALIZATIONS = (None, "same", *NORMALIZATIONS)


@frozen(kw_only=True, slots=False)  # Python cannot join the slots of two base classes
class HeadParams:
    """Settings of both heads: (Linear, normalization, ReLU) for every hidden layer, and a last Linear."""

    # MLP parameters
    projection_mlp_layers: int = non_negative(2, at_most=MOST_LAYERS)  # 0: none
    prediction_mlp_layers: int = non_negative(0, at_most=MOST_LAYERS)  # 0: none; 2 in BYOL
    mlp_hidden_dim: int = positive(512, at_most=LARGEST_WIDTH)  # of both
    projection_mlp_hidden_dims: list[int] = list_of_numbers(1, LARGEST_WIDTH)  # one a hidden layer; []: mlp_hidden_dim
    prediction_mlp_hidden_dims: list[int] = list_of_numbers(1, LARGEST_WIDTH)  # likewise
    mlp_normalization: str | None = choice(None, (None, *NORMALIZATIONS))  # of hidden layers
    prediction_mlp_normalization: str | None = choice("same", (None, "same", *NORMALIZATIONS))  # of hidden layers
    use_mlp_weight_standardization: bool = False  # of their linear layers
    mlp_bias: bool = True  # of the linear layers before hidden ones, of both; a normalization makes it superfluous

    # the last layer of each MLP
    projection_mlp_last_bias: bool = True  # of the linear layer
    prediction_mlp_last_bias: bool = True  # likewise
    projection_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)  # same: as hidden layers
    prediction_mlp_last_normalization: str | None = choice(None, LAST_NORMALIZATIONS)  # likewise
    mlp_last_affine: bool = True  # whether these two normalizations have weights and biases

    def head(self, name: str) -> dict[str, Any]:
        """Of "projection" or "prediction": the arguments of heads.MLP, beside the widths of its input and output."""
        n_layers, normalization = getattr(self, f"{name}_mlp_layers"), self.mlp_normalization
        if name == "prediction" and self.prediction_mlp_normalization != "same":
            normalization = self.prediction_mlp_normalization
        last = getattr(self, f"{name}_mlp_last_normalization")
        return {
            "hidden_dim": getattr(self, f"{name}_mlp_hidden_dims") or [self.mlp_hidden_dim] * max(0, n_layers - 1),
            "n_layers": n_layers,
            "normalization": normalization,
            "weight_standardization": self.use_mlp_weight_standardization,
            "bias": self.mlp_bias,
            "last_bias": getattr(self, f"{name}_mlp_last_bias"),
            "last_normalization": normalization if last == "same" else last,
            "last_affine": self.mlp_last_affine,
        }


def normalized_layers(params: "ModelParams") -> list[tuple[str, int, str]]:
    """(normalization, width, name of the field that sets the width) of every normalized layer of both heads."""
    found = []
    for name in HEADS:
        head, field = params.head(name), f"{name}_mlp_hidden_dims"
        field = field if getattr(params, field) else "mlp_hidden_dim"
        found += [(head["normalization"], width, field) for width in head["hidden_dim"]]
        found += [(head["last_normalization"], params.dim, "dim")]
    return [layer for layer in found if layer[0] is not None]


def contradictions(params: "ModelParams") -> list[tuple[bool, str]]:
    """(whether the settings contradict each other, how, and the way out)"""
    found = []
    for name in HEADS:
        field, n_layers = f"{name}_mlp_hidden_dims", getattr(params, f"{name}_mlp_layers")
        widths, hidden = getattr(params, field), max(0, n_layers - 1)
        message = f"{field}={widths} are {len(widths)} widths, and {name}_mlp_layers={n_layers} has {hidden} hidden "
        found.append((len(widths) not in (0, hidden), f"{message}layers: give one width for each of them, or none"))
    return found
