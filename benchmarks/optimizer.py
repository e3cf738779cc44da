"""Cost of a LARS step, of an update of the lagging model and of the loss against a queue, next to the usual ways.

The first two have the parameters of BYOL with torchvision's ResNet-18 and its heads, and fixed gradients. Compared are:

- LARS of lars.py; a loop over the parameters, as in the official code of VICReg and Barlow Twins; lightly's LARS; and,
  as a lower bound without norms, torch.optim.SGD one by one (foreach=False) and batched (foreach=True)
- keys.ema_update; a loop, as in the official code of MoCo; lightly's update_momentum; torch's AveragedModel with
  its batched average, and with a function per parameter and the buffers too, as torchvision's references use it
- MoCo's loss (256 queries, 65,536 keys of width 128), forward and backward: in chunks of the queue; with the whole
  matrix of similarities, as in the official code of MoCo; and, as a lower bound, the two matrix products of N x K x D

`% of copy` is the bandwidth in percent of that of a copy, which is timed in turns with the others. It counts the bytes
that must be moved: a LARS step reads parameters, gradients and velocities, and writes parameters and velocities; an
update of the lagging model reads both models and writes one; the loss reads the queue. `ops` is the number of operators
dispatched in one step, and `host syncs` the number of those that read a value of a tensor on the host; on a GPU, each
of these waits for everything queued before it.

Goals: none of ours waits (otherwise this exits with an error), and ours is at least as fast as all others that compute
the same. It is checked that both loops end with the same weights as ours, and that the whole matrix has the same
gradient.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import Row, arguments, in_turns, installed, report
from lars import LARS, split_by_patterns
from moco import SelfSupervisedMethod
from model_params import NORMS_AND_BIASES, BYOLParams
from self_supervised import losses
from self_supervised.distributed import keep_freed_memory
from self_supervised.networks.keys import ema_update

LR, MOMENTUM, WEIGHT_DECAY, ETA, M, T = 0.1, 0.9, 1e-4, 1e-3, 0.99, 0.2
READ_ON_HOST = ("aten._local_scalar_dense", "aten.item", "aten.nonzero", "aten.is_nonzero")
COPY = ("aten._to_copy", "aten.copy_")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Counter(TorchDispatchMode):
    """Counts dispatched operators, and those among them that wait for the device."""

    def __init__(self):
        super().__init__()
        self.ops = self.syncs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = str(function.overloadpacket)
        self.ops += 1
        self.syncs += name in READ_ON_HOST or (name in COPY and self.leaves_device(args, result))
        return result

    @staticmethod
    def leaves_device(args: tuple, result: torch.Tensor) -> bool:
        sources = [arg.device.type for arg in args if isinstance(arg, torch.Tensor)]
        return result.device.type == "cpu" and any(source != "cpu" for source in sources)


def counted(run: Callable[[], None]) -> Counter:
    with Counter() as counter:
        run()
    return counter


def trained_network(quick: bool) -> nn.Module:
    """Encoder, projection and prediction, with gradients."""
    small = {"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "mlp_hidden_dim": 32} if quick else {}
    method = SelfSupervisedMethod(BYOLParams(seed=0, **small))
    network = nn.ModuleList([method.model, method.projection_model, method.prediction_model]).to(DEVICE)
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    return network


def with_gradients(network: nn.Module) -> nn.Module:
    copied = copy.deepcopy(network)
    for parameter, original in zip(copied.parameters(), network.parameters(), strict=True):
        parameter.grad = original.grad.clone()
    return copied


def groups(network: nn.Module) -> list[dict]:
    adapted, excluded = (list(group.values()) for group in split_by_patterns(network, NORMS_AND_BIASES))
    return [{"params": adapted}, {"params": excluded, "weight_decay": 0.0}]


# ---- optimizer steps ----


def ours(network: nn.Module) -> Callable[[], None]:
    adapted, excluded = groups(network)
    return LARS([adapted, {**excluded, "adapt": False}], LR, MOMENTUM, WEIGHT_DECAY, ETA).step


def loop(network: nn.Module) -> Callable[[], None]:
    adapted, excluded = (group["params"] for group in groups(network))
    velocities = {p: torch.zeros_like(p) for p in chain(adapted, excluded)}

    @torch.no_grad()
    def step() -> None:
        for p in adapted:
            gradient = p.grad.add(p, alpha=WEIGHT_DECAY)
            weight_norm, gradient_norm = torch.norm(p), torch.norm(gradient)
            one = torch.ones_like(weight_norm)
            rate = torch.where(gradient_norm > 0, ETA * weight_norm / gradient_norm, one)
            gradient = gradient.mul(torch.where(weight_norm > 0, rate, one))
            velocities[p].mul_(MOMENTUM).add_(gradient)
            p.add_(velocities[p], alpha=-LR)
        for p in excluded:
            velocities[p].mul_(MOMENTUM).add_(p.grad)
            p.add_(velocities[p], alpha=-LR)

    return step


def lightlys(network: nn.Module) -> Callable[[], None]:
    from lightly.utils.lars import LARS as LightlyLARS

    options = {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "trust_coefficient": ETA}
    return LightlyLARS(groups(network), lr=LR, **options).step


def sgd(network: nn.Module, foreach: bool) -> Callable[[], None]:
    return torch.optim.SGD(groups(network), LR, MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=foreach).step


# ---- updates of the lagging model: (lagging, trained) -> one update ----


def our_average(lagging: nn.Module, trained: nn.Module) -> Callable[[], None]:
    return lambda: ema_update(lagging, trained, 1 - M)


def loop_average(lagging: nn.Module, trained: nn.Module) -> Callable[[], None]:
    def update() -> None:
        for slow, fast in zip(lagging.parameters(), trained.parameters(), strict=True):
            slow.data = slow.data * M + fast.data * (1 - M)

    return update


def lightlys_average(lagging: nn.Module, trained: nn.Module) -> Callable[[], None]:
    from lightly.models.utils import update_momentum

    return lambda: update_momentum(trained, lagging, M)


def torchs_average(lagging: nn.Module, trained: nn.Module) -> Callable[[], None]:
    average = AveragedModel(lagging, multi_avg_fn=get_ema_multi_avg_fn(M))
    return lambda: average.update_parameters(trained)


def torchvisions_average(lagging: nn.Module, trained: nn.Module) -> Callable[[], None]:
    average = AveragedModel(lagging, avg_fn=lambda slow, fast, _: M * slow + (1 - M) * fast, use_buffers=True)
    return lambda: average.update_parameters(trained)


# ---- MoCo's loss: (q, k, queue) -> one forward and backward pass ----


def our_loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return losses.cross_entropy(losses.similarities(q, k), T, None, q, queue)["loss"]


def matrix_loss(q: Tensor, k: Tensor, queue: Tensor) -> Tensor:
    return losses.cross_entropy(losses.similarities(q, k, queue), T)["loss"]


def with_backward(loss: Callable[..., Tensor], q: Tensor, *keys: Tensor) -> Callable[[], None]:
    def run() -> None:
        q.grad = None
        loss(q, *keys).backward()

    return run


def losses_of_queue(quick: bool) -> tuple[dict[str, Callable[[], None]], Tensor]:
    """Return the contestants and the queue, after a check that they have one loss and gradient."""
    n, size, width = (8, 5_000, 16) if quick else (256, 65_536, 128)
    q, k, queue = (F.normalize(torch.randn(rows, width, device=DEVICE), dim=1) for rows in (n, n, size))
    gradients, functions = [], {"ours": our_loss, "whole matrix (official MoCo)": matrix_loss}
    for loss in functions.values():
        query = q.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(query, k, queue), query)[0])
    if (gradients[0] - gradients[1]).norm() > 1e-5 * gradients[1].norm():
        raise SystemExit("the gradient of our loss is not that of the whole matrix")
    table = {name: with_backward(loss, q.clone().requires_grad_(), k, queue) for name, loss in functions.items()}

    def products() -> None:
        for keys in queue.split(2048 if DEVICE.type == "cpu" else size):
            (q @ keys.T) @ keys

    return {**table, "two products alone": products}, queue


# ---- the table ----


def rows_of(what: str, contestants: dict[str, Callable[[], None]], rounds: int, moved: int) -> Iterator[Row]:
    """Time the contestants, in turns with a copy. `moved` is the number of values that must be read or written."""
    source, target = (torch.randn(12_000_000, device=DEVICE) for _ in range(2))
    copy_once = partial(target.copy_, source)
    times = in_turns({"copy": copy_once, **contestants}, rounds, warmup=2)
    bandwidth = 2 * len(source) / times["copy"]
    for name, run in contestants.items():
        counter = counted(run)
        yield {
            "what": what,
            "who": name,
            "ms": 1000 * times[name],
            "time / ours": times[name] / times["ours"],
            "% of copy": 100 * moved / times[name] / bandwidth,
            "ops": counter.ops,
            "host syncs": counter.syncs,
        }


def check(rows: list[Row], ours: nn.Module, loops: nn.Module) -> None:
    """Exit unless ours never waits, and has the weights of the loop, which took as many steps."""
    for row in rows:
        if row["who"] == "ours" and row["host syncs"]:
            raise SystemExit(f"our {row['what']} waits for the device {row['host syncs']} times a step: it must not")
    for ours_, loops_ in zip(ours.parameters(), loops.parameters(), strict=True):
        if (ours_ - loops_).norm() > 1e-4 * loops_.norm():
            raise SystemExit("our weights are not those of the loop")


def main(argv: list[str] | None = None) -> None:
    options = arguments(__doc__, rounds=15).parse_args(argv)
    keep_freed_memory()  # as in a training
    rounds, peers = (3 if options.quick else options.rounds), installed("lightly")
    network = trained_network(options.quick)
    steps = {"ours": ours, "loop (official VICReg)": loop, "lightly": lightlys}
    steps |= {"SGD, foreach=False": lambda n: sgd(n, False), "SGD, foreach=True": lambda n: sgd(n, True)}
    averages = {"ours": our_average, "loop (official MoCo)": loop_average, "lightly": lightlys_average}
    averages |= {"torch AveragedModel": torchs_average, "torchvision's EMA": torchvisions_average}
    for table in (steps, averages) if not peers else ():
        del table["lightly"]

    values = sum(p.numel() for p in network.parameters())
    networks = {name: with_gradients(network) for name in steps}
    rows = list(rows_of("LARS step", {name: steps[name](networks[name]) for name in steps}, rounds, 5 * values))
    check(rows, networks["ours"], networks["loop (official VICReg)"])
    moved = networks["ours"]  # away from the weights that lag
    networks = {name: copy.deepcopy(network) for name in averages}
    contestants = {name: averages[name](networks[name], moved) for name in averages}
    rows += rows_of("lagging update", contestants, rounds, 3 * values)
    contestants, queue = losses_of_queue(options.quick)
    rows += rows_of("loss of a queue", contestants, rounds, queue.numel())
    check(rows, networks["ours"], networks["loop (official MoCo)"])
    report("optimizer", rows, options.out, *peers)


if __name__ == "__main__":
    main()
