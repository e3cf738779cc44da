"""Images per second of the whole training step on the CPU in float32 and in bfloat16, and where its time goes.

    python -m benchmarks.precision                      all three methods
    python -m benchmarks.precision --methods simclr

Contestants and networks are those of benchmarks/step.py. The peers run in float32, as their examples do, and under
bfloat16 autocast. The second table is a profile of our step without Lightning.

To reach in bfloat16: 1.85x ours in float32 with the low-resolution stem and 1.5x with the standard stem, and 2x the
fastest peer in float32.
"""

from collections import Counter
from functools import partial

import torch
from attrs import evolve
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.augment import photographs
from benchmarks.step import NETWORKS, Network, of_lightly, ours, plain_pytorch, settings
from moco import SelfSupervisedMethod
from self_supervised import distributed
from self_supervised.networks.keys import ema_update

METHODS = ["simclr", "byol", "moco_v2"]
BUILDERS = {
    "ours": ours,
    "ours, bf16": partial(ours, precision="bf16-mixed"),
    "lightly": of_lightly,
    "lightly, bf16": partial(of_lightly, bf16=True),
    "plain PyTorch, PIL": plain_pytorch,
    "plain PyTorch, PIL, bf16": partial(plain_pytorch, bf16=True),
}
TO_REACH = {NETWORKS[0].name: 1.85, NETWORKS[1].name: 1.5}  # x ours in float32
KINDS = {  # start of an operation's name -> column of the profile
    "aten::convolution_backward": "convolutions, backward",
    "ByMatmulBackward": "convolutions, backward",
    "aten::mkldnn_convolution": "convolutions, forward",
    "aten::native_batch_norm": "batch norm",
    "aten::relu_": "ReLU",
    "aten::threshold_backward": "ReLU",
    "Optimizer.step": "optimizer",
    "aten::_to_copy": "casts and copies",
    "views": "views",
    "lagging update": "lagging update",
}


def measure(network: Network, method: str, rounds: int, processes: dict[str, harness.Apart]) -> list[harness.Row]:
    params = settings(method, network)
    runs = {name: each.build(BUILDERS[name], params, network.steps) for name, each in processes.items()}
    times = harness.in_turns(runs, rounds, warmup=0)
    peers = [times[name] for name in times if "ours" not in name and "bf16" not in name]
    rows = []
    for name, elapsed in times.items():
        row = {
            "network": network.name,
            "method": method,
            "who": name,
            "images/s": network.batch * network.steps / elapsed,
        }
        goals = (TO_REACH.get(network.name, ""), 2) if name == "ours, bf16" else ("", "")
        row |= {"x ours, float32": times["ours"] / elapsed, "to reach": goals[0]}
        rows.append(row | {"x fastest peer, float32": min(peers) / elapsed, "peer, to reach": goals[1]})
    return rows


class Step:
    """Our training step without Lightning, with a name for each part that the profiler records."""

    def __init__(self, method: str, network: Network, bf16: bool):
        self.params, self.bf16 = settings(method, network), bf16
        self.model = SelfSupervisedMethod(self.params)
        self.model.log_dict = lambda metrics: None
        self.model.momentum = lambda: self.params.m
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.SGD(trained, self.params.lr, self.params.momentum)
        self.images = photographs(network.batch, self.params.crop_size)

    def __call__(self) -> None:
        model, record = self.model, torch.profiler.record_function
        with record("views"):
            views = model.augment(self.images, (0,))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = model.training_step((views, None), 0)
        self.optimizer.zero_grad()
        loss.backward()
        model.on_after_backward()
        self.optimizer.step()
        if model.lagging_model is not None:
            with record("lagging update"):
                ema_update(model.lagging_model, model.model, 0.01)


def profiled(method: str, network: Network, bf16: bool) -> harness.Row:
    """Milliseconds of a step by kind of operation. An operation within another counts for the outer one only."""
    step = Step(method, network, bf16)
    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    spent: Counter[str] = Counter()
    events = [event for event in profiler.events() if event.cpu_parent is None]
    first, last = min(e.time_range.start for e in events), max(e.time_range.end for e in events)
    while events:
        event = events.pop()
        kind = next((kind for start, kind in KINDS.items() if event.name.startswith(start)), None)
        if kind is None:
            events += event.cpu_children
        else:
            spent[kind] += event.cpu_time_total / 1e3
    columns = {kind: spent[kind] for kind in dict.fromkeys(KINDS.values())}
    total = (last - first) / 1e3
    row = {"network": network.name, "method": method, "precision": "bf16" if bf16 else "float32", "ms": total}
    return {**row, **columns, "all else": total - sum(columns.values())}


def main(argv: list[str] | None = None) -> list[harness.Row]:
    parser = harness.arguments(__doc__, rounds=3)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args(argv)
    harness.silence()
    networks, rounds = NETWORKS, options.rounds
    if options.quick:
        networks, rounds, options.methods = [evolve(NETWORKS[1], batch=4, steps=1)], 1, ["moco_v2"]
    names = [name for name in BUILDERS if not name.startswith("lightly") or harness.installed("lightly")]
    processes = {name: harness.Apart() for name in names}
    rows = [
        row
        for network in networks[:2]
        for method in options.methods
        for row in measure(network, method, rounds, processes)
    ]
    for process in processes.values():
        process.end()
    harness.report("precision", rows, options.out, "pytorch_lightning", *harness.installed("lightly"))
    distributed.keep_freed_memory()
    profiles = [profiled(m, network, bf16) for network in networks for m in options.methods for bf16 in (False, True)]
    harness.report("precision_profile", profiles, options.out)
    return rows


if __name__ == "__main__":
    main()
