"""Trainings with the authors' own code, imported from checkouts of their repositories; this one has no line of it.

Each builder below gets a checkout, the settings of tests/golden/authors.json and a number of steps. It returns the
authors' networks, loss, optimizer and schedule. If their program cannot run in PyTorch on a CPU, it returns their loss
in a plain loop. The docstring of each builder says what differs from their program.
"""

import copy
import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock, patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from attrs import define, field
from torch import Tensor, nn

from model_params import ModelParams

BATCH_SIZE = 16
SIMO = "examples/simo/simo.res50.scratch.imagenet.224size.256bs.200e/simo.py"


def tensors_of(modules: list[nn.Module], keys: Tensor | None) -> list[Tensor]:
    """Return all parameters, then all running statistics, then the keys of the queue [K, D]."""
    tensors = [x.detach() for module in modules for x in module.parameters()]
    tensors += [x for module in modules for x in module.buffers() if x.is_floating_point()]
    return tensors if keys is None else [*tensors, keys]


@define
class Training:
    """Networks of one side, and the functions of a training step.

    Args:
        online, lagging: networks whose parameters and buffers have the order of ours.
        loss: (first views, second views, step) -> loss.
        set_rate: sets the learning rate before a step.
        follow: updates the lagging networks after a step.
        queue: keys [D, K].
    """

    online: list[nn.Module]
    loss: Callable[[Tensor, Tensor, int], Tensor]
    optimizer: torch.optim.Optimizer
    set_rate: Callable[[int], Any]
    lagging: list[nn.Module] = field(factory=list)
    follow: Callable[[int], Any] = lambda step: None
    queue: Tensor | None = None

    def state(self) -> list[Tensor]:
        return tensors_of(self.online + self.lagging, None if self.queue is None else self.queue.T)

    def run(self, views: Tensor, steps: int) -> list[float]:
        """Take the steps, with batches in order, and return their losses."""
        losses = []
        for step in range(steps):
            rows = torch.arange(step * BATCH_SIZE, (step + 1) * BATCH_SIZE) % len(views)
            self.set_rate(step)
            loss = self.loss(*views[rows].unbind(1), step)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.follow(step)
            losses.append(loss.item())
        return losses


# ---- importing, on a machine without GPUs ----


def load(file: Path, missing: tuple[str, ...] = (), old: str = "", new: str = "") -> ModuleType:
    """Return a module of a checkout, whose imports find the modules of its own directory before any others.

    Args:
        missing: modules that need not be installed: stand-ins take their place.
        old, new: part of the text that is replaced.
    """
    own = {path.stem for path in file.parent.iterdir()}
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in own}
    module = ModuleType(file.stem)
    text = file.read_text()
    assert old in text, f"{file}: another version of the code"
    with patch.dict(sys.modules, {name: MagicMock() for name in missing}), patch.object(sys, "path", [*sys.path]):
        sys.path.insert(0, str(file.parent))
        exec(compile(text.replace(old, new) if old else text, str(file), "exec"), module.__dict__)
    sys.modules.update(hidden)
    return module


@contextmanager
def one_process() -> Iterator[None]:
    """Provide what the authors' programs need: a process group, numbers in float64, and a `cuda()` without effect."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.set_default_dtype(torch.float64)
    try:
        with patch.object(torch.Tensor, "cuda", lambda self, *args, **options: self):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        dist.destroy_process_group()


# ---- what trainings in a plain loop share ----


def sgd(parameters: Any, p: ModelParams) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, p.lr, p.momentum, weight_decay=p.weight_decay)


def weights_and_biases(*modules: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups: weights, and biases with the weights of batch norms."""
    parameters = [x for module in modules for x in module.parameters()]
    return [{"params": [x for x in parameters if (x.ndim > 1) == is_weight]} for is_weight in (True, False)]


def half_cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def cosine_rate(optimizer: torch.optim.Optimizer, lr: float, steps: int) -> Callable[[int], None]:
    def set_rate(step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr * half_cosine(step, steps)

    return set_rate


def backbone(**options: Any) -> nn.Module:
    """torchvision's ResNet-18 without its last layer."""
    network = torchvision.models.resnet18(**options)
    network.fc = nn.Identity()
    return network


def head(hidden: int, width: int, last_norm: bool = False, last_bias: bool = False) -> nn.Sequential:
    """Linear, batch norm, ReLU, Linear, perhaps batch norm."""
    layers = [nn.Linear(512, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
    layers += [nn.Linear(hidden, width, bias=last_bias), *[nn.BatchNorm1d(width)] * last_norm]
    return nn.Sequential(*layers)


def frozen_copies(modules: list[nn.Module]) -> list[nn.Module]:
    return [copy.deepcopy(module).requires_grad_(False) for module in modules]


def project(modules: list[nn.Module], x: Tensor) -> Tensor:
    return F.normalize(nn.Sequential(*modules)(x), dim=1)


def moving_average(lagging: list[nn.Module], online: list[nn.Module], m: float) -> None:
    for target, source in zip(nn.Sequential(*lagging).parameters(), nn.Sequential(*online).parameters(), strict=True):
        target.data = target.data * m + source.data * (1 - m)


# ---- one builder for each method ----


def moco_v2(folder: Path, p: ModelParams, steps: int) -> Training:
    """Schedule in steps. Their code updates the key encoder before each step, so one update is added at the end."""
    code = load(folder / "main_moco.py")
    model = code.moco.builder.MoCo(torchvision.models.resnet18, p.dim, p.K, p.m, p.T, mlp=True)
    optimizer = sgd(model.encoder_q.parameters(), p)
    args = Namespace(lr=p.lr, cos=True, epochs=steps)
    return Training(
        [model.encoder_q],
        lambda a, b, step: nn.CrossEntropyLoss()(*model(a, b)),
        optimizer,
        lambda step: code.adjust_learning_rate(optimizer, step, args),
        [model.encoder_k],
        lambda step: model._momentum_update_key_encoder() if step == steps - 1 else None,
        model.queue,
    )


def moco_v3(folder: Path, p: ModelParams, steps: int) -> Training:
    """One update of the momentum encoder is added at the end, as for moco_v2; a step passes the m of the one before."""
    code = load(folder / "main_moco.py", ("torch.utils.tensorboard", "vits"))
    model = code.moco.builder.MoCo_ResNet(torchvision.models.resnet18, p.dim, p.mlp_hidden_dim, p.T)
    trained = [*model.base_encoder.parameters(), *model.predictor.parameters()]
    args = Namespace(lr=p.lr * BATCH_SIZE / 256, warmup_epochs=0, epochs=steps, moco_m=p.m)
    optimizer = code.moco.optimizer.LARS(trained, args.lr, weight_decay=p.weight_decay, momentum=p.momentum)

    def m(step: int) -> float:
        return code.adjust_moco_momentum(step, args)

    return Training(
        [model.base_encoder, model.predictor],
        lambda a, b, step: model(a, b, m(step - 1)),
        optimizer,
        lambda step: code.adjust_learning_rate(optimizer, step, args),
        [model.momentum_encoder],
        lambda step: model._update_momentum_encoder(m(step)) if step == steps - 1 else None,
    )


def simsiam(folder: Path, p: ModelParams, steps: int) -> Training:
    """Schedule in steps; 1 is added to the loss; the frozen bias before the last batch norm is removed."""
    code = load(folder / "main_simsiam.py")
    model = code.simsiam.builder.SimSiam(torchvision.models.resnet18, p.dim, p.prediction_mlp_hidden_dims[0])
    model.encoder.fc[6].bias = None
    criterion, optimizer = nn.CosineSimilarity(dim=1), sgd(model.parameters(), p)

    def loss(a: Tensor, b: Tensor, step: int) -> Tensor:
        p1, p2, z1, z2 = model(a, b)
        return 1 - (criterion(p1, z2).mean() + criterion(p2, z1).mean()) * 0.5

    return Training(
        [model.encoder, model.predictor],
        loss,
        optimizer,
        lambda step: code.adjust_learning_rate(optimizer, p.lr, step, Namespace(epochs=steps)),
    )


def from_tenth_epoch(code: ModuleType, args: Namespace, model: nn.Module, optimizer: torch.optim.Optimizer) -> Training:
    """Training of VICReg's or Barlow Twins' program without its ten epochs of warm-up, with epochs of one step."""
    return Training(
        [model.backbone, model.projector],
        lambda a, b, step: model(a, b),
        optimizer,
        lambda step: code.adjust_learning_rate(args, optimizer, [None], 10 + step),
    )


def vicreg(folder: Path, p: ModelParams, steps: int) -> Training:
    """torchvision's ResNet-18; no warm-up: their schedule from its tenth epoch on, with epochs of one step."""
    code = load(folder / "main_vicreg.py")
    code.resnet.resnet18 = lambda **options: (backbone(**options), 512)
    args = Namespace(arch="resnet18", mlp=f"{p.mlp_hidden_dim}-{p.mlp_hidden_dim}-{p.dim}", epochs=10 + steps)
    args.batch_size, args.base_lr = BATCH_SIZE, p.lr
    args.sim_coeff, args.std_coeff, args.cov_coeff = 25.0, 25.0, 1.0
    model = code.VICReg(args)
    filters = dict.fromkeys(["weight_decay_filter", "lars_adaptation_filter"], code.exclude_bias_and_norm)
    optimizer = code.LARS(model.parameters(), lr=0, weight_decay=p.weight_decay, **filters)
    return from_tenth_epoch(code, args, model, optimizer)


def barlow_twins(folder: Path, p: ModelParams, steps: int) -> Training:
    """ResNet-18 and a projector for its width; schedule as for VICReg."""
    code = load(folder / "main.py")
    args = Namespace(projector=f"{p.mlp_hidden_dim}-{p.mlp_hidden_dim}-{p.dim}", epochs=10 + steps)
    args.batch_size, args.lambd = BATCH_SIZE, p.redundancy_loss_weight
    args.learning_rate_weights, args.learning_rate_biases = p.lr, p.parameter_options[0]["lr"]
    with patch.object(torchvision.models, "resnet50", torchvision.models.resnet18):
        model = code.BarlowTwins(args)
    model.projector[0] = nn.Linear(512, p.mlp_hidden_dim, bias=False)
    filters = {"weight_decay_filter": True, "lars_adaptation_filter": True}
    optimizer = code.LARS(weights_and_biases(model), lr=0, weight_decay=p.weight_decay, **filters)
    return from_tenth_epoch(code, args, model, optimizer)


def simclr(folder: Path, p: ModelParams, steps: int) -> Training:
    """Their loss in a plain loop, with PyTorch's functions in place of TensorFlow's; each view is encoded alone."""
    compiler = "tensorflow.compiler.tf2xla.python"
    code = load(folder / "objective.py", ("tensorflow.compat.v1", "tensorflow.compat", "tensorflow", compiler))
    code.tf = tf = MagicMock()
    tf.math.l2_normalize = lambda x, axis: F.normalize(x, dim=axis)
    tf.split = lambda x, n, axis: x.chunk(n, axis)
    tf.concat, tf.shape, tf.range = torch.cat, lambda x: x.shape, torch.arange
    tf.one_hot = lambda index, width: F.one_hot(index, width).double()
    tf.matmul = lambda a, b, transpose_b: a @ b.T
    tf.losses.softmax_cross_entropy = lambda labels, logits, weights: F.cross_entropy(logits, labels)
    online = [backbone(), head(p.mlp_hidden_dim, p.dim, last_norm=True)]
    network = nn.Sequential(*online)
    optimizer = sgd(network.parameters(), p)

    def loss(a: Tensor, b: Tensor, step: int) -> Tensor:
        return code.add_contrastive_loss(torch.cat([network(a), network(b)]), temperature=p.T)[0]

    return Training(online, loss, optimizer, cosine_rate(optimizer, p.lr, steps))


def sce(folder: Path, p: ModelParams, steps: int) -> Training:
    """Their loss in a plain loop, with in-batch keys and a queue, in both directions."""
    code = load(folder / "eztorch/losses/sce_loss.py")
    online = [backbone(), head(p.mlp_hidden_dim, p.dim, last_bias=True)]
    lagging, queue = frozen_copies(online), torch.zeros(p.dim, p.K)
    optimizer = sgd(nn.Sequential(*online).parameters(), p)
    mask = code.compute_sce_mask(BATCH_SIZE, p.K)

    def direction(q: Tensor, k: Tensor) -> Tensor:
        keys = queue.clone()  # which the backward pass reads, too
        return code.compute_sce_loss(q, k, k, True, keys, mask, p.sce_coefficient, p.T, p.sce_target_T)

    def loss(a: Tensor, b: Tensor, step: int) -> Tensor:
        keys = [project(lagging, view) for view in (a, b)]
        result = (direction(project(online, a), keys[1]) + direction(project(online, b), keys[0])) / 2
        slots = torch.arange(2 * BATCH_SIZE) + 2 * BATCH_SIZE * step
        queue[:, slots % p.K] = torch.cat(keys).T
        return result

    def follow(step: int) -> None:
        moving_average(lagging, online, p.m)

    return Training(online, loss, optimizer, cosine_rate(optimizer, p.lr, steps), lagging, follow, queue)


def eqco(folder: Path, p: ModelParams, steps: int) -> Training:
    """Their loss in a plain loop. A factor that is commented out is enabled; accuracies, which fail, are removed."""
    stand_ins = ("cvpods", "cvpods.layers", "cvpods.layers.batch_norm", "cvpods.structures", "cvpods.utils")
    factor = "self.alpha / negative_samples_i.shape[1] *"
    code = load(folder / SIMO, stand_ins, f"# {factor}", factor)
    code.comm.get_world_size, code.comm.get_rank = lambda: 1, lambda: 0
    code.accuracy = lambda *args, **options: (None, None)
    evaluator = code.NT_Xent(BATCH_SIZE, p.T, p.eqco_alpha, p.K, "cpu")
    online = [backbone(), head(p.mlp_hidden_dim, p.dim, last_norm=True)]
    lagging = frozen_copies(online)
    optimizer = sgd(nn.Sequential(*online).parameters(), p)

    def loss(a: Tensor, b: Tensor, step: int) -> Tensor:
        return evaluator(project(online, a), project(lagging, b))[0]

    def follow(step: int) -> None:
        moving_average(lagging, online, p.m)

    return Training(online, loss, optimizer, cosine_rate(optimizer, p.lr, steps), lagging, follow)


def byol(folder: Path, p: ModelParams, steps: int) -> Training:
    """Modules of the installed lightly in a plain loop, because the code of BYOL's authors is written in JAX."""
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import update_momentum

    projector = BYOLProjectionHead(512, p.mlp_hidden_dim, p.dim)
    predictor = BYOLPredictionHead(p.dim, p.mlp_hidden_dim, p.dim)
    online = [backbone(), projector, predictor]
    lagging = frozen_copies(online[:2])
    weights, biases = weights_and_biases(*online)
    optimizer, criterion = sgd([weights, {**biases, "weight_decay": 0.0}], p), NegativeCosineSimilarity()

    def loss(a: Tensor, b: Tensor, step: int) -> Tensor:
        network, target = nn.Sequential(*online), nn.Sequential(*lagging)
        key_a, key_b = target(a), target(b)
        return 2 * (criterion(network(a), key_b) + criterion(network(b), key_a)) + 4

    def follow(step: int) -> None:
        m = 1 - (1 - p.m) * half_cosine(step, steps)
        update_momentum(nn.Sequential(*online[:2]), nn.Sequential(*lagging), m)

    return Training(online, loss, optimizer, cosine_rate(optimizer, p.lr, steps), lagging, follow)


BUILDERS: dict[str, Callable[[Path, ModelParams, int], Training]] = {
    build.__name__: build for build in (moco_v2, moco_v3, simsiam, vicreg, barlow_twins, byol, simclr, sce, eqco)
}
