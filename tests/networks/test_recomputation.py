"""Recomputed activations: the same training, in less memory."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from batchrenorm import BatchRenorm1d
from moco import SelfSupervisedMethod
from self_supervised import distributed
from self_supervised.networks.recomputation import blocks, recompute_activations

SETTINGS = {
    "dataset_name": "digits",
    "batch_size": 8,
    "mlp_hidden_dim": 16,
    "dim": 8,
    "K": 32,
    "seed": 0,
    "evaluations": [],
}


@pytest.mark.parametrize(("name", "n"), [("resnet50", 16), ("convnext_tiny", 18), ("swin_t", 15), ("vit_b_16", 12)])
def test_blocks_are_those_of_the_architecture(name, n):
    """For Swin, the three layers that merge patches count, too."""
    with torch.device("meta"):
        found = blocks(torchvision.models.get_model(name, weights=None))
    assert len(found) == n


@pytest.mark.slow
@pytest.mark.parametrize("preset, more", [
    ("moco_v2", {}), ("byol", {"micro_batch_size": 3}), ("simclr", {"encoder_arch": "ws_resnet18"}),
    ("vicreg", {"encoder_arch": "timm:test_vit", "transform_crop_size": 160, "drop_path_rate": 0.5}),
])  # fmt: skip
def test_training_is_the_same(preset, more, trainer):
    """Three steps: weights, running statistics of batch norm, lagging weights and queue."""
    ends = []
    for recomputed in (False, True):
        settings = {**SETTINGS, "encoder_arch": "shufflenet_v2_x0_5", "lr": 0.01, "warmup_epochs": 0, **more}
        method = SelfSupervisedMethod(preset, **settings, activation_checkpointing=recomputed)
        trainer(max_steps=3, limit_val_batches=0).fit(method)
        ends.append(method.state_dict())
    plain, recomputed = ends
    assert plain.keys() == recomputed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_training_in_bfloat16(trainer):
    """Converted weights are otherwise shared by all passes of a step, except those that are made again later."""
    method = SelfSupervisedMethod("byol", **SETTINGS, encoder_arch="shufflenet_v2_x0_5", activation_checkpointing=True)
    fit = trainer(max_steps=2, limit_val_batches=0, precision="bf16-mixed")
    fit.fit(method)
    assert fit.global_step == 2


def saved_megabytes(model: torch.nn.Module, x: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the memory of all tensors that the backward pass keeps, without the weights, and the gradients."""
    kept, weights = {}, {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(x).square().mean()
    kept_by_forward = sum(kept.values()) / 1e6
    loss.backward()
    return kept_by_forward, {name: weight.grad for name, weight in model.named_parameters()}


def test_less_than_half_of_the_activations_of_a_resnet_are_kept():
    torch.manual_seed(0)
    plain, x = torchvision.models.resnet50(num_classes=8).double(), torch.randn(4, 3, 32, 32, dtype=torch.double)
    recomputed = copy.deepcopy(plain)
    recompute_activations(recomputed)
    recomputed = copy.deepcopy(recomputed)  # the blocks of a copy are its own
    (before, expected), (after, found) = saved_megabytes(plain, x), saved_megabytes(recomputed, x)
    assert after < before / 2
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-12, msg=name)
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)


class Block(nn.Module):
    """A block whose output depends on the statistics that it updates, one of them by another tensor."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.norm = BatchRenorm1d(6)
        self.norm.num_batches_tracked.fill_(20_000)  # past its warm-up
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        self.scale = self.scale * 1.5
        return x + self.scale * self.norm(self.layer(x))


@pytest.mark.parametrize("again", [False, True])
def test_large_blocks_are_not_kept_where_memory_is_to_be_saved(again, trainer, monkeypatch):
    kept = []
    monkeypatch.setattr(distributed, "keep_freed_memory", kept.append)
    settings = {**SETTINGS, "encoder_arch": "shufflenet_v2_x0_5", "activation_checkpointing": again}
    trainer(max_steps=1, limit_val_batches=0).fit(SelfSupervisedMethod("simclr", **settings))
    assert kept == [2**26 if again else 2**30]


def test_blocks_that_read_what_they_update():
    """Two views are encoded before the backward pass, which is made twice."""
    torch.manual_seed(0)
    plain, views = nn.Sequential(Block(), Block()).double(), torch.randn(2, 8, 6, dtype=torch.double)
    recomputed = copy.deepcopy(plain)
    recompute_activations(recomputed)
    for network in (plain, recomputed):
        loss = (network(views[0]) * network(views[1]).sin()).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(recomputed.get_parameter(name).grad, weight.grad, rtol=1e-9, atol=1e-12, msg=name)
    torch.testing.assert_close(recomputed.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_a_forward_that_was_set_on_the_block_is_kept():
    network = nn.Sequential(Block(), Block())
    network[0].forward = lambda x: 3 * x
    recompute_activations(network)
    x = torch.ones(1, 6)
    assert torch.equal(network[0](x), 3 * x)


def test_an_encoder_without_blocks_is_refused():
    with pytest.raises(ValueError, match="activation_checkpointing=True: .* has no list of blocks"):
        SelfSupervisedMethod("simclr", encoder_arch="vgg11", activation_checkpointing=True, dataset_name="cifar10")
    with pytest.raises(ValueError, match="exclude each other"):
        SelfSupervisedMethod("simclr", torch_compile=True, activation_checkpointing=True, dataset_name="cifar10")


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x.add_(1))


def test_a_block_that_changes_its_input_in_place_ends_with_an_error():
    encoder = nn.Sequential(nn.Linear(4, 4), nn.Sequential(InPlace(4, 4), InPlace(4, 4)))
    for block in encoder[1]:
        block.layer = nn.Linear(4, 4)  # a block, not a layer
    recompute_activations(encoder)
    loss = encoder(torch.randn(3, 4)).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # PyTorch's
        loss.backward()
