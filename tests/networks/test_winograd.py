"""Winograd's convolutions equal direct ones in float64, and training with them equals training without."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco import SelfSupervisedMethod
from self_supervised.convolutions import PointConv2d
from self_supervised.networks import winograd
from self_supervised.networks.winograd_ops import PANEL


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs", "size"),
    [(3, 32, 64, (10, 7)), (16, 64, 32, (4, 4)), (2, 512, 512, (4, 8)), (5, 96, 32, (8, 16))],
)
def test_output_and_gradients_equal_direct_convolution_in_float64(n, inputs, outputs, size, threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    torch.manual_seed(0)
    x = torch.randn(n, inputs, *size, requires_grad=True)
    weight = torch.randn(outputs, inputs, 3, 3, requires_grad=True)
    y = winograd.Winograd.apply(x, weight)
    gradient = torch.randn_like(y)
    results = [y, *torch.autograd.grad(y, (x, weight), gradient)]
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = F.conv2d(*exact, padding=1)
    expected = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for result, wanted in zip(results, expected, strict=True):
        assert result.shape == wanted.shape and (result - wanted).norm() < 2e-5 * wanted.norm()


def test_threads_of_python_compute_the_same_as_openmp(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight = torch.randn(8, 32, 16, 16), torch.randn(64, 32, 3, 3)
    by_openmp = winograd.convolve(x, weight)
    monkeypatch.setattr(winograd, "openmp", lambda: None)
    assert torch.equal(winograd.convolve(x, weight), by_openmp)


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, PANEL, 3, padding=1),  # too few channels
        PointConv2d(PANEL, PANEL, 3, padding=1),
        nn.Conv2d(PANEL, PANEL, 3, padding=1, groups=2),
        nn.Conv2d(PANEL, PANEL, 3, padding=1, stride=2),
        nn.Conv2d(PANEL, PANEL, 3, padding=1),
    )


def test_an_encoder_keeps_its_parameters_and_changes_in_training_only():
    direct = encoder()
    changed = copy.deepcopy(direct)
    image, batch = torch.zeros(1, 3, 16, 16), torch.randn(8, 3, 16, 16)
    for _ in range(2):  # a second training
        assert winograd.use_winograd(changed, image, 8, measured=False) == 2
    assert [i for i in range(5) if isinstance(changed[i], winograd.WinogradConv2d)] == [1, 4]
    assert list(changed.state_dict()) == list(direct.state_dict())
    difference = (changed(batch) - direct(batch)).abs().max()
    assert 0 < difference < 1e-4
    assert torch.equal(changed.eval()(batch), direct.eval()(batch))
    small = torch.randn(2, 3, 4, 4)
    assert torch.equal(changed.train()(small), direct(small))  # too few tiles
    with torch.autocast("cpu", torch.bfloat16):
        assert changed(batch).dtype == torch.bfloat16


def test_auto_changes_what_was_measured_faster(monkeypatch):
    monkeypatch.setattr(winograd, "is_faster", lambda *shape: shape[3:5] == (16, 16))
    assert winograd.use_winograd(encoder(), torch.zeros(1, 3, 16, 16), 8, measured=True) == 1


def test_the_measurement_leaves_random_numbers_as_they_are():
    state = torch.get_rng_state()
    assert winograd.is_faster(4, PANEL, PANEL, 8, 8, threads=1) in (True, False)
    assert torch.equal(state, torch.get_rng_state())


def test_in_another_precision_it_is_said_to_have_no_effect(trainer, small, caplog):
    method = SelfSupervisedMethod(small("simclr", winograd=True, encoder_arch="resnet18", evaluations=[]))
    trainer(max_steps=1, precision="bf16-mixed").fit(method)
    assert "winograd=True: no effect on cpu in bf16-mixed, only on cpu in 32-true" in caplog.text
    assert not any(isinstance(module, winograd.WinogradConv2d) for module in method.modules())


@pytest.mark.parametrize(("sizes", "images"), [({"micro_batch_size": 4}, 4), ({"global_batch_size": 16}, 8), ({}, 16)])
def test_auto_measures_with_the_images_that_pass_the_encoder_at_once(sizes, images, trainer, small, monkeypatch):
    seen = []
    monkeypatch.setattr(winograd, "use_winograd", lambda *arguments: seen.append(arguments[2]) or 0)
    method = SelfSupervisedMethod(small("simclr", winograd="auto", batch_size=16, evaluations=[], **sizes))
    trainer(max_steps=1, accumulate_grad_batches=2 if "global_batch_size" in sizes else 1).fit(method)
    assert seen == [images]
