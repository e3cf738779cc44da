"""Precision: chosen by the machine, kept when resuming, and gradients in bfloat16 against float32."""

import copy
import sys

import pytest
import torch
import yaml
from torch import nn

import self_supervised as ssl
from moco import SelfSupervisedMethod
from self_supervised import train
from self_supervised.convolutions import PointConv2d
from self_supervised.networks.encoders import FASTEST_LAYOUT, get_encoder
from self_supervised.training import precision
from self_supervised.training.verdict import Verdict

CLIPS = {"dataset_name": "kinetics", "num_frames": 4}
CNNS = ["small_cnn", "resnet18", "ws_resnet18", "shufflenet_v2_x0_5", "mobilenet_v3_small"]
ENCODERS = [*CNNS, "convnext_tiny", "vit_b_16", "r3d_18"]
WRONG = [  # layer, shape of its input: gradients that torch 2.14 computes wrongly in bfloat16
    (nn.Conv2d(16, 16, 3, stride=2, padding=1), (4, 16, 1, 1)),
    (nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), (4, 16, 4, 1)),
    (nn.Conv2d(16, 32, 7, padding=3), (4, 16, 2, 3)),
    (nn.Conv2d(16, 32, 5, stride=2, padding=2, groups=2), (4, 16, 6, 1)),
    (nn.Conv1d(3, 16, 1, stride=2), (4, 3, 1)),
    (nn.Conv3d(16, 16, 3, padding=1), (4, 16, 2, 2, 2)),
    (nn.LayerNorm(64), (128, 200, 64)),
]
RIGHT = [
    (PointConv2d(16, 16, 3, stride=2, padding=1), (4, 16, 1, 1)),  # a linear layer
    (nn.Conv2d(64, 64, 3, padding=1), (4, 64, 2, 2)),
    (nn.Conv2d(64, 64, 3, stride=2, padding=1), (4, 64, 4, 4)),
]


@pytest.fixture
def machine(monkeypatch):
    """machine(ratio, ...): a processor with or without bfloat16, which computes it `ratio` times as fast."""

    def pretend(ratio: float = 2.0, has_bf16: bool = True) -> None:
        monkeypatch.delenv(precision.VARIABLE)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(precision, "speedup", lambda *_: ratio)

    return pretend


# ---- The choice ----


@pytest.mark.parametrize(
    ("of_machine", "arguments", "chosen", "reason"),
    [
        ({"ratio": 1.9}, (), "bf16-mixed", "1.9 times"),
        ({"ratio": 0.95}, (), "32-true", "0.9 times"),
        ({"has_bf16": False}, (), "32-true", "has no bfloat16"),
        ({}, ("cpu", 2), "32-true", "single process"),
        ({}, ("mps",), "32-true", "bfloat16 is for"),
    ],
)
def test_precision_on_a_processor(of_machine, arguments, chosen, reason, machine, small):
    machine(**of_machine)
    found, why = precision.choose(SelfSupervisedMethod(small(encoder_arch="small_cnn")), *arguments)
    assert found == chosen and reason in why


@pytest.mark.parametrize(("capability", "chosen"), [((8, 0), "bf16-mixed"), ((7, 5), "32-true")])
def test_precision_on_a_gpu(capability, chosen, machine, monkeypatch, small):
    machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    method = SelfSupervisedMethod(small(encoder_arch="small_cnn"))
    assert ssl.best_precision(method) == chosen
    assert precision.choose(method, "cpu")[0] == "bf16-mixed"


def test_clips_are_trained_in_float32(machine, small):
    machine()
    encoder = nn.Sequential(nn.Conv3d(1, 8, 3), nn.Flatten())
    assert precision.choose(type("Method", (), {"model": encoder}))[0] == "32-true"


def test_the_measurement_leaves_encoder_and_random_state_as_they_are(small):
    method = SelfSupervisedMethod(small(encoder_arch="small_cnn"))
    before, state = copy.deepcopy(method.model.state_dict()), torch.get_rng_state()
    assert 0.01 < precision.speedup(method.model, method.params.input_shape) < 30  # low without bfloat16 instructions
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in method.model.state_dict().items())


def test_a_run_says_and_records_its_precision_and_keeps_it_when_resumed(machine, monkeypatch, tmp_path, capsys):
    def run(*more: str) -> tuple[str, str]:
        line = "simclr --dataset_name digits --encoder_arch small_cnn --batch_size 16 --limit_train_batches 2 --seed 0"
        monkeypatch.setattr(sys, "argv", ["train", *line.split(), "--evaluations", "none", "--out", "run", *more])
        train.main()
        recorded = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["precision"]
        said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("precision: ")]
        return recorded, " ".join(said)

    machine(ratio=1.9)
    found, said = run("--max_epochs", "1", "--limit_val_batches", "0")
    assert found == "bf16-mixed" and "1.9 times as fast as float32" in said
    monkeypatch.setattr(precision, "speedup", lambda *_: 0.8)  # another program keeps the machine busy
    again = ("--max_epochs", "2", "--resume", "auto", "--limit_val_batches", "0")
    assert run(*again) == ("bf16-mixed", "precision: bf16-mixed (as before)")


@pytest.mark.slow
def test_the_random_encoders_scores_differ_little_with_the_precision(small, trainer):
    found = {}
    for name in ("32-true", "bf16-mixed"):
        fit = trainer(precision=name, limit_val_batches=1.0)
        fit.fit(SelfSupervisedMethod(small("simclr", batch_size=64, evaluations=["linear_probe"])))
        found[name] = next(each for each in fit.callbacks if isinstance(each, Verdict)).before["valid_class_acc"]
    assert abs(found["bf16-mixed"] - found["32-true"]) < 2


# ---- bfloat16 against float32 ----


def gradients(layer: nn.Module, x: torch.Tensor, of_output: torch.Tensor, half: bool) -> list[torch.Tensor]:
    """Output, and gradients of input and parameters."""
    x = x.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = layer(x.bfloat16() if half else x)
    return [output, *torch.autograd.grad(output, [x, *layer.parameters()], of_output.to(output.dtype))]


def assert_agrees(layer: nn.Module, x: torch.Tensor) -> None:
    of_output = torch.randn(layer(x.float()).shape)
    exact, rounded = (gradients(copy.deepcopy(layer), x, of_output, half) for half in (False, True))
    assert rounded[0].dtype == torch.bfloat16
    for a, b in zip(rounded, exact, strict=True):
        assert (a - b).norm() <= 0.03 * b.norm() + 1e-3, layer


@pytest.mark.parametrize(("layer", "shape"), WRONG, ids=str)
def test_wrong_gradients_are_computed_in_float32(layer, shape):
    assert precision.has_wrong_gradient(layer, torch.Size(shape))
    precision.keep_exact(layer)
    assert_agrees(layer, torch.randn(shape))


@pytest.mark.parametrize(("layer", "shape"), RIGHT, ids=str)
def test_other_convolutions_stay_in_bfloat16(layer, shape):
    precision.keep_exact(layer)
    kinds = []
    layer.register_forward_hook(lambda *_: kinds.append(torch.is_autocast_enabled("cpu")), prepend=True)
    assert_agrees(layer, torch.randn(shape))
    assert kinds[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
def test_gradients_of_every_layer_of_each_kind_of_encoder(name, small):
    """Each from the same input: rounding of a whole network with batch statistics of few images is chaotic."""
    fields = CLIPS if name == "r3d_18" else {"dataset_name": "cifar10"}
    params = small(encoder_arch=name, transform_crop_size=32, **fields)
    encoder = get_encoder(params)[0].train()
    precision.keep_exact(encoder)
    inputs = {}
    layers = [layer for layer in encoder.modules() if not list(layer.children()) and list(layer.parameters())]
    hooks = [layer.register_forward_pre_hook(lambda of, x: inputs.setdefault(of, x[0].detach())) for layer in layers]
    images = torch.randn(4, *params.input_shape)
    with torch.autocast("cpu", torch.bfloat16):
        encoder(images.to(memory_format=FASTEST_LAYOUT[images.dim()]))
    for hook in hooks:
        hook.remove()
    assert len(inputs) >= 10
    for layer, x in inputs.items():
        assert_agrees(layer, x)


def test_autocast_is_restored_after_an_error():
    layer = nn.Conv2d(16, 16, 3, stride=2, padding=1)
    precision.keep_exact(layer)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(RuntimeError):
            layer(torch.randn(4, 3, 1, 1))
        assert torch.is_autocast_enabled("cpu")


def test_pure_bfloat16_is_refused_where_its_gradient_is_wrong():
    layer = nn.Conv2d(16, 16, 3, stride=2, padding=1).bfloat16()
    precision.keep_exact(layer)
    with pytest.raises(ValueError, match="precision='bf16-true'"):
        layer(torch.randn(4, 16, 1, 1).bfloat16())
