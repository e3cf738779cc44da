"""The peers of benchmarks/gpu.py: our encoder, lightly's heads and loss, a plain loop, views by kornia or lightly."""

import copy
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import peers
from benchmarks.gpu_steps import CUDA, DEVICE, Sizes, Task, Windows, pool, some
from model_params import ModelParams
from self_supervised.networks.encoders import get_encoder

OF_LIGHTLY = ("simclr", "moco_v2", "byol", "vicreg", "barlow_twins")


class Peer(nn.Module):
    """Our encoder with lightly's heads and loss, as in the examples of lightly: views -> loss."""

    def __init__(self, params: ModelParams, method: str):
        from lightly import loss
        from lightly.models.modules import heads
        from lightly.models.utils import deactivate_requires_grad

        super().__init__()
        encoder, width = get_encoder(params)
        shape, self.pairs = (width, params.mlp_hidden_dim, params.dim), params.pairs
        head, self.criterion = {
            "simclr": lambda: (heads.SimCLRProjectionHead(*shape), loss.NTXentLoss(params.T)),
            "moco_v2": lambda: (heads.MoCoProjectionHead(*shape), loss.NTXentLoss(params.T, (params.K, params.dim))),
            "byol": lambda: (heads.BYOLProjectionHead(*shape), loss.NegativeCosineSimilarity()),
            "vicreg": lambda: (heads.VICRegProjectionHead(*shape), loss.VICRegLoss()),
            "barlow_twins": lambda: (heads.BarlowTwinsProjectionHead(*shape), loss.BarlowTwinsLoss()),
        }[method]()
        predictor = heads.BYOLPredictionHead(shape[2], shape[1], shape[2]) if method == "byol" else nn.Identity()
        self.online = nn.Sequential(encoder, head, predictor)
        self.lagging = copy.deepcopy(self.online[:2]) if params.use_lagging_model else None
        if self.lagging is not None:
            deactivate_requires_grad(self.lagging)

    def forward(self, views: list[Tensor]) -> Tensor:
        from lightly.models.utils import update_momentum

        if self.lagging is None:
            return self.criterion(*map(self.online, views))
        update_momentum(self.online[:2], self.lagging, m=0.99)
        queries = {i: self.online(views[i]) for i, _ in self.pairs}
        with torch.no_grad():
            keys = {j: self.lagging(views[j]) for _, j in self.pairs}
        return sum(self.criterion(queries[i], keys[j]) for i, j in self.pairs) / len(self.pairs)


class TwoViews(torch.utils.data.Dataset):
    """lightly's transform, twice, of PIL images."""

    def __init__(self, images: np.ndarray, size: int):
        self.images, self.transform = images, peers.lightly(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        image = Image.fromarray(self.images[index])
        return [self.transform(image), self.transform(image)]


def lightly_feed(images: Tensor, batch: int, size: int, workers: int) -> Iterator[list[Tensor]]:
    dataset = TwoViews(images.permute(0, 2, 3, 1).cpu().numpy(), size)
    loader = DataLoader(dataset, batch, shuffle=True, drop_last=True, num_workers=workers, pin_memory=CUDA)
    while True:
        yield from loader


def kornia_feed(images: Tensor, batch: int, size: int) -> Iterator[list[Tensor]]:
    augment = peers.kornia(size).to(DEVICE)
    while True:
        x = some(images, batch).float() / 255
        yield [augment(x), augment(x)]


def theirs(task: Task, sizes: Sizes) -> float:
    """Seconds of a step of a plain loop."""
    params, images = task.params(sizes), pool(*(sizes.large_pool if task.large else sizes.small_pool))
    if task.by == "kornia":
        windows, feed = Windows(sizes), kornia_feed(images, task.batch, params.crop_size)
    else:  # the batches that the workers have ready at first do not count
        windows = Windows(sizes, buffered=2 * sizes.workers)
        feed = lightly_feed(images, task.batch, params.crop_size, sizes.workers)
    peer = Peer(params, task.method).to(DEVICE)
    optimizer = torch.optim.SGD(peer.online.parameters(), 1e-3, momentum=0.9)
    for done, views in enumerate(islice(feed, windows.total), 1):
        views = [v.to(DEVICE, non_blocking=True).contiguous(memory_format=torch.channels_last) for v in views]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=CUDA):
            loss = peer(views)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        windows.mark(done)
    return windows.seconds_per_step()
