"""Batch renormalization against batch norm and the algorithm of its paper."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from batchrenorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

SHAPES = {BatchRenorm1d: (16, 4), BatchRenorm2d: (8, 4, 5, 3), BatchRenorm3d: (8, 4, 2, 3, 2)}


@pytest.mark.parametrize("layer_type", SHAPES)
def test_young_layer_is_batch_norm(layer_type):
    """There is no correction before batch 5,000: rmax = 1, dmax = 0."""
    layer, x = layer_type(4), torch.randn(SHAPES[layer_type]) * 3 + 1
    torch.nn.init.normal_(layer.weight)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    assert torch.allclose(layer(x), expected, atol=1e-5)


def test_one_value_per_channel_is_refused_as_by_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        BatchRenorm1d(4)(torch.randn(1, 4))
    assert BatchRenorm2d(4)(torch.randn(1, 4, 2, 1)).std() > 0
    assert torch.isfinite(BatchRenorm1d(4).eval()(torch.randn(1, 4))).all()


def algorithm_1(x, running_mean, running_std, rmax, dmax, eps, momentum):
    """Return (output, new running mean, new running std) by the paper's algorithm 1 in NumPy."""
    mean, std = x.mean(0), np.sqrt(x.var(0) + eps)
    r = np.clip(std / running_std, 1 / rmax, rmax)
    d = np.clip((mean - running_mean) / running_std, -dmax, dmax)
    y = (x - mean) / std * r + d
    return y, running_mean + momentum * (mean - running_mean), running_std + momentum * (std - running_std)


@pytest.mark.parametrize("batches, rmax, dmax", [(20000, 1.857142857, 3.75), (100000, 3.0, 5.0)])
def test_old_layer_is_algorithm_1(batches, rmax, dmax):
    layer, x = BatchRenorm1d(4, momentum=0.1), torch.randn(32, 4) * 5 + 2
    layer.num_batches_tracked.fill_(batches)
    layer.running_mean.copy_(torch.tensor([0.0, 1, 2, -9]))
    layer.running_std.copy_(torch.tensor([1.0, 5, 4, 0.5]))
    before = [layer.running_mean.double().numpy().copy(), layer.running_std.double().numpy().copy()]
    y, mean, std = algorithm_1(x.double().numpy(), *before, rmax, dmax, 1e-5, 0.1)
    assert np.allclose(layer(x).detach().numpy(), y, atol=1e-4)
    assert np.allclose(layer.running_mean.numpy(), mean, atol=1e-5)
    assert np.allclose(layer.running_std.numpy(), std, atol=1e-5)
    assert layer.num_batches_tracked == batches + 1


def test_no_gradient_through_the_corrections():
    """If r and d are constants, the gradient is that of batch norm times r."""
    layer, x = BatchRenorm1d(3), torch.randn(8, 3, requires_grad=True)
    layer.num_batches_tracked.fill_(100000)
    layer.running_std.fill_(2.0)
    weights, std = torch.randn(8, 3), x.var(0, correction=0).add(1e-5).sqrt()
    (ours,) = torch.autograd.grad((layer(x) * weights).sum(), x)
    r = (std / 2).clamp(1 / 3, 3).detach()
    (theirs,) = torch.autograd.grad((F.batch_norm(x, None, None, training=True) * r * weights).sum(), x)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_eval_uses_running_statistics_and_changes_nothing():
    layer = BatchRenorm2d(4).eval()
    layer.running_mean.fill_(2.0)
    layer.running_std.fill_(4.0)
    x, before = torch.randn(2, 4, 3, 3), {k: v.clone() for k, v in layer.state_dict().items()}
    assert torch.allclose(layer(x), (x - 2) / 4)
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_half_precision_input_is_normalized_in_float32():
    layer, x = BatchRenorm1d(2), torch.tensor([[30000.0, 1], [30010, 2]], dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16 and layer(x).isfinite().all()


@pytest.mark.parametrize(
    "layer_type, message", [(BatchRenorm1d, "2D or 3D"), (BatchRenorm2d, "4D"), (BatchRenorm3d, "5D")]
)
def test_wrong_rank_is_named(layer_type, message):
    with pytest.raises(ValueError, match=f"{message} input, got 6D"):
        layer_type(4)(torch.zeros(1, 4, 1, 1, 1, 1))
