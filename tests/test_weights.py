"""A file of every system, made of real networks under its key names, gives that system's own network."""

import argparse
import copy
from functools import cache

import pytest
import timm
import torch
import torchvision
from lightly.models import ResNetGenerator
from torch import Tensor, nn

from weights import load_encoder


@cache
def network(name: str = "resnet18", seed: int = 0, stem: str | None = None) -> nn.Module:
    """A network without its classifier. stem="cifar": that of the original and of solo-learn."""
    torch.manual_seed(seed)
    model = torchvision.models.get_model(name)
    if hasattr(model, "fc"):
        model.fc = nn.Identity()
    if stem == "cifar":
        model.conv1, model.maxpool = nn.Conv2d(3, 64, 3, 1, padding=2, bias=False), nn.Identity()
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    """Other statistics in every batch norm than the initial ones."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(0, 0.1), layer.running_var.uniform_(0.5, 2), layer.num_batches_tracked.fill_(7)
    return model.eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def twin(name: str = "resnet18", **kwargs) -> dict[str, Tensor]:
    """The momentum copy: the same names with other values, which must not be taken."""
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


def exclude_bias_and_norm(p):
    return p.ndim == 1


exclude_bias_and_norm.__module__ = "__main__"


def vicreg():
    state = {**under("backbone.", own()), **under("projector.", MLP)}
    groups = [{"lr": 0, "weight_decay_filter": exclude_bias_and_norm}]
    return {"epoch": 3, "model": under("module.", state), "optimizer": {"param_groups": groups}}, network(), 64


def lightly():
    """backbone = nn.Sequential(*list(resnet.children())[:-1]), as in its examples."""
    sequential = nn.Sequential(*list(network().children())[:-1])
    other = nn.Sequential(*list(network(seed=1).children())[:-1])
    state = {**under("backbone.", sequential.state_dict()), **under("projection_head.layers.", MLP)}
    state |= {**under("backbone_momentum.", other.state_dict()), **under("projection_head_momentum.layers.", MLP)}
    content = {"epoch": 9, "pytorch-lightning_version": "2.6.0", "state_dict": state, "hyper_parameters": {}}
    return content, nn.Sequential(sequential, nn.Flatten()), 64


def lightlys_own_resnet():
    """Numbered, it has no ReLU after the stem: F.relu is no child."""
    children = list(shaken(ResNetGenerator("resnet-18")).children())[:-1]
    backbone = nn.Sequential(*children, nn.AdaptiveAvgPool2d(1)).eval()
    state = {**under("backbone.", backbone.state_dict()), **under("projection_head.layers.", MLP)}
    return {"state_dict": state}, nn.Sequential(backbone, nn.Flatten()), 32


def lightlys_own_resnet_unnumbered():
    resnet = shaken(ResNetGenerator("resnet-18"))
    state = {**under("backbone.", resnet.state_dict()), **under("projection_head.layers.", MLP)}
    resnet = copy.deepcopy(resnet)
    resnet.linear = nn.Identity()
    return {"state_dict": state}, resnet, 32


def lightly_backbone():
    """As its tutorials save it."""
    sequential = nn.Sequential(*list(network().children())[:-1])
    return {"resnet18_parameters": sequential.state_dict()}, nn.Sequential(sequential, nn.Flatten()), 64


def solo_learn():
    state = {**under("backbone.", own(stem="cifar")), **under("momentum_backbone.", twin(stem="cifar")), **QUEUE}
    state |= {"classifier.weight": torch.randn(10, 512), "classifier.bias": torch.randn(10), **under("projector.", MLP)}
    return {"epoch": 9, "state_dict": state, "loops": {}}, network(stem="cifar"), 32


def solo_learn_first_versions():
    state = {**under("encoder.", own()), **under("momentum_encoder.", twin()), **under("projector.", MLP)}
    return {"state_dict": {**state, "classifier.weight": torch.randn(10, 512)}}, network(), 64


def openselfsup():
    """It keeps the trained backbone twice."""
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
    return {**own("vit_b_32"), **under("heads.head.", {"weight": torch.randn(9, 768)})}, headless_vit(), 224


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
    "moco": (moco, "moco", "encoder_k. (124), queue, queue_ptr"),
    "moco v3": (moco_v3, "moco v3", "predictor. (9), momentum_encoder. (131)"),
    "barlowtwins, resnet50.pth": (barlowtwins_backbone, "names of torchvision or timm", ""),
    "barlowtwins": (barlowtwins, "barlowtwins", "projector. (9), bn. (1)"),
    "vicreg": (vicreg, "vicreg", "projector. (9)"),
    "lightly": (lightly, "lightly", "backbone_momentum. (120)"),
    "lightly's own resnet": (lightlys_own_resnet, "lightly", "projection_head. (9)"),
    "lightly's own resnet, unnumbered": (
        lightlys_own_resnet_unnumbered,
        "lightly",
        "linear. (2), projection_head. (9)",
    ),
    "lightly, backbone": (lightly_backbone, "names without a system", ""),
    "solo-learn on CIFAR": (solo_learn, "solo-learn", "momentum_backbone. (120)"),
    "solo-learn, first versions": (solo_learn_first_versions, "solo-learn", "momentum_encoder. (120)"),
    "OpenSelfSup": (openselfsup, "OpenSelfSup or mmselfsup", "encoder_q. (129), encoder_k. (129)"),
    "mmselfsup": (mmselfsup, "OpenSelfSup or mmselfsup", "neck. (9), target_net. (120)"),
    "mmselfsup, extracted": (mmselfsup_extracted, "names of torchvision or timm", ""),
    "dino": (dino, "dino", "head. (9)"),
    "torchvision": (torchvision_classifier, "names of torchvision or timm", "heads. (1)"),
    "torchvision's training": (torchvision_training, "names of torchvision or timm", "fc. (2)"),
    "timm's training": (timm_training, "names of torchvision or timm", "head. (2)"),
    "timm": (timm_state_dict, "names of torchvision or timm", "head. (2)"),
    "compiled and wrapped": (compiled_and_wrapped, "names of torchvision or timm", ""),
    "unknown system": (of_an_unknown_system, "encoder under net.", "temperature"),
    "exported": (ours_exported, "self_supervised, exported", ""),
    "the original on CIFAR-10": (the_original_on_cifar10, "self_supervised, the original", "lagging_model. (120)"),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_of_every_system_gives_that_systems_network(system, tmp_path):
    make, layout, left_out = SYSTEMS[system]
    content, source, size = make()
    torch.save(content, tmp_path / "weights.pth")
    encoder = load_encoder(tmp_path / "weights.pth")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = source(x)
        found = encoder(x)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    report = encoder.report
    assert report.layout == layout and report.matched == len(encoder.model.state_dict())
    assert left_out in str(report) and f"all {report.matched} tensors" in str(report)
    assert encoder.params.crop_size == (size if size != 64 or system == "exported" else 224)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
