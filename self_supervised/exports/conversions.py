"""Conversions of an encoder to other libraries: its tensors under their names, and the code that builds it there.

The code is stored in every exported file, and a new process runs it to verify the file.
"""

import copy
import inspect
import re
from typing import Any

import torch
import torchvision
from attrs import evolve, frozen
from torch import nn

import ws_resnet
from self_supervised.catalogue import INCEPTIONS, OWN_MODULE, SMALL_CNNS
from self_supervised.convolutions import PointConv2d
from self_supervised.networks.frozen_encoder import Encoder

PROGRAMS = "a program (torchscript, onnx, torch_export)"

TIMM_VITS = {
    "vit_b_16": "vit_base_patch16_224",
    "vit_b_32": "vit_base_patch32_224",
    "vit_l_16": "vit_large_patch16_224",
    "vit_l_32": "vit_large_patch32_224",
    "vit_h_14": "vit_huge_patch14_224",
}
TIMM_VIT_KEYS = {  # pattern in torchvision's names -> timm's name; applied in this order
    "class_token": "cls_token",
    "conv_proj": "patch_embed.proj",
    "encoder.pos_embedding": "pos_embed",
    "encoder.layers.encoder_layer_": "blocks.",
    "encoder.ln.": "norm.",
    "ln_1": "norm1",
    "ln_2": "norm2",
    "self_attention.in_proj_": "attn.qkv.",
    "self_attention.out_proj": "attn.proj",
    "mlp.0": "mlp.fc1",
    "mlp.3": "mlp.fc2",
}
DETECTRON2_KEYS = {  # pattern in torchvision's names -> detectron2's name; applied in this order
    r"^(?=conv|bn)": "stem.",
    r"^layer1": "res2",
    r"^layer2": "res3",
    r"^layer3": "res4",
    r"^layer4": "res5",
    r"\bbn(\d)": r"conv\1.norm",
    r"\bdownsample\.0": "shortcut",
    r"\bdownsample\.1": "shortcut.norm",
}


USE_STATE = """
model.load_state_dict(state)
model.eval()
with torch.no_grad():
    embeddings = model(torch.as_tensor(images))
""".strip()
STANDARDIZE = f"""
from torch import Tensor


{inspect.getsource(ws_resnet.standardized_weight)}

state = {{key: standardized_weight(x) if x.dim() == 4 and key not in plain else x for key, x in state.items()}}
""".strip()


@frozen
class Converted:
    """Content of a file, and the code that computes embeddings with it."""

    content: Any  # a state dict, or a module
    arch: str  # encoder_arch of the content
    code: str = ""  # Python code that builds `model`
    use: str = USE_STATE  # Python code that computes `embeddings` once the file is read


# ---- conversions ----


def plain_model(encoder: Encoder) -> nn.Module:
    """Return a copy that has only torch's own layers and gives the same embeddings.

    The standardized weights of a `ws_resnet` are stored in the copy, which is thus torchvision's ResNet with group
    norm. It must not be loaded as a `ws_resnet` again: standardizing twice changes the weights slightly, because 1e-5
    is added to the standard deviation.
    """
    model = copy.deepcopy(encoder.model)
    for layer in model.modules():
        if isinstance(layer, ws_resnet.Conv2d):
            layer.weight.data = ws_resnet.standardized_weight(layer.weight)
        if isinstance(layer, PointConv2d):
            layer.__class__ = nn.Conv2d
    return model.to(memory_format=torch.contiguous_format)


def in_torchvision(encoder: Encoder) -> Converted:
    """Return the encoder as a model of torchvision.

    Raises:
        ValueError: torchvision does not have this encoder.
    """
    p = encoder.params
    if p.encoder_arch.startswith("timm:") or p.encoder_arch in (OWN_MODULE, *SMALL_CNNS):
        rest = f"timm, safetensors or {PROGRAMS}" if p.encoder_arch.startswith("timm:") else PROGRAMS
        raise ValueError(f"encoder_arch={p.encoder_arch!r} is not a model of torchvision. Choose {rest}.")
    options: dict[str, Any] = {}
    if p.encoder_arch.startswith("vit_"):
        options["image_size"] = p.crop_size
    if p.encoder_arch in INCEPTIONS:
        options |= {"aux_logits": False, "init_weights": False}
    call = f"torchvision.models.{p.encoder_arch.removeprefix('ws_')}"
    model = plain_model(encoder)
    code = building_code("torchvision", call, [], {**options, **normalization(p.encoder_arch)}, model)
    return Converted(model.state_dict(), p.encoder_arch.removeprefix("ws_"), code)


def in_timm(encoder: Encoder) -> Converted:
    """Return the encoder as a model of timm.

    Raises:
        ValueError: timm has no model with the same tensors.
    """
    import timm  # optional, and slow to import

    p = encoder.params
    model = plain_model(encoder)
    arch = p.encoder_arch.removeprefix("ws_")
    state = model.state_dict()
    name = TIMM_VITS.get(arch, arch.removeprefix("timm:"))
    channels = {} if p.channels == 3 else {"in_chans": p.channels}
    options = {"num_classes": 0, **channels, **getattr(model, "built_for", {}), **normalization(p.encoder_arch)}
    if arch in TIMM_VITS:
        options["img_size"] = p.crop_size
        arch = f"timm:{name}"
        state = {renamed(key, TIMM_VIT_KEYS): value for key, value in state.items()}
    refusal = ValueError(
        f"encoder_arch={p.encoder_arch!r}: timm has no model with the same tensors. Choose another format."
    )
    if p.pooling_size > 1:
        raise ValueError(f"pooling_size={p.pooling_size}: timm's models pool the whole map. Choose another format.")
    if name.split(".")[0] not in timm.list_models():  # without the tag of the weights
        raise refusal
    code = building_code("timm", "timm.create_model", [repr(name)], options, model)
    if shapes(built(code).state_dict()) != shapes(state):
        raise refusal
    return Converted(state, arch, code)


def in_its_library(encoder: Encoder) -> Converted:
    """Return the encoder's own tensors; the code that loads a `ws_resnet` standardizes its weights."""
    arch = encoder.params.encoder_arch
    converted = in_timm(encoder) if arch.startswith("timm:") else in_torchvision(encoder)
    if not normalization(arch):
        return converted
    tensors = {key: value.contiguous() for key, value in encoder.model.state_dict().items()}
    layers = encoder.model.named_modules()
    plain = [f"{name}.weight" for name, layer in layers if type(layer) in (nn.Conv2d, PointConv2d)]  # of other stems
    return evolve(converted, content=tensors, arch=arch, use=f"plain = {plain}\n{STANDARDIZE}\n\n{USE_STATE}")


def in_detectron2(encoder: Encoder) -> Converted:
    """Return a ResNet under detectron2's names; its code begins with `config`, the settings for detectron2.

    Names: https://github.com/facebookresearch/detectron2/blob/main/tools/convert-torchvision-to-d2.py

    Raises:
        ValueError: detectron2 does not have this encoder.
    """
    p = encoder.params
    model = encoder.model
    if not isinstance(model, torchvision.models.ResNet) or p.low_resolution:
        stem = " with the stem for small images" if p.low_resolution else ""
        raise ValueError(
            f"encoder_arch={p.encoder_arch!r}{stem}: detectron2 only has ResNets with a 7 x 7 stem. Choose another "
            "format."
        )
    if p.channels not in (1, 3):
        raise ValueError(
            f"in_channels={p.channels}: detectron2 only reads images of 1 or 3 channels. Choose another format."
        )
    converted = in_torchvision(encoder)
    depth = int(re.search(r"\d+", p.encoder_arch)[0])
    config = {
        "MODEL.PIXEL_MEAN": [round(255 * value, 3) for value in p.mean],
        "MODEL.PIXEL_STD": [round(255 * value, 3) for value in p.std],
        "MODEL.RESNETS.DEPTH": depth,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64 if depth < 50 else 256,
        "MODEL.RESNETS.NUM_GROUPS": model.groups,
        "MODEL.RESNETS.WIDTH_PER_GROUP": model.base_width,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
        "MODEL.RESNETS.NORM": "GN" if normalization(p.encoder_arch) else "FrozenBN",
        "INPUT.FORMAT": "RGB" if p.channels == 3 else "L",
    }
    lines = ["config = [  # cfg.merge_from_list(config), and MODEL.WEIGHTS is this file"]
    lines += [f"    {key!r}, {value!r}," for key, value in config.items()]
    state = {renamed(key, DETECTRON2_KEYS): value for key, value in converted.content.items()}
    return Converted(state, converted.arch, "\n".join([*lines, "]", converted.code]))


# ---- code that builds a model ----


def normalization(arch: str) -> dict[str, str]:
    """Return the argument that gives the plain copy of a `ws_resnet` its group norms; {} for other encoders."""
    if arch not in ws_resnet.WS_RESNETS:
        return {}
    return {"norm_layer": "lambda channels, **options: nn.GroupNorm(32, channels, **options)"}


def renamed(key: str, names: dict[str, str]) -> str:
    for pattern, name in names.items():
        key = re.sub(pattern, name, key)
    return key


def shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def building_code(library: str, call: str, arguments: list[str], options: dict[str, Any], ours: nn.Module) -> str:
    """Return Python code that builds `model` by a call of its library and replaces the layers that differ in ours."""
    arguments = [*arguments, *(f"{name}={value}" for name, value in options.items())]
    code = f"import torch\nimport {library}\nfrom torch import nn\n\nmodel = {call}({', '.join(arguments)})"
    theirs = dict(built(code).named_modules())
    for path, layer in ours.named_modules():
        if (
            type(layer) in (nn.Identity, nn.Conv2d, nn.AdaptiveAvgPool2d)
            and path in theirs
            and repr(layer) != repr(theirs[path])
        ):
            attributes = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in path.split("."))
            code += f"\nmodel{attributes} = nn.{layer!r}"
    return code


def built(code: str) -> nn.Module:
    """Run the code and return its `model`, if possible on the meta device (without memory for its parameters)."""
    names: dict[str, Any] = {}
    try:
        with torch.device("meta"):
            exec(code, names)
    except NotImplementedError:  # the constructors of torchvision's RegNets read values from tensors
        exec(code, names)
    return names["model"]
