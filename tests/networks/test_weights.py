"""Weights files of every system, made of real networks under its key names, give that system's own network."""

import argparse
import copy
import json
import os
import re
import sys
import urllib.error
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from functools import cache, partial

import attrs
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

import ws_resnet
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import EncoderAndDataParams, ModelParams
from self_supervised import evaluate
from self_supervised.embeddings import embed
from self_supervised.embeddings.parquet import facts_of_file
from self_supervised.exports import export
from self_supervised.networks import architectures, baselines, builders, encoders, frozen_encoder, layouts, pretrained
from self_supervised.networks.pretrained import load_encoder
from self_supervised.torch_files import StandIn, safe_load


@cache
def network(name: str = "resnet18", seed: int = 0, stem: str | None = None) -> nn.Module:
    """Return a network without its classifier; with a stem for small images: "cifar" is that of the original and of
    solo-learn, "padding_1" that of stable-pretraining."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name)
    if hasattr(model, "fc"):
        model.fc = nn.Identity()
    if stem is not None:
        padding = 2 if stem == "cifar" else 1
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, padding, bias=False), nn.Identity()
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Give every batch norm statistics that differ from the initial ones."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 2), layer.num_batches_tracked.fill_(7)
    return model.eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def twin(name: str = "resnet18", **kwargs) -> dict[str, Tensor]:
    """Return the momentum encoder: the same names with other values, which must not be loaded."""
    return network(name, seed=1, **kwargs).state_dict()


MLP = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)).state_dict()
QUEUE = {"queue": torch.randn(4, 8), "queue_ptr": torch.zeros(1, dtype=torch.long)}


def moco() -> tuple[dict, nn.Module, int]:
    heads = {key: under("fc.", {"0.weight": torch.randn(8, 512), "2.weight": torch.randn(4, 8)}) for key in "qk"}
    state = {**under("encoder_q.", own() | heads["q"]), **under("encoder_k.", twin() | heads["k"]), **QUEUE}
    return {"epoch": 200, "arch": "resnet18", "state_dict": under("module.", state), "optimizer": {}}, network(), 64


def own(name: str = "resnet18", **kwargs) -> dict[str, Tensor]:
    return network(name, **kwargs).state_dict()


def moco_v3():
    state = {**under("base_encoder.", own() | under("fc.", MLP)), **under("predictor.", MLP)}
    state |= under("momentum_encoder.", twin() | under("fc.", MLP))
    return {"epoch": 100, "arch": "resnet18", "state_dict": under("module.", state)}, network(), 64


def barlowtwins_backbone():
    return own("resnet50"), network("resnet50"), 64


def barlowtwins():
    state = {**under("backbone.", own()), **under("projector.", MLP), "bn.running_mean": torch.zeros(4)}
    return {"epoch": 3, "model": under("module.", state), "optimizer": {"param_groups": []}}, network(), 64


def vicreg():
    """Return a file whose optimizer state names a function of the training script."""
    state = {**under("backbone.", own()), **under("projector.", MLP)}
    groups = [{"lr": 0, "weight_decay_filter": sys.modules["__main__"].exclude_bias_and_norm}]
    return {"epoch": 3, "model": under("module.", state), "optimizer": {"param_groups": groups}}, network(), 64


def lightly():
    """Build backbone = nn.Sequential(*list(resnet.children())[:-1]), as in lightly's examples."""
    sequential = nn.Sequential(*list(network().children())[:-1])
    other = nn.Sequential(*list(network(seed=1).children())[:-1])
    state = {**under("backbone.", sequential.state_dict()), **under("projection_head.layers.", MLP)}
    state |= {**under("backbone_momentum.", other.state_dict()), **under("projection_head_momentum.layers.", MLP)}
    content = {"epoch": 9, "pytorch-lightning_version": "2.6.0", "state_dict": state, "hyper_parameters": {}}
    return content, nn.Sequential(sequential, nn.Flatten()), 64


def lightlys_generator():
    """Requires lightly (benchmarks/requirements.txt)."""
    return pytest.importorskip("lightly.models").ResNetGenerator


def lightlys_own_resnet():
    """Without a ReLU after the stem: lightly's network calls F.relu, which is not a child of a numbered Sequential."""
    children = list(shaken(lightlys_generator()("resnet-18")).children())[:-1]
    backbone = nn.Sequential(*children, nn.AdaptiveAvgPool2d(1)).eval()
    state = {**under("backbone.", backbone.state_dict()), **under("projection_head.layers.", MLP)}
    return {"state_dict": state}, nn.Sequential(backbone, nn.Flatten()), 32


def lightlys_own_resnet_unnumbered():
    resnet = shaken(lightlys_generator()("resnet-18"))
    state = {**under("backbone.", resnet.state_dict()), **under("projection_head.layers.", MLP)}
    resnet = copy.deepcopy(resnet)
    resnet.linear = nn.Identity()
    return {"state_dict": state}, resnet, 32


def lightlys_vit():
    """Return a file with timm's ViT, wrapped for masks, which an encoder never uses."""
    modules = pytest.importorskip("lightly.models.modules")
    torch.manual_seed(0)
    backbone = modules.MaskedVisionTransformerTIMM(timm.create_model("vit_tiny_patch16_224", num_classes=9)).eval()
    state = {**under("backbone.", backbone.state_dict()), **under("projection_head.layers.", MLP)}
    return {"state_dict": state}, backbone, 224


def lightly_backbone():
    """Return a file as the tutorials of lightly save it."""
    sequential = nn.Sequential(*list(network().children())[:-1])
    return {"resnet18_parameters": sequential.state_dict()}, nn.Sequential(sequential, nn.Flatten()), 64


def solo_learn():
    state = {**under("backbone.", own(stem="cifar")), **under("momentum_backbone.", twin(stem="cifar")), **QUEUE}
    state |= {"classifier.weight": torch.randn(10, 512), "classifier.bias": torch.randn(10), **under("projector.", MLP)}
    return {"epoch": 9, "state_dict": state, "loops": {}}, network(stem="cifar"), 32


def solo_learn_first_versions():
    state = {**under("encoder.", own()), **under("momentum_encoder.", twin()), **under("projector.", MLP)}
    return {"state_dict": {**state, "classifier.weight": torch.randn(10, 512)}}, network(), 64


def stable_pretraining():
    """Return a file of a Module with a probe, whose layers its callback adds."""
    state = {
        **under("backbone.", own(stem="padding_1")),
        **under("projector.", MLP),
        "callbacks_modules.probe.bias": QUEUE["queue"],
    }
    content = {"state_dict": state, "hyper_parameters": {"system.working_dir": "/home/me"}}
    return content, network(stem="padding_1"), 32


def stable_pretraining_wrapped():
    """Return a file with a TeacherStudentWrapper around the backbone, whose own evaluations take the teacher."""
    student, teacher = under("backbone.student.", twin()), under("backbone.teacher.", own())
    return {"state_dict": {**student, "backbone.ema_coefficient": torch.ones(()), **teacher}}, network(), 64


def openselfsup():
    """Return a file that holds the trained backbone twice."""
    state = {**under("backbone.", own()), **under("encoder_q.0.", own()), **under("encoder_q.1.mlp.", MLP)}
    state |= {**under("encoder_k.0.", twin()), **under("encoder_k.1.mlp.", MLP), **QUEUE}
    return {"meta": {"epoch": 200, "config": "..."}, "state_dict": state}, network(), 64


def mmselfsup():
    state = {**under("backbone.", own()), **under("neck.", MLP), **under("target_net.module.0.", twin())}
    return {"meta": {"seed": 0}, "state_dict": state}, network(), 64


def mmselfsup_extracted():
    return {"state_dict": own(), "author": "MMSelfSup"}, network(), 64


def dino():
    def student_or_teacher(state):
        return {**under("backbone.", state), **under("head.mlp.", MLP)}

    content = {"student": under("module.", student_or_teacher(twin())), "teacher": student_or_teacher(own())}
    return {**content, "epoch": 5, "args": argparse.Namespace(arch="resnet18", seed=0)}, network(), 64


def torchvision_classifier():
    return (
        {**own("vit_b_32"), **under("heads.head.", {"weight": torch.randn(9, 768), "bias": torch.randn(9)})},
        headless_vit(),
        224,
    )


@cache
def headless_vit():
    model = copy.deepcopy(network("vit_b_32"))
    model.heads = nn.Identity()
    return model


def torchvision_training():
    state = {**own(), "fc.weight": torch.randn(9, 512), "fc.bias": torch.randn(9)}
    return {"model": state, "epoch": 1, "args": argparse.Namespace(model="resnet18")}, network(), 64


def timm_training():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=9)
    state = copy.deepcopy(model.state_dict())
    model.reset_classifier(0)
    return {"arch": "vit_tiny_patch16_224", "version": 2, "state_dict": state}, model.eval(), 224


def timm_state_dict():
    content, model, size = timm_training()
    return content["state_dict"], model, size


def compiled_and_wrapped():
    return {"state_dict": under("_orig_mod.module.", own())}, network(), 64


def of_an_unknown_system():
    return {"state_dict": {**under("net.", own()), "temperature": torch.ones(1)}}, network(), 64


def ours_exported():
    settings = {"encoder_arch": "resnet18", "in_channels": 3, "low_resolution_stem": False, "transform_crop_size": 64}
    constants = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "dataset_name": "stl10"}
    return {"state_dict": own(), "self_supervised": settings | constants}, network(), 64


def the_original_on_cifar10():
    settings = {
        "encoder_arch": "resnet18",
        "embedding_dim": 512,
        "dataset_name": "cifar10",
        "lr": 0.5,
        "K": 8,
        "dim": 4,
    }
    state = {**under("model.", own(stem="cifar")), **under("lagging_model.", twin(stem="cifar")), **QUEUE}
    state |= under("projection_model.net.", MLP)
    return {"state_dict": state, "hyper_parameters": settings}, network(stem="cifar"), 32


SYSTEMS = {
    "moco": (moco, "moco", "fc. (2 tensors), encoder_k. (122 tensors), queue, queue_ptr"),
    "moco v3": (moco_v3, "moco v3", "fc. (9 tensors), predictor. (9 tensors), momentum_encoder. (129 tensors)"),
    "barlowtwins, resnet50.pth": (barlowtwins_backbone, "names of torchvision or timm", ""),
    "barlowtwins": (barlowtwins, "barlowtwins", "projector. (9 tensors), bn. (1 tensor)"),
    "vicreg": (vicreg, "vicreg", "projector. (9 tensors)"),
    "lightly": (lightly, "lightly", "backbone_momentum. (120 tensors)"),
    "lightly's own resnet": (lightlys_own_resnet, "lightly", "projection_head. (9 tensors)"),
    "lightly's own resnet, unnumbered": (
        lightlys_own_resnet_unnumbered,
        "lightly",
        "linear. (2 tensors), projection_head. (9 tensors)",
    ),
    "lightly's vit": (lightlys_vit, "lightly", "head. (2 tensors), backbone. (1 tensor), projection_head. (9 tensors)"),
    "lightly, backbone": (lightly_backbone, "names without a system", ""),
    "solo-learn on CIFAR": (solo_learn, "solo-learn", "momentum_backbone. (120 tensors)"),
    "solo-learn, first versions": (solo_learn_first_versions, "solo-learn", "momentum_encoder. (120 tensors)"),
    "stable-pretraining on CIFAR": (stable_pretraining, "stable-pretraining", "callbacks_modules. (1 tensor)"),
    "stable-pretraining, teacher": (stable_pretraining_wrapped, "stable-pretraining", "backbone. (121 tensors)"),
    "OpenSelfSup": (openselfsup, "OpenSelfSup or mmselfsup", "encoder_q. (129 tensors), encoder_k. (129 tensors)"),
    "mmselfsup": (mmselfsup, "OpenSelfSup or mmselfsup", "neck. (9 tensors), target_net. (120 tensors)"),
    "mmselfsup, extracted": (mmselfsup_extracted, "names of torchvision or timm", ""),
    "dino": (dino, "dino", "head. (9 tensors)"),
    "torchvision": (torchvision_classifier, "names of torchvision or timm", "heads. (2 tensors)"),
    "torchvision's training": (torchvision_training, "names of torchvision or timm", "fc. (2 tensors)"),
    "timm's training": (timm_training, "names of torchvision or timm", "head. (2 tensors)"),
    "timm": (timm_state_dict, "names of torchvision or timm", "head. (2 tensors)"),
    "compiled and wrapped": (compiled_and_wrapped, "names of torchvision or timm", ""),
    "unknown system": (of_an_unknown_system, "encoder under net.", "temperature"),
    "exported": (ours_exported, "self_supervised, exported", ""),
    "the original on CIFAR-10": (
        the_original_on_cifar10,
        "self_supervised, the original",
        "lagging_model. (120 tensors)",
    ),
}


@pytest.fixture
def script(monkeypatch):
    """Function of vicreg's main program, which is missing when the file is read."""

    def exclude_bias_and_norm(p):
        raise AssertionError("this ran")

    exclude_bias_and_norm.__module__, exclude_bias_and_norm.__qualname__ = "__main__", "exclude_bias_and_norm"
    monkeypatch.setattr(sys.modules["__main__"], "exclude_bias_and_norm", exclude_bias_and_norm, raising=False)
    return monkeypatch


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_of_every_system_gives_that_systems_network(system, tmp_path, script):
    make, layout, left_out = SYSTEMS[system]
    content, source, size = make()
    torch.save(content, tmp_path / "weights.pth")
    script.undo()
    encoder = load_encoder(tmp_path / "weights.pth")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = source(x)
        found = encoder(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    report = encoder.report
    assert report.layout == layout and report.matched == len(encoder.model.state_dict())
    assert left_out in str(report) and f"all {report.matched} tensors" in str(report)
    stem = encoder.params.stem_variant
    assert (f"stem_variant={stem!r} of {layout}" in str(report)) == (system == "solo-learn on CIFAR")
    assert encoder.params.crop_size == (size if size != 64 or system == "exported" else 224)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())


def test_settings_of_another_program_are_not_taken_for_ours(tmp_path):
    content = {"state_dict": under("model.", own()), "hyper_parameters": {"encoder_arch": "resnet18", "lr": 1}}
    for more in ({}, {"dataset_name": "mine", "batch_size": "auto"}, {"dataset_name": ["stl10"]}):
        torch.save(content | {"hyper_parameters": content["hyper_parameters"] | more}, tmp_path / "weights.ckpt")
        assert load_encoder(tmp_path / "weights.ckpt").report.layout == "encoder under model."


def test_a_directory_of_files_names_them(tmp_path):
    for name in ("a.ckpt", "b.pth"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a directory. Pass one of its files: a.ckpt, b.pth"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("file", ["checkpoint_0199.pth.tar", "pytorch_model.bin"])
def test_a_directory_of_files_is_not_a_published_name(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "resnet18" / file).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"resnet18: is a directory. Pass one of its files: {file}"):
        load_encoder("resnet18")


@pytest.mark.parametrize(
    "beside",
    [
        {"encoder": None, "rng_state": torch.zeros(4)},
        {"net": None, "criterion": {"center": torch.zeros(3)}},
        {"encoder": None, "momentum_encoder": {str(i): torch.zeros(1) for i in range(200)}},
        {"mine": None, "loss": torch.zeros(()), "projector": MLP},
    ],
)
def test_tensors_beside_the_state_dict(beside, tmp_path):
    torch.save({key: own() if value is None else value for key, value in beside.items()}, tmp_path / "x.pth")
    encoder = load_encoder(tmp_path / "x.pth", encoder_arch="resnet18")
    assert torch.equal(encoder.model.conv1.weight, network().conv1.weight)


def test_several_state_dicts_are_named(tmp_path):
    torch.save({"online": MLP, "target": MLP, "step": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="x.pth holds tensors in several entries: online, target. Save that of the en"):
        load_encoder(tmp_path / "x.pth")


@pytest.mark.parametrize("others", [["classifier."], ["classifier.", "projector."]])
def test_a_stem_that_is_only_guessed_gives_a_warning(others, tmp_path):
    """Files of solo-learn, without a momentum encoder, and of an own module may have the same keys."""
    content = solo_learn()[0]["state_dict"]
    content = {key: tensor for key, tensor in content.items() if key.startswith(("backbone.", *others))}
    torch.save({"state_dict": content}, tmp_path / "weights.pth")
    with pytest.warns(UserWarning, match="read as solo-learn's, whose first convolution pads 2 pixels"):
        load_encoder(tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_encoder(tmp_path / "weights.pth", stem_variant="standard").params.stem_variant == "standard"
    start = {"encoder_arch": "resnet18", "dataset_name": "cifar10", "encoder_weights": str(tmp_path / "weights.pth")}
    with pytest.warns(UserWarning, match="stem_variant='standard'. If it is solo-learn's.* set stem"):
        assert encoders.get_encoder(ModelParams(**start))[0].conv1.padding == (1, 1)
    assert encoders.get_encoder(ModelParams(**start, stem_variant="padding_2"))[0].conv1.padding == (2, 2)


# ---- what is read back of our own ----


def test_our_checkpoint_needs_no_assumptions(small, tmp_path):
    settings = {"encoder_arch": "ws_resnet18", "in_channels": 1, "image_mean": [0.3], "image_std": [0.7]}
    model = SelfSupervisedMethod(small("byol", **settings)).eval()
    save(model, tmp_path / "ours.ckpt")
    encoder = load_encoder(tmp_path / "ours.ckpt")
    assert encoder.report.layout == "self_supervised" and "assumed" not in str(encoder.report)
    assert "lagging_model. (60 tensors)" in str(encoder.report) and encoder.started_from is None
    assert (encoder.params.encoder_arch, encoder.params.low_resolution, encoder.params.crop_size) == (
        "ws_resnet18",
        True,
        8,
    )
    assert (encoder.params.mean, encoder.params.std, encoder.params.dataset_name) == ((0.3,), (0.7,), "digits")
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    expected = model((images / 255 - 0.3) / 0.7)
    assert torch.allclose(encoder.embed(images), expected, rtol=1e-4, atol=1e-5)
    assert encoder.train() is encoder and not encoder.model.training
    lagging = load_encoder(tmp_path / "ours.ckpt", lagging=True)
    assert torch.equal(lagging(images / 255), model.lagging_model(images / 255).detach())
    assert str(lagging.report).count("model. (60 tensors)") == 1 and "the lagging encoder" in str(lagging.report)
    save(SelfSupervisedMethod(small("simclr")), tmp_path / "simclr.ckpt")
    torch.save(network().state_dict(), tmp_path / "plain.pt")
    for name in ("simclr.ckpt", "plain.pt"):
        with pytest.raises(ValueError, match=f"lagging=True: .*{name} has no lagging encoder"):
            load_encoder(tmp_path / name, lagging=True)


def test_the_directory_of_a_run_means_its_pretrained_checkpoint(small, tmp_path, capsys):
    run = tmp_path / "runs/mine"
    steps = run / "pretraining/checkpoints"
    steps.mkdir(parents=True)
    (run / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match="checkpoint='runs/mine': this run has no pretrained.ckpt yet.*auto.$"):
        load_encoder("runs/mine")
    for step in (8, 10):
        (steps / f"step_{step:09}.ckpt").touch()
    for command in (evaluate.main, export.main, embed.main):
        more = {export.main: ["--count"], embed.main: ["photos", "--out", "x.parquet"]}.get(command, [])
        with pytest.raises(SystemExit, match="no pretrained.ckpt yet.* runs/mine/pretraining/.*/step_000000010.ckpt"):
            command(["runs/mine", *more])
    model = SelfSupervisedMethod(small("byol", encoder_weights=None))
    save(model, run / "pretrained.ckpt")
    for given in ("runs/mine", run, "runs/mine/pretrained.ckpt"):
        encoder = load_encoder(given)
        assert encoder.report.source.endswith("runs/mine/pretrained.ckpt")
        assert all(torch.equal(v, model.model.state_dict()[k]) for k, v in encoder.model.state_dict().items())
    evaluate.main(["runs/mine", "--protocols", "uniformity", "--no_baselines"])
    assert (run / "pretrained.evaluation/results.md").is_file()
    export.main(["runs/mine", "--count"])
    assert "projection" in capsys.readouterr().out  # the heads are read from the file, not by load_encoder
    embed.main(["runs/mine", "digits/test", "--out", "x.parquet"])
    assert facts_of_file("x.parquet")["checkpoint"] == str((run / "pretrained.ckpt").resolve())
    linear = LinearClassifierMethod.from_moco_checkpoint(run)
    assert torch.equal(next(linear.model.parameters()), next(model.model.parameters()))


def save(model, path, **more) -> None:
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    torch.save({**checkpoint, **more}, path)


def test_our_export_as_safetensors(tmp_path):
    content, source, _ = ours_exported()
    metadata = {"self_supervised": json.dumps(content["self_supervised"]), "format": "pt"}
    safetensors.torch.save_file(content["state_dict"], tmp_path / "ours.safetensors", metadata)
    encoder = load_encoder(tmp_path / "ours.safetensors")
    assert encoder.report.layout == "self_supervised, exported"
    assert (encoder.params.crop_size, encoder.params.mean, encoder.params.std) == (64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(x), source(x), rtol=1e-4, atol=1e-4)

    safetensors.torch.save_file(under("module.encoder_q.", own()), tmp_path / "others.safetensors")
    encoder = load_encoder(tmp_path / "others.safetensors")
    assert encoder.report.layout == "encoder under encoder_q." and torch.equal(
        encoder(x), load_encoder(tmp_path / "ours.safetensors")(x)
    )
    (tmp_path / "damaged.safetensors").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="damaged.safetensors is corrupt"):
        load_encoder(tmp_path / "damaged.safetensors")


def test_a_users_module_keeps_its_names(tmp_path):
    """The module is numbered like lightly's ResNet, but is not one."""
    model = SelfSupervisedMethod(dataset_name="cifar10", encoder=numbered(), K=8).eval()
    save(model, tmp_path / "ours.ckpt")
    with pytest.raises(ValueError, match="needs encoder=your_module"):
        load_encoder(tmp_path / "ours.ckpt")
    torch.manual_seed(5)
    encoder = load_encoder(tmp_path / "ours.ckpt", encoder=numbered())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(encoder(x), model(x)) and encoder.params.encoder_arch == "module"
    with pytest.raises(
        ValueError, match=r"does not hold a module .*unexpected: 0.weight, .* shape: 1.weight \(64,\) instead"
    ):
        load_encoder(tmp_path / "ours.ckpt", encoder=nn.Sequential(nn.Flatten(), nn.Linear(3072, 512)))


def parts(outer: str) -> nn.Module:
    """Return a module with a child of that name."""
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(OrderedDict({outer: body, "out": nn.Linear(4, 2)}))


@pytest.mark.parametrize("outer", ["backbone", "encoder", "net", "model"])
def test_a_child_of_a_users_module_is_not_taken_for_a_prefix(outer, tmp_path):
    source = parts(outer)
    for content in (source.state_dict(), {"state_dict": under("module.", source.state_dict())}):
        torch.save(content, tmp_path / "own.pt")
        encoder = load_encoder(tmp_path / "own.pt", encoder=parts(outer))
        assert torch.equal(encoder.model.out.weight, source.out.weight) and not encoder.report.left_out
        assert torch.equal(encoder.model[0][0].weight, source[0][0].weight)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize("read", [False, True])
def test_a_users_module_may_be_compiled(written, read, tmp_path):
    def made(is_compiled):
        return torch.compile(parts("net"), backend="eager") if is_compiled else parts("net")

    source = made(written)
    save(SelfSupervisedMethod("simclr", dataset_name="cifar10", encoder=source), tmp_path / "own.ckpt")
    encoder = load_encoder(tmp_path / "own.ckpt", encoder=made(read))
    assert torch.equal(encoder.model.out.weight, source.out.weight)


def numbered() -> nn.Module:
    return nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())


def test_starting_weights_of_timm_may_be_others_of_the_same_architecture(monkeypatch):
    p = ModelParams(dataset_name="cifar10", encoder_arch="timm:vit_tiny_patch16_224")
    monkeypatch.setattr(baselines, "published", lambda name, same, new_stem: same["encoder_arch"])
    wanted = f"{p.encoder_arch}.augreg_in21k"
    assert baselines.starting_encoder(p, wanted) == wanted
    assert baselines.starting_encoder(p, "resnet50") == p.encoder_arch  # which `published` refuses


@pytest.mark.parametrize("channels", [1, 6])
def test_inception_networks_for_other_channels_keep_their_constants(channels, monkeypatch):
    """torchvision's transform_input is for three channels."""
    constants = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
    own = {"dataset_name": "folder", "in_channels": channels, "encoder_arch": "googlenet", **constants}
    weights = layouts.WeightsFile("x.ckpt", "ours", {}, {}, (), "standard", own, None, "googlenet:DEFAULT")
    settings, _ = pretrained.settings_of(weights, {})
    assert settings.items() >= own.items()
    for in_channels in (None, 3):
        gray = {"dataset_name": "digits", "in_channels": in_channels, "encoder_arch": "googlenet", "image_mean": [0.5]}
        pretrained.settings_of(attrs.evolve(weights, settings=gray | {"image_mean": [0.5] * (in_channels or 1)}), {})
    monkeypatch.setattr(baselines, "load_encoder", lambda source, **same: EncoderAndDataParams(**same))
    assert baselines.starting_encoder(ModelParams(**own), "googlenet.pth").image_mean == [0.5] * channels
    state = torchvision.models.googlenet(init_weights=False, aux_logits=False).state_dict()
    file = layouts.WeightsFile("googlenet.pth", "torchvision", state, state, (), "standard", {})
    settings, assumed = pretrained.settings_of(file, {"encoder_arch": "googlenet", "in_channels": channels})
    assert settings["image_mean"] == [0.5] * channels and f"image_mean={[0.5] * channels}" in assumed


@pytest.mark.slow
def test_starting_weights_are_recorded_and_compared(small, trainer, tmp_path):
    torch.save(own("shufflenet_v2_x0_5"), tmp_path / "start.pth")
    channels = {"encoder_arch": "shufflenet_v2_x0_5", "in_channels": 3, "evaluations": []}
    model, fit = SelfSupervisedMethod(small(encoder_weights="start.pth", **channels)), trainer(limit_val_batches=0)
    assert torch.equal(model.model.conv1[0].weight, network("shufflenet_v2_x0_5").conv1[0].weight)
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "trained.ckpt")
    encoder = load_encoder(tmp_path / "trained.ckpt")
    assert encoder.started_from == encoder.report.started_from == str(tmp_path / "start.pth")
    assert encoder.params.encoder_weights is None
    for upright in (True, False):  # the baseline reads the same images
        read = load_encoder(tmp_path / "trained.ckpt", exif_orientation=upright)
        assert baselines.compared(read, None)["starting"].params.exif_orientation is upright
    torch.save(model.model.state_dict(), tmp_path / "start.pth")  # other weights
    with pytest.warns(UserWarning, match="training started are left out: .*start.pth has changed since then"):
        assert "starting" not in baselines.compared(encoder, None)
    assert "starting" in baselines.compared(encoder, str(tmp_path / "start.pth"))
    again = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "trained.ckpt")
    assert again.started_from == encoder.started_from and again.hparams.encoder_weights is None
    stem = {"encoder_arch": "resnet18", "stem_variant": "padding_2", "low_resolution_stem": True}
    params = attrs.evolve(encoder.params, embedding_dim=None, **stem)
    torch.save(encoders.get_encoder(params)[0].state_dict(), tmp_path / "plain.pth")  # which does not tell the padding
    assert baselines.starting_encoder(params, str(tmp_path / "plain.pth")).model.conv1.padding == (2, 2)
    for arch, name in {"resnet18": "resnet18:DEFAULT", "timm:resnet10t": "timm:resnet10t"}.items():
        assert encoders.source_of_weights(small(encoder_arch=arch, encoder_weights="DEFAULT")) == (name, None)


# ---- what the file does not say ----


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnext50_32x4d", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_the_architecture_is_inferred(name, tmp_path):
    """RegNets are not tried: users pass their names."""
    torch.save(torchvision.models.get_model(name).state_dict(), tmp_path / "weights.pth")
    named = {"encoder_arch": name} if name.startswith("regnet") else {}
    assert load_encoder(tmp_path / "weights.pth", **named).params.encoder_arch == name


def ws_resnet18_of(channels: int) -> dict[str, Tensor]:
    state = ws_resnet.ws_resnet18().state_dict()
    return {**state, "conv1.weight": state["conv1.weight"][:, :channels]}


def test_published_names_of_densenets(tmp_path):
    """Torchvision's files have names that its code replaces."""
    source = torchvision.models.densenet121()
    old = {re.sub(r"(\.norm|\.conv)([12]\.)", r"\1.\2", key): value for key, value in source.state_dict().items()}
    old = {key: value for key, value in old.items() if "denselayer" in key or key in source.state_dict()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save({key: value for key, value in old.items() if "num_batches" not in key}, tmp_path / "dense.pth")
    encoder = load_encoder(tmp_path / "dense.pth", encoder_arch="densenet121")
    start = {"encoder_arch": "densenet121", "dataset_name": "stl10", "encoder_weights": str(tmp_path / "dense.pth")}
    for model in (encoder.model, encoders.get_encoder(ModelParams(**start))[0]):
        last = model.features.denseblock4.denselayer16.conv2.weight
        assert torch.equal(last, source.features.denseblock4.denselayer16.conv2.weight)


@pytest.mark.slow
def test_assumptions_are_reported(tmp_path):
    """Group norm without weight standardization has the same names, and many models of timm have the same shapes."""
    torch.save(ws_resnet.ws_resnet18().state_dict(), tmp_path / "gn.pth")
    report = str(load_encoder(tmp_path / "gn.pth").report)
    assert "ws_resnet18 loaded; left out: fc. (2 tensors); assumed: size and norm" in report
    assert "weight standard" in report
    torch.save(timm_state_dict()[0], tmp_path / "vit.pth")
    for channels, constants, text in (  # those that are used
        (1, {}, "size of imagenet, image_mean=[0.449], image_std=[0.226]"),
        (1, {"image_mean": [0.4], "image_std": [0.2]}, "size of imagenet"),
        (3, {"transform_crop_size": 64}, "normalization constants of imagenet"),
    ):
        torch.save(ws_resnet18_of(channels), tmp_path / "gn.pth")
        found = load_encoder(tmp_path / "gn.pth", encoder_arch="ws_resnet18", **constants).report
        assert found.assumed == text
    assert "timm:vit_tiny_patch16_224 of all models" in str(load_encoder(tmp_path / "vit.pth").report)
    assert "assumed: normalization constants of imagenet" in str(load_encoder(tmp_path / "vit.pth").report)
    with pytest.raises(ValueError, match="position embeddings of its timm:vit_tiny_patch16_224 are for"):
        load_encoder(tmp_path / "vit.pth", transform_crop_size=96)
    named = load_encoder(tmp_path / "vit.pth", encoder_arch="timm:vit_tiny_patch16_224", dataset_name="stl10")
    assert str(named.report).endswith("; assumed: normalization constants of imagenet")
    own = {"transform_crop_size": 224, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "dataset_name": "stl10"}
    named = load_encoder(tmp_path / "vit.pth", encoder_arch="timm:vit_tiny_patch16_224", **own)
    assert "; assumed" not in str(named.report) and named.params.mean == (0.5,) * 3


def test_dinov2_of_its_authors_is_recognized(tmp_path):
    """Their file has a token for masks, too, which only the training needs."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=56, depth=1)
    torch.save({**model.state_dict(), "mask_token": torch.zeros(1, 384)}, tmp_path / "x.pth")
    names = architectures.alike_in_timm(model.state_dict())
    assert {"vit_small_patch14_dinov2", "vit_large_patch14_reg4_dinov2"} <= set(names)
    wanted = {key: value for key, value in model.state_dict().items() if key != "mask_token"}
    assert not layouts.misfits(layouts.read_weights(tmp_path / "x.pth").state, wanted)


def test_stems_channels_and_old_files(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet34()
    model.conv1, model.maxpool, model.fc = nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.Identity(), nn.Identity()
    model = shaken(model)
    old = {key: value for key, value in model.state_dict().items() if "num_batches" not in key}
    torch.save(old, tmp_path / "gray.pth", _use_new_zipfile_serialization=False)
    encoder = load_encoder(tmp_path / "gray.pth")
    p = encoder.params
    assert (p.encoder_arch, p.channels, p.low_resolution, p.crop_size) == ("resnet34", 1, True, 32)
    assert (p.mean, p.std) == ((0.449,), (0.226,)) and "assumed: size of cifar10, image_mean=[0.449]" in str(
        encoder.report
    )
    images = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    assert torch.allclose(encoder.embed(images), model((images / 255 - 0.449) / 0.226), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'stl10' has images of 3 channels, the encoder takes 1"):
        load_encoder(tmp_path / "gray.pth", dataset_name="stl10")


def test_the_originals_weight_standardized_resnet_on_cifar10(tmp_path):
    """The original's stem for CIFAR-10 was a plain convolution with padding 2."""
    torch.manual_seed(0)
    source = ws_resnet.ws_resnet18().eval()
    source.conv1, source.maxpool, source.fc = nn.Conv2d(3, 64, 3, 1, 2, bias=False), nn.Identity(), nn.Identity()
    settings = {"encoder_arch": "ws_resnet18", "embedding_dim": 512, "dataset_name": "cifar10"}
    content = {"state_dict": under("model.", source.state_dict()), "hyper_parameters": settings}
    torch.save(content, tmp_path / "original.ckpt")
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(load_encoder(tmp_path / "original.ckpt")(x), source(x), rtol=1e-4, atol=1e-4)


def test_moco_v3s_vit_small_has_other_heads_than_timms(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0).eval()
    state = {**under("module.base_encoder.", source.state_dict()), **under("module.base_encoder.head.", MLP)}
    state |= under("module.momentum_encoder.", {"cls_token": torch.zeros(1)})
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "vit-s.pth.tar")
    with pytest.raises(ValueError, match=r"12 heads .* encoder=timm.create_model\('vit_small_patch16_224'"):
        load_encoder(tmp_path / "vit-s.pth.tar")
    mine = timm.create_model("vit_small_patch16_224", num_heads=12, num_classes=0)
    encoder, x = load_encoder(tmp_path / "vit-s.pth.tar", encoder=mine), torch.randn(1, 3, 224, 224)
    assert torch.allclose(encoder(x), source(x), atol=3e-5) and encoder.report.layout == "moco v3"


@pytest.mark.slow
@pytest.mark.parametrize(("size", "width"), [("tiny", 192), ("small", 384)])
def test_vision_transformers_of_moco_v3_are_known_by_their_position_embeddings(size, width, tmp_path):
    """In a file of solo-learn, and as the start of a training. MAE's embeddings, also fixed, go by rows."""
    model = timm.create_model(f"vit_{size}_patch16_224", num_classes=0)
    frequency = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    w, h = (place.flatten()[:, None] * frequency for place in torch.meshgrid(*[torch.arange(14.0)] * 2, indexing="ij"))
    for column, row, is_refused in ((w, h, True), (h, w, False)):
        fixed = torch.cat([torch.sin(column), torch.cos(column), torch.sin(row), torch.cos(row)], 1)
        model.pos_embed.data[0] = torch.cat([torch.zeros(1, width), fixed])
        state = under("backbone.", model.state_dict()) | {"classifier.weight": torch.zeros(2, width)}
        torch.save({"state_dict": state}, tmp_path / "solo.ckpt")
        arch = {"encoder_arch": f"timm:vit_{size}_patch16_224"}
        train = {"dataset_name": "stl10", "transform_crop_size": 224, "encoder_weights": str(tmp_path / "solo.ckpt")}
        calls = [
            partial(load_encoder, tmp_path / "solo.ckpt", **arch),
            partial(encoders.get_encoder, ModelParams(**train, **arch)),
        ]
        for call in calls:
            message = f"12 heads where timm's has {width // 64}. Pass encoder=timm.create_model"
            with pytest.raises(ValueError, match=message) if is_refused else nullcontext():
                assert call()


def test_objects_of_other_programs_are_not_created(tmp_path):
    """mmengine stores metrics as NumPy values and in objects of its own."""
    content = mmselfsup()[0] | {
        "message_hub": {"loss": np.ones(3), "lr": np.float64(0.1)},
        "args": argparse.Namespace(),
    }
    torch.save(content, tmp_path / "mm.pth")
    read = safe_load(tmp_path / "mm.pth", of_others=True)
    assert {type(read["args"]), *map(type, read["message_hub"].values())} == {StandIn}
    assert load_encoder(tmp_path / "mm.pth").report.matched == 120
    with pytest.raises(ValueError, match="mm.pth holds more than data"):
        safe_load(tmp_path / "mm.pth")


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch it_ran",)


@pytest.mark.parametrize("where", ["extra", "state_dict", "args"])
def test_a_file_that_would_run_code_is_refused(where, tmp_path):
    content = {"state_dict": own(), "args": argparse.Namespace()}
    if where == "args":
        content["args"].more = RunsCode()
    elif where == "state_dict":
        content["state_dict"] = {**own(), "more": RunsCode()}
    else:
        content["extra"] = RunsCode()
    torch.save(content, tmp_path / "malicious.pth")
    with pytest.raises(ValueError, match="malicious.pth holds more than data and would run code on loading"):
        load_encoder(tmp_path / "malicious.pth")
    assert not os.path.exists("it_ran")
    torch.load(tmp_path / "malicious.pth", weights_only=False)
    assert os.path.exists("it_ran")  # an ordinary load does run it


# ---- refusals ----


def broken(change: str) -> dict:
    content = moco()[0]
    state = content["state_dict"]
    if change == "missing":
        del state["module.encoder_q.layer4.1.conv2.weight"]
    elif change == "unexpected":
        state["module.encoder_q.layer5.weight"] = torch.zeros(1)
    elif change == "shape":
        state["module.encoder_q.layer2.0.conv1.weight"] = torch.zeros(128, 64, 1, 1)
    elif change == "count":
        del state["module.encoder_q.bn1.num_batches_tracked"]
    else:
        content["state_dict"] = {k: v for k, v in state.items() if "encoder_q" not in k}
    return content


REFUSALS = {
    "missing": r"does not hold a resnet18 \(read as moco\): missing: layer4.1.conv2.weight",
    "unexpected": "unexpected: layer5.weight",
    "shape": r"of another shape: layer2.0.conv1.weight \(128, 64, 1, 1\) instead of \(128, 64, 3, 3\)",
    "count": "missing: bn1.num_batches_tracked",
    "only the twin": "read as names without a system",
}


@pytest.mark.parametrize("change", REFUSALS)
def test_incomplete_encoders_are_refused(change, tmp_path):
    torch.save(broken(change), tmp_path / "broken.pth")
    with pytest.raises(ValueError, match=f"broken.pth.*{REFUSALS[change]}"):
        load_encoder(tmp_path / "broken.pth", encoder_arch="resnet18")
    if change == "missing":
        with pytest.raises(
            ValueError, match="no encoder of .* fits. .*broken.pth does not hold a resnet18.*missing: lay"
        ):
            load_encoder(tmp_path / "broken.pth")


@pytest.mark.parametrize("content", [{"a": 1}, [torch.zeros(2)], {"state_dict": {}}, torch.zeros(2)])
def test_files_without_named_tensors_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is not a checkpoint or weights file"):
        load_encoder(tmp_path / "other.pth")


def test_unknown_names_and_paths_are_refused():
    with pytest.raises(FileNotFoundError, match="there is no file resnet50.pth"):
        load_encoder("resnet50.pth")
    with pytest.raises(FileNotFoundError, match="there is no file runs/step"):
        load_encoder("runs/step")
    with pytest.raises(ValueError, match="there is no file resnet51, and as a name: .*Nearest: .*resnet50"):
        load_encoder("resnet51")
    with pytest.raises(ValueError, match="resnet50 has only IMAGENET1K_V1, IMAGENET1K_V2"):
        load_encoder("resnet50:V3")
    with pytest.raises(ValueError, match="no published weights of ws_resnet18"):
        load_encoder("ws_resnet18")
    with pytest.raises(ValueError, match="timm publishes no weights resnet18.nobodys.*resnet18.a1_in1k"):
        load_encoder("timm:resnet18.nobodys")
    with pytest.raises(ValueError, match="there is no file timm:resnet19, and as a name: .*Nearest: .*resnet18"):
        load_encoder("timm:resnet19")


# ---- published weights, from a cache filled here ----


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Return torch.hub's cache with a ResNet-18 under the name of torchvision's file."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / torchvision.models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    torch.save({**own(), "fc.weight": torch.randn(1000, 512), "fc.bias": torch.randn(1000)}, path)
    return path


@pytest.mark.parametrize("name", ["resnet18", "resnet18:IMAGENET1K_V1"])
def test_published_by_torchvision(name, hub):
    encoder = load_encoder(name)
    x = torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(x), network()(x), rtol=1e-4, atol=1e-4)
    assert str(encoder.report) == f"{name}: published, all 120 tensors of resnet18 loaded"
    p = encoder.params
    assert (p.crop_size, p.mean, p.std) == (224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert p.encoder_weights is None and p.dataset_name == "imagenet"
    for fact, other in (("encoder_arch", "resnet34"), ("encoder_weights", None)):
        with pytest.raises(ValueError, match=f"{fact}={other!r}: {name} stands for '.*leave {fact} out"):
            load_encoder(name, **{fact: other})
    assert load_encoder(name, encoder_arch="resnet18").report.architecture == "resnet18"
    with pytest.raises(ValueError, match="would leave the first layer of resnet18.* without its published weights"):
        load_encoder(name, low_resolution_stem=True)
    p = load_encoder(name, dataset_name="stl10", transform_crop_size=96).params
    assert (p.crop_size, p.mean, p.dataset_name) == (96, (0.485, 0.456, 0.406), "stl10")


def test_a_first_layer_without_its_published_weights_is_named(hub, caplog):
    """A frozen encoder would keep it as it was drawn."""
    stem = {"dataset_name": "cifar10", "encoder_arch": "resnet18", "encoder_weights": "DEFAULT"}
    with pytest.raises(ValueError, match="the first layer starts from random weights, .* stays so in a frozen encoder"):
        LinearClassifierMethod("linear_sgd", **stem)
    assert "random weights" not in caplog.text
    small = {"K": 8, "dim": 8, "mlp_hidden_dim": 8}
    for build in (partial(LinearClassifierMethod, "fine_tune"), partial(SelfSupervisedMethod, **small)):
        build(**stem)
        assert "warning: encoder_weights='DEFAULT': the first layer starts from random weights" in caplog.text
        caplog.clear()
        method = build(**stem, low_resolution_stem=False)
        assert torch.equal(method.model.conv1.weight, network().conv1.weight) and "warning" not in caplog.text


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_published_weights_are_adapted_to_other_channels(channels, hub, caplog):
    constants = {"image_mean": [0.5] * channels, "image_std": [0.2] * channels}
    of_files = {"dataset_name": "folder", "encoder_arch": "resnet18", "in_channels": channels, **constants}
    method = LinearClassifierMethod("linear_sgd", n_classes=2, encoder_weights="DEFAULT", **of_files)  # it is frozen
    said = f"encoder_weights='DEFAULT': the first layer, of 3 channels, is adapted to in_channels={channels}"
    assert said in caplog.text and "warning" not in caplog.text
    wanted = {**own(), "conv1.weight": timm.models.adapt_input_conv(channels, own()["conv1.weight"])}
    for model in (method.model, load_encoder("resnet18", in_channels=channels, **constants).model):
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in model.state_dict().items())


def test_the_bias_of_an_adapted_first_layer_stays():
    with torch.no_grad():
        model = torchvision.models.squeezenet1_1().eval()
        x = torch.rand(1, 1, 64, 64)
        wanted = model.features(x.expand(-1, 3, -1, -1))
        builders.adapt_stem(model, 1, low_resolution=False, published="DEFAULT")
        assert torch.allclose(model.features(x), wanted, rtol=1e-4, atol=1e-4)


def test_published_weights_from_which_a_training_started(hub, tmp_path, monkeypatch):
    """Their first layer is as new as that of the training. Without them, a column is left out."""
    stem = {"dataset_name": "digits", "encoder_arch": "resnet18", "encoder_weights": "DEFAULT"}
    trained = SelfSupervisedMethod(ModelParams(**stem, low_resolution_stem=True, K=64, dim=4))
    save(trained, tmp_path / "trained.ckpt")
    encoder = load_encoder(tmp_path / "trained.ckpt")
    starting = baselines.compared(encoder, None)["starting"]
    assert torch.equal(starting.model.layer1[0].conv1.weight, network().layer1[0].conv1.weight)
    assert starting.model.conv1.weight.shape == (64, 1, 3, 3)
    hub.unlink()
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.warns(
        UserWarning, match="the weights from which the training started are left out: .*resnet18:DEFAULT"
    ):
        assert list(baselines.compared(encoder, None)) == ["random"]
    with pytest.raises(OSError, match="could not be downloaded"):
        baselines.compared(encoder, "resnet18")


@pytest.mark.parametrize("variable", ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "OTHER"])
def test_published_files_run_no_code_in_any_environment(variable, hub, monkeypatch):
    monkeypatch.setenv(variable, "1")
    assert load_encoder("resnet18").report.matched == 120
    torch.save({**own(), "more": RunsCode()}, hub)
    with pytest.raises(ValueError, match="published weights of resnet18 holds more than data and would run code"):
        load_encoder("resnet18")
    assert not os.path.exists("it_ran") and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    assert os.environ[variable] == "1"


def test_published_by_timm(monkeypatch):
    torch.manual_seed(0)
    source = timm.create_model("resnet10t.c3_in1k", num_classes=0).eval()

    def downloaded(model, **kwargs):
        model.load_state_dict(source.state_dict())

    monkeypatch.setattr("timm.models._builder.load_pretrained", downloaded)
    encoder, x = load_encoder("timm:resnet10t.c3_in1k"), torch.randn(1, 3, 64, 64)
    assert torch.allclose(encoder(x), source(x), rtol=1e-4, atol=1e-4)
    about = timm.get_pretrained_cfg("resnet10t.c3_in1k")
    assert (encoder.params.crop_size, encoder.params.mean) == (about.input_size[-1], about.mean)


def test_weights_of_timm_for_other_pixels_are_reported(monkeypatch):
    """Those of Google's ViTs are for pixels from -1 to 1."""
    said = []
    monkeypatch.setattr(encoders, "rank_zero_info", said.append)
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_args, **_options: None)
    train = {"dataset_name": "stl10", "transform_crop_size": 224, "encoder_weights": "DEFAULT"}
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for arch, constants, is_said in (
        ("vit_tiny_patch16_224", {}, 1),
        ("vit_tiny_patch16_224", half, 0),
        ("resnet10t", {}, 0),
    ):
        said.clear()
        encoders.get_encoder(ModelParams(encoder_arch=f"timm:{arch}", **train, **constants))
        assert len(said) == is_said and all("are for image_mean=[0.5, 0.5, 0.5]" in line for line in said)


def offline(*args, **kwargs):
    raise urllib.error.URLError("no route to host")


def test_without_a_connection(monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(OSError, match="resnet18 could not be downloaded .*no route.*Get the file elsewhere"):
        load_encoder("resnet18")


# ---- who uses it ----


def test_the_linear_stage_accepts_any_file(tmp_path):
    torch.save(moco()[0], tmp_path / "moco.pth")
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "moco.pth", dataset_name="stl10", lr=0.5)
    assert torch.equal(linear.model.layer4[1].conv2.weight, network().layer4[1].conv2.weight)
    p = linear.params
    assert (p.crop_size, p.mean, p.dataset_name, p.lr) == (224, (0.485, 0.456, 0.406), "stl10", 0.5)
    assert linear.classifier.out_features == 10 and linear.view.crop_size == 224


def test_transfer_keeps_size_and_constants_of_the_pretraining(tmp_path):
    model = SelfSupervisedMethod(dataset_name="cifar10", encoder_arch="resnet18", K=8, num_data_workers=3)
    save(model, tmp_path / "ours.ckpt")
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "ours.ckpt", dataset_name="stl10")
    assert linear.params.mean == model.params.mean and linear.params.std == model.params.std
    assert linear.params.crop_size == 32 and linear.model.conv1.kernel_size == (3, 3)
    assert linear.params.num_data_workers == 3 and linear.hparams.dataset_name == "stl10"
    with pytest.raises(ValueError, match="dataset_name='nowhere' is unknown"):
        load_encoder(tmp_path / "ours.ckpt", dataset_name="nowhere")


def test_pretraining_starts_from_any_file(small, tmp_path):
    torch.save(lightly()[0], tmp_path / "lightly.ckpt")
    start = small(encoder_arch="resnet18", encoder_weights="lightly.ckpt", in_channels=3, low_resolution_stem=False)
    model = SelfSupervisedMethod(start)
    for key, value in own().items():
        assert torch.equal(model.model.state_dict()[key], value), key
    with pytest.raises(ValueError, match="encoder_weights='lightly.ckpt' .*missing: layer1.2"):
        SelfSupervisedMethod(small(encoder_arch="resnet34", encoder_weights="lightly.ckpt"))


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
@pytest.mark.parametrize("arch", ["resnet18", "squeezenet1_1", "timm:vit_tiny_patch16_224"])
def test_a_file_for_three_channels_is_adapted_to_others(arch, channels, tmp_path, caplog):
    fields = {"encoder_arch": arch, "dataset_name": "folder", "transform_crop_size": 224 if "vit" in arch else 64}
    source, _ = encoders.get_encoder(ModelParams(**fields))
    torch.save(source.state_dict(), tmp_path / "rgb.pth")
    constants = {"in_channels": channels, "image_mean": [0.5] * channels, "image_std": [0.2] * channels}
    p = ModelParams(**fields, **constants, encoder_weights=str(tmp_path / "rgb.pth"))
    found = encoders.get_encoder(p)[0]
    assert f"rgb.pth: the first layer, of 3 channels, is adapted to in_channels={channels}" in caplog.text
    path, first = builders.first_convolution(source)
    adapted = timm.models.adapt_input_conv(channels, first.weight.detach())
    wanted = {**source.state_dict(), f"{path}.weight": adapted}
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.state_dict().items())
    assert torch.equal(baselines.starting_encoder(p, p.encoder_weights).model.get_submodule(path).weight, adapted)


def test_a_gray_image_has_the_embedding_of_its_three_copies(tmp_path):
    torch.save(own(), tmp_path / "rgb.pth")
    constants = ({"image_mean": [0.4] * n, "image_std": [0.2] * n, "transform_crop_size": 64} for n in (1, 3))
    gray, rgb = (load_encoder(tmp_path / "rgb.pth", in_channels=len(c["image_mean"]), **c) for c in constants)
    images = torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8)
    assert torch.allclose(gray.embed(images), rgb.embed(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("in_file", "channels", "stem"), [(4, 1, None), (1, 3, None), (4, 6, None), (3, 1, "cifar")])
def test_other_first_layers_are_not_adapted(in_file, channels, stem, tmp_path):
    weight = torch.randn(64, in_file, *own(stem=stem)["conv1.weight"].shape[2:])
    torch.save({**own(stem=stem), "conv1.weight": weight}, tmp_path / "start.pth")
    constants = {"in_channels": channels, "image_mean": [0.5] * channels, "image_std": [0.2] * channels}
    p = ModelParams(
        dataset_name="folder", encoder_arch="resnet18", encoder_weights=str(tmp_path / "start.pth"), **constants
    )
    with pytest.raises(
        ValueError, match=rf"another shape: conv1.weight \(64, {in_file}, .* of \(64, {channels}, 7, 7\)"
    ):
        encoders.get_encoder(p)


# ---- encoders of clips ----


@pytest.mark.slow
def test_clips_from_a_file_and_published(tmp_path, monkeypatch):
    torch.manual_seed(0)
    source = torchvision.models.get_model("r3d_18").eval()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    path = tmp_path / "hub/checkpoints" / torchvision.models.video.R3D_18_Weights.DEFAULT.url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(source.state_dict(), path)
    source.fc, x = nn.Identity(), torch.randint(256, (1, 3, 8, 112, 112), dtype=torch.uint8)
    named, found = load_encoder("r3d_18"), load_encoder(path, transform_crop_size=112)
    assert named.params.mean == (0.43216, 0.394666, 0.37645) and named.params.input_shape == (3, 8, 112, 112)
    assert found.params.encoder_arch == "r3d_18" and found.params.dataset_name == "kinetics"
    assert torch.allclose(named.embed(x), source(named.prepare(x)), rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.embed(x), source(found.prepare(x)), rtol=1e-4, atol=1e-4)
    several = torch.stack([x, x.flip(2)], 1)  # [N, K, C, T, H, W]: the mean over the clips of a video
    expected = (source(named.prepare(x)) + source(named.prepare(x.flip(2)))) / 2
    assert torch.allclose(named.embed(several), expected, rtol=1e-4, atol=1e-4)


def test_the_directory_of_a_run_is_accepted_as_encoder_weights(tmp_path):
    """Its pretrained.ckpt is read, and named as the start."""
    small = {"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "dim": 8, "mlp_hidden_dim": 8, "K": 64}
    first = SelfSupervisedMethod(**small, seed=1)
    run = tmp_path / "run"
    run.mkdir()
    save(first, run / "pretrained.ckpt")
    second = SelfSupervisedMethod(**small, seed=2, encoder_weights=str(run))
    for name, tensor in first.model.state_dict().items():
        torch.testing.assert_close(second.model.state_dict()[name], tensor)
    (run / "pretrained.ckpt").rename(run / "other.ckpt")
    (run / "config.yaml").write_text("preset: simclr\n")
    with pytest.raises(FileNotFoundError, match="no pretrained.ckpt yet"):
        SelfSupervisedMethod(**small, encoder_weights=str(run))


@pytest.mark.parametrize(("dataset_name", "size", "low"), [("stl10", 32, False), ("cifar10", 96, True)])
def test_another_size_of_the_images_is_not_another_stem(dataset_name, size, low):
    settings = {"dataset_name": dataset_name, "encoder_arch": "resnet18"}
    found = frozen_encoder.with_overrides(settings, {"transform_crop_size": size})
    assert found.crop_size == size and found.low_resolution_stem is low


def test_an_encoder_without_weights_embeds():
    report = frozen_encoder.Report("pixels", "published", "flatten", 0, ())
    pixels = frozen_encoder.Encoder(nn.Flatten(), ModelParams(dataset_name="digits"), report)
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    assert torch.equal(pixels.embed(images), pixels.prepare(images).flatten(1))
    for not_a_tensor in (images.numpy(), list(images)):
        with pytest.raises(ValueError, match=r": not a tensor. Pass torch.as_tensor\(images\), or torch.stack"):
            pixels.embed(not_a_tensor)
