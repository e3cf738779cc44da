"""Networks: encoders by name, from a file or as your own module, and heads."""

from self_supervised.networks.encoders import get_encoder as get_encoder
from self_supervised.networks.heads import MLP as MLP
