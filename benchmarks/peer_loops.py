"""Training loops as the peers' users write them: a DataLoader whose workers make both views, then plain PyTorch.

Both loops train the network that ours trains, as torchvision builds it (convolutions of PyTorch, in its default memory
format), with heads of the same widths.
"""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from model_params import ModelParams
from self_supervised.convolutions import PointConv2d
from self_supervised.networks.encoders import get_encoder

WORKERS = 2


class TwoViews(Dataset):
    """`length` images out of a few, each transformed twice."""

    def __init__(self, images: Tensor, transform: Callable, length: int):
        self.images = [Image.fromarray(pixels) for pixels in images.permute(0, 2, 3, 1).numpy()]
        self.transform, self.length = transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index % len(self.images)]
        return self.transform(image), self.transform(image)


def head(*widths: int) -> nn.Sequential:
    layers = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Networks(nn.Module):
    """Encoder and head, their lagging copies, and a predictor: whatever a method needs of them."""

    def __init__(self, params: ModelParams):
        super().__init__()
        p = params
        encoder, width = get_encoder(p)
        encoder = encoder.to(memory_format=torch.contiguous_format)
        for layer in encoder.modules():
            if type(layer) is PointConv2d:  # ours alone
                layer.__class__ = nn.Conv2d
        self.online = nn.Sequential(encoder, head(width, *[p.mlp_hidden_dim] * (p.projection_mlp_layers - 1), p.dim))
        self.predictor = head(p.dim, p.mlp_hidden_dim, p.dim) if p.prediction_mlp_layers else nn.Identity()
        self.lagging = copy.deepcopy(self.online).requires_grad_(False) if p.use_lagging_model else None


def plain_loss(params: ModelParams, networks: Networks, queue: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """MoCo v2 as in its official code, SimCLR with its 2N x 2N matrix, BYOL with both directions."""

    def unit(z: Tensor) -> Tensor:
        return F.normalize(z, dim=1)

    def moco_v2(a: Tensor, b: Tensor) -> Tensor:
        q = unit(networks.online(a))
        with torch.no_grad():
            k = unit(networks.lagging(b))
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone().T], dim=1) / params.T
        queue[: len(k)] = k
        return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))

    def simclr(a: Tensor, b: Tensor) -> Tensor:
        z = torch.cat([unit(networks.online(a)), unit(networks.online(b))])
        sim = (z @ z.T / params.T).fill_diagonal_(-torch.inf)
        return F.cross_entropy(sim, torch.arange(len(z)).roll(len(a)))

    def byol(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            keys = [unit(networks.lagging(x)) for x in (b, a)]
        queries = [unit(networks.predictor(networks.online(x))) for x in (a, b)]
        return sum(2 - 2 * (q * k).sum(1).mean() for q, k in zip(queries, keys, strict=True))

    return locals()[name_of(params)]


def lightly_loss(params: ModelParams, networks: Networks, queue: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The forward pass of lightly's examples, with its losses and its memory bank."""
    from lightly import loss as L

    name, online, lagging = name_of(params), networks.online, networks.lagging
    bank = (len(queue), params.dim) if name == "moco_v2" else 0
    criterion = {
        "moco_v2": lambda: L.NTXentLoss(params.T, memory_bank_size=bank),
        "simclr": lambda: L.NTXentLoss(params.T),
        "byol": L.NegativeCosineSimilarity,
        "vicreg": L.VICRegLoss,
        "barlow_twins": L.BarlowTwinsLoss,
    }[name]()

    def two_networks(a: Tensor, b: Tensor) -> Tensor:
        with torch.no_grad():
            key = lagging(b)
        return criterion(networks.predictor(online(a)), key)

    if name == "moco_v2":
        return two_networks
    if name == "byol":
        return lambda a, b: 0.5 * (two_networks(a, b) + two_networks(b, a))
    return lambda a, b: criterion(online(a), online(b))


def name_of(params: ModelParams) -> str:
    """moco_v2, simclr, byol, vicreg or barlow_twins: those of the presets that the peers have."""
    by_loss = {"ip": "byol", "vic": "vicreg", "barlow": "barlow_twins"}
    return by_loss.get(params.loss_type, "moco_v2" if params.use_lagging_model else "simclr")


class PeerLoop:
    """Calling it trains one warm-up step and `steps` more, and returns the seconds of those."""

    def __init__(
        self, params: ModelParams, images: Tensor, transform: Callable, loss: Callable, steps: int, bf16: bool = False
    ):
        self.bf16 = bf16
        self.networks = Networks(params)
        queue = F.normalize(torch.randn(max(1, params.K), params.dim), dim=1)
        self.loss = loss(params, self.networks, queue)
        trained = [p for p in self.networks.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, 0.01, 0.9, weight_decay=1e-4)
        length = params.batch_size * (steps + 1)
        self.loader = DataLoader(TwoViews(images, transform, length), params.batch_size, num_workers=WORKERS)
        self.m = params.m

    def __call__(self) -> float:
        start = 0.0
        for step, (a, b) in enumerate(self.loader):
            if step == 1:
                start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
                loss = self.loss(a, b)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.networks.lagging is not None:
                self.update()
            loss.item()  # for the progress bar
        return time.perf_counter() - start

    @torch.no_grad()
    def update(self) -> None:
        pairs = zip(self.networks.lagging.parameters(), self.networks.online.parameters(), strict=True)
        for slow, fast in pairs:
            slow.mul_(self.m).add_(fast, alpha=1 - self.m)
