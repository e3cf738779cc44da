"""LARS against its formula, and the split of parameters."""

import copy
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lars import LARS, split_by_patterns
from self_supervised.networks.heads import MLP


def reference_step(p, g, v, lr, momentum, weight_decay, eta, adapt):
    """Update of one parameter in float64, written from the paper's description with plain branches."""
    g = g + weight_decay * p
    if adapt and p.norm() > 0 and g.norm() > 0:
        g = g * (eta * p.norm() / g.norm())
    v = momentum * v + g
    return p - lr * v, v


def test_lars_equals_the_formula_over_steps_with_a_changing_rate():
    shapes, steps = [(4, 3), (5,), (2, 2, 3, 3)], [0.5, 0.3, 0.9]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes] + [torch.zeros(3, 3, dtype=torch.float64)]
    params = [nn.Parameter(v.clone()) for v in values]
    groups = [{"params": params[:1] + params[2:]}, {"params": params[1:2], "adapt": False, "weight_decay": 0.0}]
    optimizer = LARS(groups, lr=1.0, momentum=0.9, weight_decay=0.01, eta=0.02)
    velocities = [torch.zeros_like(v) for v in values]
    for lr in steps:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            excluded = i == 1
            values[i], velocities[i] = reference_step(
                values[i], p.grad, velocities[i], lr, 0.9, 0.0 if excluded else 0.01, 0.02, not excluded
            )
        optimizer.step()
        for p, expected in zip(params, values, strict=True):
            assert torch.allclose(p, expected, atol=1e-12)


def test_without_adaptation_it_is_sgd():
    p, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ours = LARS([{"params": [p], "adapt": False}], lr=0.1, momentum=0.9, weight_decay=0.1)
    theirs = torch.optim.SGD([twin], lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(3):
        p.grad = twin.grad = torch.tensor([1.0, -2.0, 0.5])
        ours.step()
        theirs.step()
    assert torch.allclose(p, twin)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_zero_weights_move_and_zero_gradients_do_no_harm(weight_decay):
    zero_weight, zero_gradient = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    zero_weight.grad, zero_gradient.grad = torch.ones(3), torch.zeros(3)
    LARS([zero_weight, zero_gradient], lr=0.1, weight_decay=weight_decay).step()
    assert torch.allclose(zero_weight, torch.full((3,), -0.1))
    assert zero_gradient.isfinite().all()


def test_a_step_never_waits_for_the_device():
    class Synchronizations(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default)
            return func(*args, **(kwargs or {}))

    params = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    optimizer = LARS(params, lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        with Synchronizations() as found:
            optimizer.step()
        assert found.count == 0
    with Synchronizations() as found:  # the counter works
        params[0].sum().item()
    assert found.count == 1


def test_closure_and_state_survive():
    p = nn.Parameter(torch.ones(2))
    optimizer = LARS([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        again.param_groups[0]["params"][0].grad = torch.ones(2)
        again.step()
    loaded = LARS([p], lr=0.3)
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[p]["momentum_buffer"], optimizer.state[p]["momentum_buffer"])
    assert loaded.param_groups[0]["lr"] == 0.1


def test_patterns_find_every_norm_and_bias():
    model = nn.ModuleDict({"model": torchvision.models.resnet18(), "head": MLP(512, 64, 8, 3, "bn")})
    adapted, excluded = split_by_patterns(model, [".bias", ".bn"])
    assert all(p.ndim > 1 for p in adapted.values()) and all(p.ndim == 1 for p in excluded.values())
    assert {"model.layer2.0.downsample.1.weight", "head.net.1.weight", "head.net.0.bias"} <= set(excluded)
    assert len(adapted) + len(excluded) == len(list(model.parameters()))
    assert split_by_patterns(model, [])[1] == {}
    assert set(split_by_patterns(model, ["layer1"])[1]) == {n for n, _ in model.named_parameters() if "layer1" in n}
    model["again"] = model["head"]  # whose parameters have two names and one group
    assert sum(map(len, split_by_patterns(model, ["again", ".bias"]))) == len(list(model.parameters()))
    model["model"].requires_grad_(False)
    assert not any(name.startswith("model") for name in split_by_patterns(model, [])[0])
