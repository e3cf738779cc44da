"""Every preset with every normalization trains all of its parts, saves, and is loaded unchanged."""

import pytest
import torch
from conftest import LONG
from pytorch_lightning.callbacks import LambdaCallback

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import PRESETS
from self_supervised.catalogue import NORMALIZATIONS

# An untrained network without normalization maps all images to nearly one point.
pytestmark = pytest.mark.filterwarnings("ignore:collapse")


# without a state, or resumed in tests/training/test_resume.py, or with videos
OF_OTHER_TESTS = ("moco_v2", "eqco", "byol", "simclr", "vicreg", "barlow_twins", "sce_video")
NORMS = [None, *NORMALIZATIONS]
ROWS = [  # each preset with one normalization, or with none; `make test-long`: with each
    (name, norm) for i, name in enumerate(PRESETS) for norm in (NORMS if LONG > 1 else [NORMS[i % len(NORMS)]])
]


@pytest.mark.parametrize(("name", "normalization"), ROWS)
def test_trains_every_part_saves_and_reloads(name, normalization, small, trainer, tmp_path):
    widths = {"dim": 64, "mlp_hidden_dim": 64}  # with 32, group norm would be 0
    model = SelfSupervisedMethod(small(name, mlp_normalization=normalization, **widths, evaluations=[]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fit = trainer()
    losses, without_gradient = [], set()
    model.on_train_batch_end = lambda outputs, batch, index: losses.append(outputs["loss"])
    model.on_before_optimizer_step = lambda optimizer: without_gradient.update(
        name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
    )
    fit.fit(model)
    assert fit.global_step == 2 and torch.stack(losses).isfinite().all()
    assert not without_gradient
    for key, parameter in model.named_parameters():
        assert parameter.isfinite().all(), key
        if parameter.ndim > 1:
            assert not torch.equal(parameter, before[key]), f"{key} did not move"

    fit.save_checkpoint(tmp_path / "example.ckpt")
    checkpoint = torch.load(tmp_path / "example.ckpt", weights_only=True)
    settings = checkpoint["hyper_parameters"]
    flat = str | int | float | bool | None | list
    assert all(isinstance(value, flat) for value in settings.values()) and settings["embedding_dim"] == 256
    twin = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "example.ckpt").eval()
    x = torch.randn(3, 1, 8, 8)
    assert torch.equal(twin(x), model.eval()(x))
    for ours, theirs in zip(twin.encode(x), model.encode(x), strict=True):
        assert torch.equal(ours, theirs)
    assert LinearClassifierMethod.from_moco_checkpoint(tmp_path / "example.ckpt")(x).shape == (3, 10)


@pytest.mark.parametrize("loss_type", ["ce", "dcl", "bce", "ip", "sce"])
@pytest.mark.parametrize("negatives", ["queue", "batch", "both"])
def test_every_loss_with_every_kind_of_negatives(loss_type, negatives, small, trainer):
    used = {"queue": ("queue",), "batch": ("batch",), "both": ("queue", "batch")}[negatives]
    sources = {f"use_negative_examples_from_{s}": s in used for s in ("queue", "batch")}
    model = SelfSupervisedMethod(small(loss_type=loss_type, evaluations=[], **sources))
    fit = trainer()
    fit.fit(model)
    assert fit.callback_metrics["step_train_loss"].isfinite() and "step_train_acc1" in fit.callback_metrics


@pytest.mark.parametrize("name", ["byol", "simclr"])
def test_weight_standardization_and_another_normalization_for_the_predictor(name, small, trainer):
    fields = {"use_mlp_weight_standardization": True, "mlp_normalization": "gn", "prediction_mlp_normalization": "ln"}
    model = SelfSupervisedMethod(small(name, **fields, mlp_hidden_dim=64, evaluations=[]))
    trainer().fit(model)
    kinds = [type(layer).__name__ for layer in model.projection_model.modules()]
    assert "GroupNorm" in kinds and "LayerNorm" not in kinds
    assert ("LayerNorm" in [type(layer).__name__ for layer in model.prediction_model.modules()]) == (name == "byol")


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in OF_OTHER_TESTS])
def test_it_resumes_bit_equal_within_an_epoch(name, small, trainer, tmp_path):
    def trained(checkpoint: str | None = None) -> dict[str, torch.Tensor]:
        model = SelfSupervisedMethod(small(name, encoder_arch="small_cnn", evaluations=[], batch_size=8))
        save = LambdaCallback(
            on_train_batch_end=lambda fit, *_: fit.global_step == 2 and fit.save_checkpoint(tmp_path / "half.ckpt")
        )
        fit = trainer(limit_train_batches=4, callbacks=[] if checkpoint else [save])
        fit.fit(model, ckpt_path=checkpoint)
        return model.state_dict()

    whole, resumed = trained(), trained(str(tmp_path / "half.ckpt"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("lagging", [False, True])
def test_assignments_of_swav_use_the_queue_later(lagging, small, trainer):
    """The first epoch is as without a queue, the second is not; prototypes have the length 1, lagging ones, too."""
    ends = []
    for fields in ({"use_negative_examples_from_queue": False}, {"queue_from_epoch": 1}, {"queue_from_epoch": 0}):
        weights = []
        for epochs in (1, 2):
            method = SelfSupervisedMethod(
                small("swav", **fields, use_lagging_model=lagging, evaluations=[], max_epochs=2)
            )
            fit = trainer(max_epochs=2, max_steps=4 * epochs, limit_train_batches=4)
            fit.fit(method)
            weights.append(method.prototypes.weight.detach().clone())
            if lagging:  # before its update at the end of the step, which is small
                assert torch.allclose(method.lagging_prototypes.weight.norm(dim=1), torch.ones(()), atol=1e-3)
        ends.append(weights)
    (one, two), (one_later, two_later), (one_at_once, _) = ends
    assert torch.equal(one, one_later) and not torch.equal(one, one_at_once) and not torch.equal(two, two_later)
