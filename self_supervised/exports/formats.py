"""Export formats: the content of each file, how it is written, and the code that reads it.

Every file contains three notes. "self_supervised" has settings of the encoder, and "preprocessing" how an image becomes
its input (JSON; dicts in pickled files). "load" is Python code that reads the file at `path` and turns `images`
[N, C, H, W] into `embeddings` [N, E]. The ONNX file of a classifier also has the note "class_names" (JSON), and the
code computes `probabilities` [N, classes], too.
"""

import io
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from attrs import frozen
from torch import Tensor, nn

from self_supervised.exports import conversions
from self_supervised.exports.conversions import Converted
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.safe_files import to_json

ONNX_OPSET = 18
ONNX_LARGEST = 2**31  # bytes per file, the limit of protocol buffers


# ---- code that reads a file ----

READ_TORCH = 'state = torch.load(path, weights_only=True)["state_dict"]'
READ_SAFETENSORS = """
import safetensors.torch

state = safetensors.torch.load_file(path)
""".strip()
READ_PICKLE = r"""
import pickle
import re

with open(path, "rb") as file:
    arrays = pickle.load(file)["model"]
state = {}
for key, array in arrays.items():  # detectron2's names -> torchvision's
    key = key.removeprefix("stem.").replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
    key = re.sub(r"^res(\d)", lambda stage: f"layer{int(stage[1]) - 1}", key)
    state[re.sub(r"conv(\d)\.norm", r"bn\1", key)] = torch.as_tensor(array)
""".strip()
RUN_TORCHSCRIPT = """
import torch

model = torch.jit.load(path)
with torch.no_grad():
    embeddings = model(torch.as_tensor(images))
""".strip()
RUN_TORCH_EXPORT = RUN_TORCHSCRIPT.replace("torch.jit.load(path)", "torch.export.load(path).module()")
RUN_ONNX = """
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(path)
(embeddings,) = session.run(["embeddings"], {"images": np.asarray(images)})
""".strip()
RUN_CLASSIFIER = RUN_ONNX.replace("(embeddings,)", "embeddings, probabilities").replace(
    '["embeddings"]', '["embeddings", "probabilities"]'
)


# ---- content of programs ----


class Normalized(nn.Module):
    """Encoder that normalizes its input, images with values from 0 to 1."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


class Classifying(nn.Module):
    """Encoder with a classifier on its embeddings."""

    def __init__(self, model: nn.Module, head: nn.Module):
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.model(images)
        return embeddings, self.head(embeddings).softmax(1)


def program(encoder: Encoder) -> Converted:
    return Converted(conversions.plain_model(encoder).eval(), encoder.params.encoder_arch, use="")


# ---- writers ----


def as_json(notes: dict[str, Any]) -> dict[str, str]:
    return {name: note if isinstance(note, str) else to_json(note) for name, note in notes.items()}


def write_torch(state: dict[str, Tensor], path: Path, notes: dict[str, Any], images: Tensor) -> None:
    with path.open("wb") as file:  # on a full disk, Python raises an error; PyTorch's own writer aborts the process
        torch.save({"state_dict": state, **notes}, file)


def write_safetensors(state: dict[str, Tensor], path: Path, notes: dict[str, Any], images: Tensor) -> None:
    from safetensors.torch import save

    path.write_bytes(save(state, metadata={"format": "pt", **as_json(notes)}))  # save_file sets owner-only permissions


def write_pickle(state: dict[str, Tensor], path: Path, notes: dict[str, Any], images: Tensor) -> None:
    """Write a file like those of detectron2's model zoo; `matching_heuristics` makes detectron2 look for the backbone
    inside a detector."""
    arrays = {key: value.numpy() for key, value in state.items()}
    content = {"model": arrays, "__author__": "self_supervised", "matching_heuristics": True, **notes}
    with path.open("wb") as file:
        pickle.dump(content, file)


def write_torchscript(model: nn.Module, path: Path, notes: dict[str, Any], images: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.*is deprecated", FutureWarning)
        # torchvision and timm assert shapes, which the trace takes as constants: they are, for images of this size
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
        content = io.BytesIO()  # as in write_torch
        torch.jit.save(torch.jit.trace(model, images), content, _extra_files=as_json(notes))
    path.write_bytes(content.getbuffer())


def write_torch_export(model: nn.Module, path: Path, notes: dict[str, Any], images: Tensor) -> None:
    exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    content = io.BytesIO()  # as in write_torch
    torch.export.save(exported, content, extra_files=as_json(notes))
    path.write_bytes(content.getbuffer())


def write_onnx(model: nn.Module, path: Path, notes: dict[str, Any], images: Tensor) -> None:
    size = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    if size >= ONNX_LARGEST:
        raise ValueError(
            f"format='onnx': the encoder has {size / 2**30:.1f} GiB, but an ONNX file holds at most 2 GiB. Choose "
            "torch_export."
        )
    exported = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        opset_version=ONNX_OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["embeddings", "probabilities"][: 1 + isinstance(model, Classifying)],
        verbose=False,
    )
    exported.model.metadata_props.update(as_json(notes))
    exported.save(path, external_data=False)


# ---- the table of formats ----


@frozen
class Format:
    """A row of FORMATS."""

    extension: str
    convert: Callable[[Encoder], Converted]
    write: Callable[[Any, Path, dict[str, Any], Tensor], None]  # content, file, notes, images to trace with
    read: str  # Python code that reads `path`; it stands between `code` and `use` of the converted encoder
    needs: tuple[str, ...] = ()  # packages that are not in requirements.txt

    @property
    def is_program(self) -> bool:
        return self.convert is program


FORMATS = {
    "torchvision": Format(".pt", conversions.in_torchvision, write_torch, READ_TORCH),
    "timm": Format(".pt", conversions.in_timm, write_torch, READ_TORCH, ("timm",)),
    "safetensors": Format(
        ".safetensors",
        conversions.in_its_library,
        write_safetensors,
        READ_SAFETENSORS,
        ("safetensors",),
    ),
    "detectron2": Format(".pkl", conversions.in_detectron2, write_pickle, READ_PICKLE),
    "torchscript": Format(".pt", program, write_torchscript, RUN_TORCHSCRIPT),
    "onnx": Format(".onnx", program, write_onnx, RUN_ONNX, ("onnx", "onnxscript", "onnxruntime")),
    "torch_export": Format(".pt2", program, write_torch_export, RUN_TORCH_EXPORT),
}
