"""Schedules, the queue of keys, heads and ws_resnet."""

import math
from collections import deque

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from attrs import evolve
from torch import nn

import ws_resnet
from self_supervised import convolutions
from self_supervised.catalogue import NORMALIZATIONS
from self_supervised.networks.heads import MLP
from self_supervised.networks.keys import KeyQueue, queue_of_this_process
from self_supervised.training import schedules
from self_supervised.training.plan import Plan


def test_cosine_is_byols_momentum_schedule():
    """BYOL, section 3.2: tau = 1 - (1 - tau_0) (cos(pi k / K) + 1) / 2."""
    for k in range(101):
        expected = 1 - (1 - 0.996) * (math.cos(math.pi * k / 100) + 1) / 2
        assert schedules.cosine(0.996, 1.0, k / 100) == pytest.approx(expected, abs=1e-12)
    assert schedules.cosine(0.996, 1.0, 1.5) == 1.0


def test_warmup_then_cosine_equals_pytorchs_schedulers():
    def rates(schedule, steps):
        found = []
        for _ in range(steps):
            found += schedule.get_last_lr()
            schedule.optimizer.step()
            schedule.step()
        return found

    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0) for _ in range(2))
    warmup = rates(torch.optim.lr_scheduler.LinearLR(first, start_factor=1 / 10, total_iters=9), 10)
    annealing = rates(torch.optim.lr_scheduler.CosineAnnealingLR(second, T_max=40, eta_min=0.0), 41)
    plan = Plan(processes=1, accumulated=1, batch_size=1, lr=1.0, steps=50, steps_per_epoch=5, warmup_steps=10)
    found = [schedules.classifier_lr_fraction("cosine", plan, s) for s in range(51)]
    assert found == pytest.approx(warmup + annealing)


def test_no_warmup_and_a_warmup_longer_than_the_training():
    plan = Plan(processes=1, accumulated=1, batch_size=1, lr=1.0, steps=10, steps_per_epoch=5)
    assert schedules.classifier_lr_fraction("cosine", plan, 0) == 1
    short = evolve(plan, steps=2, warmup_steps=4)
    assert [schedules.classifier_lr_fraction("cosine", short, s) for s in range(3)] == [0.25, 0.5, 0.75]


def test_steps_down():
    found = [schedules.steps_down(s / 10, (0.6, 0.8), 0.1) for s in range(10)]
    assert found == pytest.approx([1] * 6 + [0.1] * 2 + [0.01] * 2)


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [5, 2, 7], [8], [7, 20, 3]])
def test_queue_keeps_the_newest_keys_whatever_the_batch(sizes):
    queue, reference = KeyQueue(7, 2), deque(maxlen=7)
    reference.extend(queue.keys.tolist())
    for n in sizes:
        keys = torch.randn(n, 2)
        queue.push_views(keys.tensor_split(2))
        reference.extend(keys.tolist())
    oldest_first = queue.keys.roll(-int(queue.position), 0)
    assert torch.equal(oldest_first, torch.tensor(list(reference)))
    assert torch.allclose(KeyQueue(9, 4).keys.norm(dim=1), torch.ones(9))


def test_mlp_layout_is_the_originals():
    assert isinstance(MLP(4, 8, 4, 0).net, nn.Identity)
    with pytest.raises(ValueError, match="dim=2: a head of 0 layers"):
        MLP(4, 8, 2, 0)
    assert list(MLP(4, 8, 2, 1).state_dict()) == ["net.weight", "net.bias"]
    kinds = [type(layer).__name__ for layer in MLP(4, 32, 2, 3, "bn", weight_standardization=True).net]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    net = MLP(4, 32, 2, 3, "bn", weight_standardization=True).net
    assert type(net[0]) is ws_resnet.Linear and type(net[-1]) is nn.Linear


@pytest.mark.parametrize("normalization", [None, *NORMALIZATIONS])
def test_mlp_of_each_normalization(normalization):
    net, x = MLP(6, 64, 3, 2, normalization), torch.randn(5, 6)
    hidden = F.linear(x, net.net[0].weight, net.net[0].bias)
    expected = {
        None: lambda h: h,
        "bn": lambda h: F.batch_norm(h, None, None, training=True),
        "br": lambda h: F.batch_norm(h, None, None, training=True),
        "ln": lambda h: F.layer_norm(h, (64,)),
        "gn": lambda h: F.group_norm(h, 32),
    }[normalization](hidden)
    assert torch.allclose(net(x), net.net[-1](F.relu(expected)), atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (8, 5)])
def test_standardized_weights(shape):
    weight = torch.randn(shape) * 2 + 1
    rows = weight.flatten(1).numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-5)
    assert np.allclose(ws_resnet.standardized_weight(weight).flatten(1), expected, atol=1e-6)


def test_weights_are_standardized_in_their_own_precision():
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64)
    rows = weight.flatten(1)
    expected = (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)
    assert torch.allclose(ws_resnet.standardized_weight(weight).flatten(1), expected, rtol=0, atol=1e-12)


def test_one_input_gives_zero_not_nan():
    assert torch.equal(ws_resnet.standardized_weight(torch.randn(4, 1, 1, 1)), torch.zeros(4, 1, 1, 1))


@pytest.mark.slow
def test_ws_resnet_is_a_group_normalized_resnet_with_standardized_weights():
    ours = ws_resnet.ws_resnet18(num_classes=7)
    theirs = torchvision.models.resnet18(num_classes=7, norm_layer=lambda channels: nn.GroupNorm(32, channels))
    state = ours.state_dict()
    for name, layer in theirs.named_modules():
        if isinstance(layer, nn.Conv2d):
            w = state[f"{name}.weight"].double()
            mean, std = w.mean((1, 2, 3), keepdim=True), w.std((1, 2, 3), keepdim=True)
            state[f"{name}.weight"] = ((w - mean) / (std + 1e-5)).float()
    theirs.load_state_dict(state)
    x = torch.randn(2, 3, 40, 40)
    assert torch.allclose(ours(x), theirs(x), atol=1e-4)
    assert [len(list(make().named_parameters())) for make in ws_resnet.WS_RESNETS.values()] == [62, 110, 161, 314, 467]


def test_point_convolution_pads_as_conv2d_does():
    ours = convolutions.PointConv2d(4, 6, 3, padding="same")
    x = torch.randn(2, 4, 2, 2)
    assert torch.equal(ours(x), F.conv2d(x, ours.weight, ours.bias, padding="same"))


@pytest.mark.parametrize("kernel, padding, stride", [(3, 1, 1), (3, 1, 2), (1, 0, 2), (3, 0, 1), (5, 2, 2), (3, 2, 1)])
@pytest.mark.parametrize("height, width", [(1, 1), (2, 2), (2, 1), (3, 3), (4, 4), (1, 5)])
def test_point_convolution_is_the_convolution(kernel, padding, stride, height, width):
    if min(height, width) + 2 * padding < kernel:
        return
    ours = convolutions.PointConv2d(4, 6, kernel, stride, padding).double()
    x = torch.randn(3, 4, height, width, dtype=torch.float64, requires_grad=True)
    theirs = F.conv2d(x, ours.weight, ours.bias, stride, padding)
    assert torch.allclose(ours(x), theirs, atol=1e-12) and ours(x).shape == theirs.shape
    upstream = torch.randn_like(theirs)
    inputs = (x, ours.weight, ours.bias)
    for a, b in zip(
        torch.autograd.grad(ours(x), inputs, upstream), torch.autograd.grad(theirs, inputs, upstream), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-12)


def test_own_queues_are_those_of_as_many_processes():
    queues = torch.arange(6.0).view(3, 2)
    # An evaluation takes the queue of the first process.
    assert queue_of_this_process(queues, same_number=False).tolist() == [0, 1]
    with pytest.raises(ValueError, match="gather_keys_for_queue=False: the checkpoint has the queues of 3 processes"):
        queue_of_this_process(queues, same_number=True)
    assert queue_of_this_process(queues[:1], same_number=True).tolist() == [0, 1]


@pytest.mark.parametrize(("size", "stride"), [(4, 1), (8, 2), (7, 2), (12, 1), (1, 1)])
def test_shared_weights_give_the_gradients_of_autocast(size, stride):
    """Two passes within `weights_shared` equal autocast's in bfloat16, and are bit-identical in float32."""
    torch.manual_seed(0)
    layer = convolutions.PointConv2d(24, 40, 3, stride, 1, bias=False).to(memory_format=torch.channels_last)
    views = [torch.randn(6, 24, size, size, requires_grad=True) for _ in range(2)]

    def gradients(bf16: bool, *shared: torch.nn.Module) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), convolutions.weights_shared(*shared):
            loss = sum((layer(x).float() * (i + 1)).sin().sum() for i, x in enumerate(views))
        return torch.autograd.grad(loss, [layer.weight, *views])

    for plain, shared in zip(gradients(False), gradients(False, layer, None), strict=True):
        assert torch.equal(plain, shared)
    for exact, plain, shared in zip(gradients(False), gradients(True), gradients(True, layer), strict=True):
        assert shared.dtype == torch.float32
        assert (shared - exact).norm() <= 1.2 * (plain - exact).norm() < 0.05 * exact.norm()
    assert layer.shared is None and not torch.equal(gradients(True)[0], gradients(False)[0])
