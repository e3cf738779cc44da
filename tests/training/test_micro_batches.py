"""A batch that is encoded in parts has the loss and the gradients of the whole batch, in the memory of a part."""

from contextlib import nullcontext

import pytest
import torch
from pytorch_lightning.strategies import DDPStrategy
from test_ddp import SMALL, Batches, Gradients, encoder
from test_ddp import trainer as trainer_of
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moco
from batchrenorm import BatchRenorm2d
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised import convolutions, losses
from self_supervised.training.micro_batches import MicroBatches, prepare_strategy

N = 12
OTHERS = {"n_small_views": 1, "transform_small_crop_size": 8}


BUILT = 2  # passes while a method is built: they measure the width, and try the layout of the images


class Noisy(nn.Module):
    """Encoder whose dropout must draw the same numbers in both passes."""

    def __init__(self):
        super().__init__()
        self.layers = encoder()
        self.seen = []

    def forward(self, x):
        found = nn.functional.dropout(self.layers(x), 0.5, self.training)
        self.seen.append((found.requires_grad, found.detach()))
        return found


def trained(preset: str, module: nn.Module | None = None, accumulated: int = 1, **fields) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    views = [[torch.randn(N, 1, 8, 8, generator=g).double() for _ in range(3)] for _ in range(3)]
    torch.manual_seed(1)
    params = PRESETS[preset](**{**SMALL, "mlp_normalization": "ln", "evaluations": [], **fields})
    model = SelfSupervisedMethod(params, encoder=module or encoder())
    trainer_of(1, precision="64-true", accumulate_grad_batches=accumulated).fit(
        model, Batches([(of_step, torch.arange(N) // 3) for of_step in views])
    )
    return model.state_dict()


CASES = [
    *((name, {}) for name in PRESETS if name != "distill"),
    ("sce", OTHERS),
    ("simsiam", {"use_both_augmentations_as_queries": False}),  # view 1 is only a key
    ("sce", {**OTHERS, "accumulated": 3}),
    ("moco_v2", {"loss_type": "bce", "online_classifier": True, "shuffle_batch_norm": True}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "fields"), CASES)
def test_training_equals_that_with_whole_batches(preset, fields):
    whole, parts = trained(preset, **fields), trained(preset, **fields, micro_batch_size=5)
    for name, value in whole.items():
        assert torch.allclose(parts[name].double(), value.double(), rtol=1e-8, atol=1e-9), name


@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)])
def test_weights_that_passes_share_have_all_gradients(precision, monkeypatch):
    """Of a ResNet whose passes share converted weights, those of passes without gradients, too."""
    torch.manual_seed(0)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    params = PRESETS["simclr"](dataset_name="cifar10", low_resolution_stem=False, micro_batch_size=4, evaluations=[])
    found = []
    for sharing in (convolutions.weights_shared, lambda *_: nullcontext()):
        monkeypatch.setattr(moco, "weights_shared", sharing)
        gradients = Gradients()
        fit = trainer_of(1, precision=precision, callbacks=[gradients])
        fit.fit(SelfSupervisedMethod(params, seed=0), Batches([views]))
        found.append(gradients.found)
    most = 1e-3 if precision == "32-true" else 1e-2  # bfloat16 has 8 bits, and processors sum in other orders
    for name, gradient in found[0].items():
        assert torch.allclose(gradient, found[1][name], rtol=most, atol=most * float(gradient.abs().max())), name


def test_both_passes_draw_the_same_and_statistics_move_once():
    module = Noisy()
    module.layers[1] = nn.BatchNorm2d(8, momentum=None)  # its statistics are means over the batches that it counts
    state = trained("simclr", module, micro_batch_size=4)
    steps = torch.tensor([has for has, _ in module.seen[BUILT:]]).view(3, -1)
    assert torch.equal(steps, torch.tensor([[False] * 5 + [True] * 6] * 3))  # 2 views x 3 parts; the last only once
    passes = torch.stack([x for _, x in module.seen[BUILT:]]).unflatten(0, (3, 11))
    assert torch.equal(passes[:, :5], passes[:, 6:])
    assert state["model.layers.1.num_batches_tracked"] == 3 * 2 * 3


ONLY_A_KEY = {**OTHERS, "use_both_augmentations_as_queries": False}  # view 1, between two queries


@pytest.mark.parametrize(("preset", "fields", "n_views"), [("simclr", {}, 2), ("simsiam", ONLY_A_KEY, 3)])
def test_the_second_pass_reads_the_statistics_that_the_first_read(preset, fields, n_views):
    """Of layers whose outputs in training depend on running statistics."""
    module = Noisy()
    module.layers[1] = BatchRenorm2d(8, momentum=0.3)
    module.layers[1].num_batches_tracked.fill_(20_000)  # before 5,000 it is batch norm
    trained(preset, module, micro_batch_size=4, **fields)
    n_parts = 3 * n_views
    passes = torch.stack([x for _, x in module.seen[BUILT:]]).unflatten(
        0, (3, 2 * n_parts - 1)
    )  # the last part only once
    assert torch.equal(passes[:, : n_parts - 1], passes[:, n_parts:])
    counted = [layer.num_batches_tracked for layer in module.modules() if isinstance(layer, BatchRenorm2d)]
    assert counted == [20_000 + 3 * 3 * n_views]


def test_the_part_that_is_encoded_once_has_gradients_with_autocast():
    """Autocast keeps the weights that it casts, those of passes without gradients, too."""
    images = torch.randn(6, 8)
    network = nn.Linear(8, 3)
    found = []
    for size in (2, 6):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            parts = MicroBatches([network], lambda x: (network(x),), {0: images}, size, seed=0)
            parts.outputs[0][0].float().square().sum().backward()
        parts.backward()
        found.append(network.weight.grad.clone())
    assert torch.allclose(*found, rtol=0.02, atol=0.02)


class Largest(TorchDispatchMode):
    """The largest number of elements that an operation returned, also in the backward pass."""

    elements = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        found = operation(*args, **(kwargs or {}))
        tensors = [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return found


@pytest.mark.parametrize("preset", ["simclr", "eqco", "sce", "moco_v3"])
def test_similarities_exist_of_a_part_of_the_queries_at_a_time(preset):
    params = PRESETS[preset](**{**SMALL, "dim": 4}, micro_batch_size=8)
    q, k = (torch.randn(100, 4, requires_grad=True) for _ in range(2))
    queue, largest, found = torch.randn(24, 4) if params.has_queue else None, {}, {}
    for name, build in (("whole", losses.get_loss), ("parts", losses.get_loss_in_parts)):
        with Largest() as counted:
            found[name] = build(params)(q, k, queue)
            found[name]["loss"].backward()
        largest[name] = counted.elements
    assert largest["parts"] <= 8 * (24 + 2 * 100) < 100 * 99 <= largest["whole"]
    for name, value in found["whole"].items():
        assert torch.allclose(found["parts"][name], value)


def test_a_batch_that_is_one_part_is_encoded_once():
    module = Noisy()
    trained("simclr", module, micro_batch_size=N)
    assert [has for has, _ in module.seen[BUILT:]] == [True] * 3 * 2  # steps, views


def test_a_step_of_a_subclass_that_makes_no_parts_is_refused():
    class Own(SelfSupervisedMethod):
        def training_step(self, batch, batch_idx):
            return self.encode(batch[0][0]).z.square().mean()

    params = PRESETS["simclr"](**{**SMALL, "evaluations": []}, micro_batch_size=4)
    with pytest.raises(ValueError, match="micro_batch_size: training_step has encoded the whole batch. Call super()"):
        trainer_of(1).fit(Own(params, encoder=encoder()), Batches([([torch.randn(N, 1, 8, 8)] * 2, torch.zeros(N))]))


def test_what_does_not_work_with_parts_is_refused():
    fit = trainer_of(1, strategy=DDPStrategy(static_graph=True, process_group_backend="gloo"))
    with pytest.raises(ValueError, match="micro_batch_size does not work with DDPStrategy, nor with static_graph=True"):
        prepare_strategy(fit)
    prepare_strategy(trainer_of(1))
    with pytest.raises(ValueError, match="micro_batch_size=1 is too small for mlp_normalization='bn'"):
        PRESETS["byol"](micro_batch_size=1)
