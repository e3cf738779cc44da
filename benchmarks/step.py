"""Images per second of the whole training step on the CPU, and its fraction of the machine's peak (products in fp32).

    python -m benchmarks.step

Seven presets with resnet18: low-resolution stem at 32 pixels, standard stem at 32 and 96. A step is data, augmentation,
forward, backward, optimizer, lagging update, logging, progress bar. Ours runs under `Trainer.fit` (also compiled);
lightly's losses in the loop of its examples; and a plain PyTorch loop with the PIL pipeline (peer_loops.py). Each has a
process of its own, which waits while others have their turn.

To reach: 73 % of the peak and 1.1x the fastest peer with the low-resolution stem, 1.25x with the standard stem at 32
pixels; Lightning, logging and progress together under 3 % of a step.
"""

import copy
import os
import tempfile
import time
from collections.abc import Callable

import pytorch_lightning as pl
import torch
from attrs import evolve, frozen
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness, peers
from benchmarks.augment import photographs
from benchmarks.peer_loops import PeerLoop, lightly_loss, plain_loss
from moco import SelfSupervisedMethod
from model_params import PRESETS, ModelParams
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.networks.encoders import get_encoder

METHODS = ["moco_v2", "simclr", "byol", "eqco", "sce", "vicreg", "barlow_twins"]
LIGHTLY, PLAIN = {"moco_v2", "simclr", "byol", "vicreg", "barlow_twins"}, {"moco_v2", "simclr", "byol"}


@frozen
class Network:
    name: str
    pixels: int
    low_resolution: bool
    batch: int
    steps: int  # of one turn
    compiled: bool  # is ours measured so, too?
    faster: float  # than the fastest peer: to reach


NETWORKS = [
    Network("low-resolution stem, 32 px", 32, True, 32, 2, True, 1.1),
    Network("standard stem, 32 px", 32, False, 128, 4, True, 1.25),
    Network("standard stem, 96 px", 96, False, 16, 2, False, 1.0),
]


class Images(torch.utils.data.Dataset):
    """uint8 batches out of a few photographs, in the way of our packed sets."""

    def __init__(self, images: Tensor, length: int):
        self.images, self.length = images, length

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> Tensor:
        return self.images[torch.tensor(indices) % len(self.images)]


class Clock(pl.Callback):
    """Seconds from the end of the first step to the end of the last."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_) -> None:
        if trainer.global_step == 1:
            self.start = time.perf_counter()
        self.elapsed = time.perf_counter() - self.start


def settings(method: str, network: Network) -> ModelParams:
    return PRESETS[method](
        dataset_name="cifar10",
        transform_crop_size=network.pixels,
        low_resolution_stem=network.low_resolution,
        transform_blur_probability=0.5,
        batch_size=network.batch,
        lr=0.01,
        optimizer_name="sgd",  # for all, because the loops of the peers have it
        K=4096 if method in ("moco_v2", "sce") else 0,
        evaluations=[],
        seed=0,
    )


def ours(
    params: ModelParams, steps: int, encoder: nn.Module | None = None, precision: str = "32-true"
) -> Callable[[], float]:
    """One turn under `Trainer.fit`, with a logger, a progress bar and everything that comes by default."""
    model = SelfSupervisedMethod(params, encoder=encoder)
    dataset = Images(photographs(64, params.crop_size), params.batch_size * (steps + 1))
    loader = ResumableDataLoader(
        dataset, batch_size=params.batch_size, sampler=ResumableSampler(dataset, 1, 0), collate_fn=lambda batch: batch
    )

    def run() -> float:
        clock = Clock()
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
            screen = {"file": nowhere, "force_terminal": True}
            callbacks, logger = [clock, RichProgressBar(console_kwargs=screen)], CSVLogger(folder)
            options = {"max_epochs": 1, "precision": precision, "enable_checkpointing": False}
            pl.Trainer(
                accelerator="cpu", callbacks=callbacks, logger=logger, enable_model_summary=False, **options
            ).fit(model, loader)
        return clock.elapsed

    return run


def of_lightly(params: ModelParams, steps: int, bf16: bool = False) -> Callable[[], float]:
    size = params.crop_size
    return PeerLoop(params, photographs(64, size), peers.lightly(size), lightly_loss, steps, bf16)


def plain_pytorch(params: ModelParams, steps: int, bf16: bool = False) -> Callable[[], float]:
    size = params.crop_size
    return PeerLoop(params, photographs(64, size), peers.pil(size), plain_loss, steps, bf16)


def bare(params: ModelParams, steps: int, encoder: nn.Module) -> Callable[[], float]:
    """The same step without Lightning: what is left is what the method itself costs."""
    model, images = SelfSupervisedMethod(params, encoder=encoder), photographs(64, params.crop_size)
    model.log_dict = lambda scalars: None
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], params.lr, params.momentum)

    def run() -> float:
        start = 0.0
        for step in range(steps + 1):
            if step == 1:
                start = time.perf_counter()
            batch = images[torch.arange(step, step + params.batch_size) % len(images)]
            loss = model.training_step((model.augment(batch, (0, step)), None), step)
            optimizer.zero_grad()
            loss.backward()
            model.on_after_backward()
            optimizer.step()
        return time.perf_counter() - start

    return run


def flops_of_image(params: ModelParams) -> float:
    """Return the FLOPs of the encoder for all views of an image: forward and backward for queries, forward for keys."""
    encoder, _ = get_encoder(params)
    x = torch.randn(2, 3, params.crop_size, params.crop_size)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        encoder(x)
    with FlopCounterMode(display=False) as both:
        encoder(x).sum().backward()
    queries, keys = ({pair[i] for pair in params.pairs} for i in (0, 1))
    if params.use_lagging_model:
        return (len(queries) * both.get_total_flops() + len(keys) * forward.get_total_flops()) / 2
    return len(queries | keys) * both.get_total_flops() / 2


OURS, COMPILED, WINOGRAD = "ours", "ours, compiled", "ours, Winograd"
BY_LIGHTLY, BY_HAND = "lightly", "plain PyTorch, PIL"
BUILDERS = {OURS: ours, COMPILED: ours, WINOGRAD: ours, BY_LIGHTLY: of_lightly, BY_HAND: plain_pytorch}


def measure(network: Network, method: str, rounds: int, processes: dict[str, harness.Apart]) -> list[harness.Row]:
    params = settings(method, network)
    takes_part = {OURS: True, BY_LIGHTLY: method in LIGHTLY, BY_HAND: method in PLAIN}
    takes_part[WINOGRAD] = network.low_resolution
    takes_part[COMPILED] = network.compiled and method == "simclr"  # one is enough: compiling takes a minute or two
    runs = {
        name: process.build(
            BUILDERS[name], evolve(params, torch_compile=name == COMPILED, winograd=name == WINOGRAD), network.steps
        )
        for name, process in processes.items()
        if takes_part[name]
    }
    product, operations = harness.matmul_seconds()
    times = harness.in_turns({**runs, "peak": product}, rounds, warmup=0)  # every run has a step of its own for that
    peak = operations / times.pop("peak")
    n, work = network.batch * network.steps, flops_of_image(params)
    rivals = [times[name] for name in times if not name.startswith("ours")]
    return [
        {
            "network": network.name,
            "method": method,
            "who": name,
            "images/s": n / elapsed,
            "% of peak": 100 * work * n / elapsed / peak,
            "x fastest peer": min(rivals) / elapsed if rivals and name.startswith("ours") else "",
            "to reach": network.faster if rivals and name.startswith("ours") else "",
        }
        for name, elapsed in times.items()
    ]


def overhead(rounds: int, steps: int) -> float:
    """Seconds that Lightning, logging and progress bar add to a step: with an encoder that costs next to nothing."""
    params = evolve(settings("moco_v2", NETWORKS[1]), batch_size=16, encoder_arch="module")
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 16))
    runs = {
        "Lightning": ours(params, steps, copy.deepcopy(encoder)),
        "bare": bare(params, steps, copy.deepcopy(encoder)),
    }
    times = harness.in_turns(runs, rounds)
    return (times["Lightning"] - times["bare"]) / steps


def main(argv: list[str] | None = None) -> list[harness.Row]:
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--networks", type=int, default=len(NETWORKS), help="how many of them: low resolution first")
    usual = [name for name in BUILDERS if name != WINOGRAD]
    parser.add_argument("--who", nargs="+", default=usual, choices=BUILDERS)
    options = parser.parse_args(argv)
    harness.silence()
    networks, methods, rounds = NETWORKS[: options.networks], options.methods, options.rounds
    if options.quick:
        networks, methods, rounds = [evolve(NETWORKS[1], batch=4, steps=1, compiled=False)], ["moco_v2"], 1
    names = [name for name in options.who if name != BY_LIGHTLY or harness.installed("lightly")]
    processes, rows = {name: harness.Apart() for name in names}, []
    for network in networks:
        for method in methods:
            rows += measure(network, method, rounds, processes)
            print(f"{network.name}, {method}: {rows[-1]['who']} {rows[-1]['images/s']:.3g} images/s", flush=True)
    for process in processes.values():
        process.end()
    harness.report("step", rows, options.out, "torchvision", "pytorch_lightning", *harness.installed("lightly"))
    extra = overhead(rounds, 2 if options.quick else 50)
    shares = []
    for network in networks:
        ours_first = sorted(rows, key=lambda row: (row["method"] != "moco_v2", row["who"] != OURS))
        rate = next(row["images/s"] for row in ours_first if row["network"] == network.name)
        step = network.batch / rate
        shares.append({"network": network.name, "step ms": 1e3 * step, "Lightning, logging, progress ms": 1e3 * extra})
        shares[-1] |= {"% of the step": 100 * extra / step, "to reach %": 3}
    harness.report("step_overhead", shares, options.out, "pytorch_lightning")
    return rows


if __name__ == "__main__":
    main()
