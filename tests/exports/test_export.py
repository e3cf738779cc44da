"""Exported files, loaded as in docs/export.md; tensor names of timm, torchvision and detectron2; refusals."""

import hashlib
import json
import os
import pickle
import re
import shutil
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import onnx
import onnxruntime
import processes
import pytest
import torch
import torchvision
from conftest import save_checkpoint
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import nn

from moco import SelfSupervisedMethod
from model_params import BYOLParams, EncoderAndDataParams
from self_supervised import safe_files
from self_supervised.embeddings.embed import embed
from self_supervised.embeddings.parquet import facts_of_file, read_embeddings
from self_supervised.exports import conversions, count, export, formats, fresh, verify
from self_supervised.networks.encoders import get_encoder
from self_supervised.networks.frozen_encoder import Encoder, Report
from self_supervised.networks.pretrained import load_encoder

DOCS = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
SCRIPT = re.search(r"^## From an image file to .*?```python\n(.*?)```", DOCS, re.MULTILINE | re.DOTALL)[1]
BLOCKS = dict(re.findall(r"^## (\w+)\n\n```python\n(.*?)```", DOCS, re.MULTILINE | re.DOTALL))

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")

SMALL = {"seed": 0, "dim": 16, "mlp_hidden_dim": 32}


def as_if_trained(module):
    """Randomize the norms: in a new network they are all equal, so that exchanging two would not be noticed."""
    generator = torch.Generator().manual_seed(0)
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            if parameter.dim() == 1:
                parameter.data.uniform_(0.5, 1.5, generator=generator)
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_(generator=generator)
            layer.running_var.uniform_(0.5, 1.5, generator=generator)
    return module


def new_checkpoint(folder, name, arch, size):
    params = BYOLParams(encoder_arch=arch, transform_crop_size=size, dataset_name="cifar10", **SMALL)
    return save_checkpoint(as_if_trained(SelfSupervisedMethod(params)), folder / name)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A ResNet-18 for 64 pixels, with the usual stem."""
    return new_checkpoint(tmp_path_factory.mktemp("export"), "encoder.ckpt", "resnet18", 64)


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory):
    return new_checkpoint(tmp_path_factory.mktemp("export"), "small.ckpt", "shufflenet_v2_x0_5", 32)


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    """exported("onnx") returns the file, alone in its directory; it is exported once."""
    return cache(lambda format: export.export(checkpoint, format, tmp_path_factory.mktemp(format)))


@pytest.fixture(scope="module")
def encoder():
    """encoder("resnet18", 32) returns an encoder that is built once; it is frozen, so tests may share it."""

    @cache
    def build(arch, size, channels=3, **more):
        own = {"in_channels": channels, "image_mean": [0.4] * channels, "image_std": [0.2] * channels}
        params = EncoderAndDataParams(
            **{"encoder_arch": arch, "transform_crop_size": size, "dataset_name": "cifar10", **more},
            **(own if channels != 3 else {}),
        )
        return Encoder(as_if_trained(get_encoder(params)[0]), params, Report("", "self_supervised", "", 0, ()))

    return build


@pytest.fixture
def same_process(monkeypatch):
    """Verify files in this process instead of a new one, to save time in tests that do not test the verification."""

    def run(command, cwd, **_):
        monkeypatch.chdir(cwd)
        fresh.main(*command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


def close(found, expected):
    found, expected = torch.as_tensor(found), torch.as_tensor(expected)
    return found.shape == expected.shape and (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def current_umask():
    os.umask(mask := os.umask(0))
    return mask


# ---- all formats ----


@pytest.mark.slow
@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_manual_loads_the_file(format, checkpoint, exported, monkeypatch):
    path = exported(format)
    monkeypatch.chdir(path.parent)
    assert list(path.parent.iterdir()) == [path]  # one file and nothing else
    assert path.stat().st_mode & 0o777 == 0o666 & ~current_umask()
    images = torch.randn(3, 3, 64, 64)
    names = {"images": images}
    with torch.no_grad():
        exec(BLOCKS[format], names)
        expected = load_encoder(checkpoint)(images)
    if format == "detectron2":
        assert np.array_equal(names["stem"], load_encoder(checkpoint).model.conv1.weight)
    else:
        assert close(names["embeddings"], expected)
    assert names["facts"] == {
        "encoder_arch": "resnet18",
        "embedding_dim": 512,
        "in_channels": 3,
        "low_resolution_stem": False,
        "stem_variant": "standard",
        "pooling_size": 1,
        "dataset_name": "cifar10",
        "transform_crop_size": 64,
        "image_mean": list(load_encoder(checkpoint).params.mean),
        "image_std": list(load_encoder(checkpoint).params.std),
        "pixel_range": None,
        "exif_orientation": True,
    }
    assert names["record"] == {
        **{"exif_orientation": True, "central_crop": 1, "size": 64, "interpolation": "bilinear", "antialias": True},
        **{"channels": 3, "channel_order": "RGB", "value_range": [0, 1], "pixel_range": None},
        **{"mean": names["facts"]["image_mean"], "std": names["facts"]["image_std"]},
    }


@pytest.mark.slow
def test_the_manual_shares_an_encoder_on_the_hub(checkpoint, exported, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(exported("timm"), "encoder.timm.pt")
    block = re.search(r"^### On the hub .*?```python\n(.*?)```", DOCS, re.MULTILINE | re.DOTALL)[1]
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(80, 100, 3), dtype=np.uint8))
    names = {"images": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        exec(BLOCKS["timm"] + block, names)
        assert torch.equal(names["again"](names["images"]), names["embeddings"])
        tensor = names["transform"](image)
    mean, std = (torch.tensor(names["record"][name]).reshape(3, 1, 1) for name in ("mean", "std"))
    square = np.array(image.crop((10, 0, 90, 80)).resize((64, 64), Image.Resampling.BILINEAR))
    expected = (torch.from_numpy(square).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(tensor[..., 1:-1], expected[..., 1:-1])  # timm resizes before it crops


def test_the_manual_names_every_format_and_the_opset():
    assert BLOCKS.keys() == formats.FORMATS.keys()
    assert all(f"`{name}` |" in DOCS for name in formats.FORMATS)
    assert f"opset {formats.ONNX_OPSET}" in DOCS


def test_onnx_is_one_valid_file_with_any_batch(checkpoint, exported):
    model = onnx.load(exported("onnx"), load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert {(row.domain, row.version) for row in model.opset_import} == {("", formats.ONNX_OPSET)}
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    session = onnxruntime.InferenceSession(exported("onnx"))
    for n in (1, 2, 5):
        images = torch.randn(n, 3, 64, 64)
        with torch.no_grad():
            expected = load_encoder(checkpoint)(images)
        assert close(session.run(None, {"images": images.numpy()})[0], expected)


@pytest.mark.slow
def test_normalize_is_part_of_the_program(small_checkpoint, same_process, tmp_path):
    path = export.export(small_checkpoint, "torchscript", tmp_path, normalize=True)
    notes = {"self_supervised": "", "preprocessing": ""}
    model = torch.jit.load(path, _extra_files=notes)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert close(model(images / 255), load_encoder(small_checkpoint).embed(images))
    facts = json.loads(notes["self_supervised"])
    assert facts["image_mean"] == [0, 0, 0] and facts["image_std"] == [1, 1, 1]  # the program normalizes
    record = json.loads(notes["preprocessing"])
    assert record["size"] == 32 and not {"mean", "std"} & record.keys()


@pytest.fixture
def image_files(tmp_path):
    """A directory of JPEG and PNG files of several sizes and modes."""
    photo = Image.fromarray(load_sample_image("china.jpg"))
    folder = tmp_path / "photos"
    folder.mkdir()
    photo.save(folder / "large.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.crop((100, 50, 433, 427)).save(folder / "high.jpeg", quality=60, exif=exif)
    photo.crop((200, 100, 331, 163)).save(folder / "wide.png")
    photo.crop((300, 200, 323, 229)).save(folder / "tiny.png")
    photo.crop((0, 0, 200, 300)).convert("L").save(folder / "gray.jpg")
    photo.crop((0, 100, 301, 300)).convert("RGBA").save(folder / "transparent.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "channels", "normalize"),
    [("imagenet", 3, False), ("imagenet", 3, True), ("imagenet", 1, False), ("cifar10", 3, False)],
)
def test_the_script_of_the_manual_embeds_image_files_as_embed_does(
    dataset, channels, normalize, image_files, same_process, tmp_path, monkeypatch, capsys
):
    """More closely than a cosine of 0.9995, which a missing central crop or antialiasing does not reach."""
    own = nn.Sequential(nn.Conv2d(channels, 16, 5, 2), nn.Tanh(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
    settings = {"dataset_name": dataset, "in_channels": channels, "transform_crop_size": 40, **SMALL}
    if channels == 1:
        settings |= {"image_mean": [0.4], "image_std": [0.2]}
    path = save_checkpoint(SelfSupervisedMethod(BYOLParams(**settings), encoder=own), tmp_path / "encoder.ckpt")
    file = export.export(path, "onnx", encoder=own, normalize=normalize)
    out = embed(load_encoder(path, encoder=own), image_files, tmp_path / "features.parquet", device="cpu")
    paths, expected, _ = read_embeddings(out)
    monkeypatch.chdir(file.parent)
    capsys.readouterr()
    rows = run_script(SCRIPT, [image_files / name for name in paths], monkeypatch, capsys)
    assert [row["file"] for row in rows] == [str(image_files / name) for name in paths] and len(rows) == 6
    assert all(cosine(row["embedding"], one) >= 0.9995 for row, one in zip(rows, expected, strict=True))
    assert close([row["embedding"] for row in rows], expected.copy())
    record = json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map["preprocessing"])
    statistics = {name: record.pop(name, None) for name in ("mean", "std")}
    assert (statistics == {"mean": None, "std": None}) == normalize
    assert record.items() <= facts_of_file(out)["preprocessing"].items()
    assert "self_supervised" not in SCRIPT and "torch" not in SCRIPT
    if dataset == "imagenet":  # these images tell the right crop from another
        other = SCRIPT.replace('record["central_crop"]', "1")
        wrong = run_script(other, [image_files / name for name in paths], monkeypatch, capsys)
        assert min(cosine(row["embedding"], one) for row, one in zip(wrong, expected, strict=True)) < 0.9995


def run_script(code, files, monkeypatch, capsys):
    """Run a script of the manual on files, and return the lines that it prints."""
    monkeypatch.setattr(sys, "argv", ["embed_files.py", *map(str, files)])
    exec(code, {})
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def cosine(a, b):
    return np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)


def test_a_custom_encoder_is_exported(same_process, tmp_path):
    own = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    made = SelfSupervisedMethod(dataset_name="digits", encoder=own, dim=16, K=64, mlp_hidden_dim=32)
    path = save_checkpoint(made, tmp_path / "own.ckpt")
    written = export.export(path, "torch_export", encoder=own)
    assert written == tmp_path / "own.torch_export.pt2"
    images = torch.randn(2, 1, 8, 8)
    assert close(torch.export.load(written).module()(images), own(images).detach())
    for name in ("torchvision", "timm", "safetensors", "detectron2"):
        with pytest.raises(ValueError, match="encoder_arch='module'"):
            export.export(path, name, encoder=own)


# ---- tensor names of other libraries: strict loading, equal outputs ----


def equal_there(converted, made, images):
    names = {"state": converted.content, "images": images}
    exec(f"{converted.code}\n{converted.use}", names)
    with torch.no_grad():
        return close(names["embeddings"], made(images))


OTHERS = [
    ("resnet18", 32, 3),
    ("resnet50", 64, 5),
    ("ws_resnet18", 64, 3),
    pytest.param("vit_b_32", 64, 3, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    ("arch", "size", "channels"),
    [*OTHERS, *((arch, 64, 3) for arch in ("mobilenet_v3_small", "squeezenet1_1", "regnet_y_400mf"))],
)
def test_torchvision_builds_it(arch, size, channels, encoder):
    made = encoder(arch, size, channels)
    converted = conversions.in_torchvision(made)
    assert "ws_" not in converted.code
    assert equal_there(converted, made, torch.randn(2, channels, size, size))


@pytest.mark.parametrize(
    ("arch", "size", "channels"), [*OTHERS, ("timm:resnet10t", 64, 1), ("timm:vit_tiny_patch16_224", 64, 3)]
)
def test_timm_builds_it(arch, size, channels, encoder):
    made = encoder(arch, size, channels)
    assert equal_there(conversions.in_timm(made), made, torch.randn(2, channels, size, size))


@pytest.mark.parametrize("arch", ["efficientnet_b0", "shufflenet_v2_x0_5"])
def test_what_timm_builds_differently_is_refused(arch, encoder):
    with pytest.raises(ValueError, match=f"encoder_arch='{arch}': timm has no model with the same tensors. Choose"):
        conversions.in_timm(encoder(arch, 64))


def test_cells_of_the_last_map_are_torchvisions_alone(encoder):
    made = encoder("resnet18", 64, pooling_size=2)
    assert equal_there(conversions.in_torchvision(made), made, torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="pooling_size=2: timm's models pool the whole map. Choose another format"):
        conversions.in_timm(made)


def test_encoders_of_clips_are_counted_and_not_exported(encoder, tmp_path):
    of_clips = encoder("r3d_18", 32, dataset_name="kinetics", num_frames=4)
    with pytest.raises(ValueError, match="encoder_arch='r3d_18' encodes clips, which no format holds"):
        export.write_checked(of_clips, "onnx", tmp_path / "x.onnx", False, False)
    assert sum(part.parameters for part in count.count_parts(of_clips)) == 33_166_272  # torchvision's, without fc


def test_torchvision_has_no_timm_models(encoder):
    with pytest.raises(ValueError, match="encoder_arch='timm:resnet10t' is not a model of torchvision. Choose timm"):
        conversions.in_torchvision(encoder("timm:resnet10t", 64))


def test_a_ws_resnet_stays_one_in_safetensors_alone(encoder):
    """Its weights are those that were trained, and the loading code standardizes them."""
    made = encoder("ws_resnet18", 64)
    converted = conversions.in_its_library(made)
    assert (
        converted.arch == "ws_resnet18"
        and conversions.in_torchvision(made).arch == conversions.in_timm(made).arch == "resnet18"
    )
    assert all(torch.equal(value, converted.content[key]) for key, value in made.model.state_dict().items())
    assert equal_there(converted, made, torch.randn(2, 3, 64, 64))
    made = encoder("ws_resnet18", 32, stem_variant="padding_2")  # whose first convolution does not standardize
    assert equal_there(conversions.in_its_library(made), made, torch.randn(2, 3, 32, 32))


# ---- detectron2: a copy of its ResNet with its module names (modeling/backbone/resnet.py) ----


class Convolution(nn.Conv2d):
    """detectron2's Conv2d, which contains its norm."""

    def __init__(self, *args, norm, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.norm = norm(self.out_channels)

    def forward(self, x):
        return self.norm(super().forward(x))


class Basic(nn.Module):
    def __init__(self, c_in, c_out, inner, stride, norm):
        super().__init__()
        self.conv1 = Convolution(c_in, c_out, 3, stride, 1, norm=norm)
        self.conv2 = Convolution(c_out, c_out, 3, 1, 1, norm=norm)
        if c_in != c_out:
            self.shortcut = Convolution(c_in, c_out, 1, stride, norm=norm)

    def forward(self, x):
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return (self.conv2(self.conv1(x).relu()) + shortcut).relu()


class Bottle(Basic):
    def __init__(self, c_in, c_out, inner, stride, norm):
        nn.Module.__init__(self)
        self.conv1 = Convolution(c_in, inner, 1, norm=norm)
        self.conv2 = Convolution(inner, inner, 3, stride, 1, norm=norm)  # STRIDE_IN_1X1 False
        self.conv3 = Convolution(inner, c_out, 1, norm=norm)
        if c_in != c_out:
            self.shortcut = Convolution(c_in, c_out, 1, stride, norm=norm)

    def forward(self, x):
        shortcut = self.shortcut(x) if hasattr(self, "shortcut") else x
        return (self.conv3(self.conv2(self.conv1(x).relu()).relu()) + shortcut).relu()


class Detectron2ResNet(nn.Module):
    def __init__(self, config, norm):
        super().__init__()
        depth, width = config["MODEL.RESNETS.DEPTH"], config["MODEL.RESNETS.RES2_OUT_CHANNELS"]
        blocks = {18: [2, 2, 2, 2], 50: [3, 4, 6, 3]}[depth]
        kind = Basic if depth < 50 else Bottle
        self.stem = nn.Module()
        self.stem.conv1 = Convolution(len(config["MODEL.PIXEL_MEAN"]), 64, 7, 2, 3, norm=norm)
        before = 64
        for stage, n in enumerate(blocks):
            out = width * 2**stage
            layers = [
                kind(before if i == 0 else out, out, 64 * 2**stage, 2 if i == 0 and stage else 1, norm)
                for i in range(n)
            ]
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))
            before = out

    def forward(self, x):
        x = nn.functional.max_pool2d(self.stem.conv1(x).relu(), 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


@pytest.mark.parametrize(("arch", "channels"), [("resnet50", 1), ("ws_resnet18", 3)])
def test_detectron2_finds_every_tensor_under_its_name(arch, channels, encoder):
    made = encoder(arch, 64, channels)
    converted = conversions.in_detectron2(made)
    names = {}
    exec(converted.code, names)
    config = dict(zip(names["config"][::2], names["config"][1::2], strict=True))
    norm = {"GN": lambda n: nn.GroupNorm(32, n), "FrozenBN": nn.BatchNorm2d}[config["MODEL.RESNETS.NORM"]]
    theirs = Detectron2ResNet(config, norm).eval()
    theirs.load_state_dict(converted.content)
    images = torch.randn(2, channels, 64, 64)
    with torch.no_grad():
        assert close(theirs(images), made(images))
    assert config["MODEL.PIXEL_MEAN"] == pytest.approx([255 * m for m in made.params.mean], abs=1e-3)
    assert config["MODEL.RESNETS.STRIDE_IN_1X1"] is False and config["INPUT.FORMAT"] == {1: "L", 3: "RGB"}[channels]


@pytest.mark.slow
def test_detectron2_file_is_like_those_of_its_model_zoo(exported):
    file = pickle.loads(exported("detectron2").read_bytes())
    assert file["matching_heuristics"] is True and file["__author__"] == "self_supervised"
    assert all(type(array) is np.ndarray for array in file["model"].values())


def test_detectron2_is_for_resnets_with_its_stem(encoder):
    with pytest.raises(ValueError, match="encoder_arch='resnet18' with the stem for small images: detectron2"):
        conversions.in_detectron2(encoder("resnet18", 32))
    with pytest.raises(ValueError, match="encoder_arch='shufflenet_v2_x0_5': detectron2 only has"):
        conversions.in_detectron2(encoder("shufflenet_v2_x0_5", 32))
    with pytest.raises(ValueError, match="in_channels=4: detectron2 only reads images of 1 or 3 channels"):
        conversions.in_detectron2(encoder("resnet18", 64, 4))


# ---- files are written atomically, only once, and only if they are right ----


def test_nothing_is_overwritten(checkpoint, tmp_path):
    there = tmp_path / "there.pt"
    there.write_text("precious")
    with pytest.raises(FileExistsError, match="there.pt already exists. .* another --out"):
        export.export(checkpoint, "torchvision", there)
    assert there.read_text() == "precious" and list(tmp_path.iterdir()) == [there]


def broken(write):
    """Return a row of FORMATS with another writer."""
    return attrs.evolve(formats.FORMATS["torchvision"], write=write)


def test_a_file_with_another_weight_does_not_appear(small_checkpoint, same_process, tmp_path, monkeypatch):
    def write(state, path, notes, images):
        state["conv5.0.weight"][0] *= 1.01
        formats.write_torch(state, path, notes, images)

    monkeypatch.setitem(formats.FORMATS, "torchvision", broken(write))
    with pytest.raises(RuntimeError, match=r"different embeddings \(by .* of the largest value\) and was removed"):
        export.export(small_checkpoint, "torchvision", tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_deleted_by_the_next(small_checkpoint, same_process, tmp_path):
    def killed(*_):
        raise KilledError

    class KilledError(BaseException):
        pass

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KilledError):
        patch.setitem(formats.FORMATS, "torchvision", broken(killed))
        patch.setattr(safe_files, "remove", lambda path: None)
        export.export(small_checkpoint, "torchvision", tmp_path)
    (left,) = tmp_path.iterdir()
    left.rename(left.with_name(left.name.replace(f".{os.getpid()}.", f".{2**22 + 1}.")))  # no process has this number
    path = export.export(small_checkpoint, "torchvision", tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_fails_leaves_nothing(small_checkpoint, tmp_path, monkeypatch):
    def write(state, path, notes, images):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setitem(formats.FORMATS, "torchvision", broken(write))
    with pytest.raises(OSError, match="disk full"):
        export.export(small_checkpoint, "torchvision", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["torchvision", "safetensors", "detectron2", "torchscript", "torch_export"])
def test_a_full_disk_is_named_and_leaves_nothing(format, checkpoint, same_process, tmp_path):
    encoder = load_encoder(checkpoint)
    with processes.full_disk(100_000), pytest.raises(OSError, match="encoder.pt cannot be written"):
        export.write_checked(encoder, format, tmp_path / "encoder.pt", False, False)
    assert not list(tmp_path.iterdir())


def test_the_check_cannot_import_this_project(tmp_path):
    images = torch.zeros(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="No module named 'weights'"):
        verify.verified(tmp_path / "file", "import weights", images, {"embeddings": torch.zeros(2, 4)})


def test_weights_that_are_not_finite_are_refused(small_checkpoint, tmp_path):
    content = torch.load(small_checkpoint)
    content["state_dict"]["model.conv1.0.weight"][0] = torch.nan
    torch.save(content, tmp_path / "nan.ckpt")
    with pytest.raises(ValueError, match="not finite"):
        export.export(tmp_path / "nan.ckpt", "torchvision")
    assert [path.name for path in tmp_path.iterdir()] == ["nan.ckpt"]


def test_published_files_are_what_torch_hub_checks(small_checkpoint, same_process, tmp_path):
    """Even if the name before the hash contains text that torch.hub would read as a hash."""
    path = export.export(small_checkpoint, "torchvision", tmp_path / "moco-800.torchvision.pt", publish=True)
    assert path.name == f"moco-800_torchvision-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pt"
    state = torch.hub.load_state_dict_from_url(
        path.as_uri(), str(tmp_path / "hub"), progress=False, check_hash=True, weights_only=True
    )["state_dict"]
    model = torchvision.models.shufflenet_v2_x0_5()
    model.fc = nn.Identity()
    model.load_state_dict(state)
    again = shutil.copy(path, tmp_path / "again.pt")
    with pytest.raises(FileExistsError, match=path.name):
        export.place(Path(again), tmp_path / "moco-800.torchvision.pt", publish=True)


@pytest.mark.parametrize(
    ("format", "options", "message"),
    [
        ("onxx", {}, "format='onxx' is unknown: choose one of torchvision, timm, safetensors, "),
        ("timm", {"normalize": True}, "normalize=True: format='timm' .*Choose one of torchscript, onnx"),
    ],
)
def test_refused_in_words(format, options, message, checkpoint):
    with pytest.raises(ValueError, match=message):
        export.export(checkpoint, format, **options)


def test_a_missing_package_is_named(checkpoint, monkeypatch):
    missing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None if name == "onnxscript" else name))
    monkeypatch.setattr(export, "importlib", missing)
    with pytest.raises(ValueError, match=r"format='onnx' .* pip install onnxscript\.$"):
        export.export(checkpoint, "onnx")


def test_a_protobuf_too_large_is_refused(tmp_path):
    with torch.device("meta"):
        large = nn.Linear(2**15, 2**14)
    with pytest.raises(ValueError, match="format='onnx': the encoder has 2.0 GiB, .*Choose torch_export"):
        formats.write_onnx(large, tmp_path / "large.onnx", {}, torch.zeros(1))


# ---- the command ----


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export.main()


def test_command_line(small_checkpoint, same_process, tmp_path, monkeypatch, capsys):
    run(monkeypatch, small_checkpoint, "--format", "torchvision", "safetensors", "--out", tmp_path / "new", "--count")
    output = capsys.readouterr().out
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == ["small.safetensors", "small.torchvision.pt"]
    assert all(name in output for name in (*found, "stage4", "projection_model"))
    with pytest.raises(SystemExit, match="error: .*small.safetensors already exists"):
        run(monkeypatch, small_checkpoint, "--format", "onnx", "safetensors", "--out", tmp_path / "new")
    with pytest.raises(SystemExit, match="is a file, but there are 2 formats. Pass a directory"):
        run(monkeypatch, small_checkpoint, "--format", "onnx", "safetensors", "--out", "a.pt")
    with pytest.raises(SystemExit, match="error: format=timm: not written. encoder_arch='shufflenet"):
        run(monkeypatch, small_checkpoint, "--format", "timm", "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()
    monkeypatch.chdir(tmp_path)  # `same_process` changed to a directory that no longer exists
    with pytest.raises(SystemExit, match="error: there is no file nowhere.ckpt"):
        run(monkeypatch, "nowhere.ckpt", "--format", "onnx")
    with pytest.raises(SystemExit):
        run(monkeypatch, small_checkpoint)
    assert "pass --format or --count" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == found


@pytest.mark.slow
def test_an_impossible_format_does_not_stop_the_others(small_checkpoint, same_process, tmp_path, monkeypatch, capsys):
    order = ["detectron2", "torchvision", "timm", "torchscript"]  # the first and the third cannot hold a ShuffleNet
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, small_checkpoint, "--format", *order, "--out", tmp_path / "new")
    found = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert found == ["small.torchscript.pt", "small.torchvision.pt"]
    output = capsys.readouterr().out
    assert all(f"{tmp_path / 'new' / name} (" in output for name in found)
    assert isinstance(message := end.value.code, str)  # Python prints it and exits with status 1
    assert re.match("error: format=detectron2: not written. encoder.*; format=timm: not written. encoder", message)


@pytest.mark.parametrize(
    ("out", "expected"),
    [
        (None, "{beside}/small.onnx"),
        ("new", "new/small.onnx"),
        ("v1.0/", "v1.0/small.onnx"),
        ("v1.0", "v1.0/small.onnx"),
        ("there.d", "there.d/small.onnx"),
        ("model.onnx", "model.onnx"),
    ],
)
def test_paths_of_exported_files(out, expected, small_checkpoint):
    Path("there.d").mkdir()
    for lagging, name in ((False, "small.onnx"), (True, "small_lagging.onnx")):
        paths = export.targets(small_checkpoint, ["onnx"], out, publish=False, normalize=False, lagging=lagging)
        assert paths == [Path(expected.format(beside=small_checkpoint.parent).replace("small.onnx", name))]


# ---- parameters and FLOPs ----


@pytest.mark.parametrize("arch", ["resnet50", "vit_b_32", "mobilenet_v3_small"])
def test_counts_are_those_of_torchvisions_tables(arch):
    """The tables include the classifier and count a multiply-add as one (`_ops`, in 1e9, rounded to 3 digits)."""
    params = EncoderAndDataParams(encoder_arch=arch, transform_crop_size=224, dataset_name="imagenet")
    with torch.device("meta"):
        made, width = get_encoder(params)
    parts = count.count_parts(Encoder(made, params, Report("", "", "", 0, ())))
    table = next(iter(torchvision.models.get_model_weights(arch))).meta
    parameters, flops = sum(part.parameters for part in parts), sum(part.flops for part in parts)
    classifier = width * 1000
    assert parameters == table["num_params"] - classifier - 1000
    assert (flops / 2 + classifier) / 1e9 == pytest.approx(table["_ops"], abs=6e-4)


def test_parts_of_a_resnet_and_its_heads(checkpoint):
    content = torch.load(checkpoint)
    method = SelfSupervisedMethod(content["hyper_parameters"])
    method.load_state_dict(content["state_dict"])
    parts = {part.name: part.parameters for part in count.count_parts(load_encoder(checkpoint))}
    parts |= {part.name: part.parameters for part in count.heads(method.state_dict())}
    expected = {"stem": [method.model.conv1, method.model.bn1]}
    expected |= {f"layer{i}": [getattr(method.model, f"layer{i}")] for i in (1, 2, 3, 4)}
    expected |= {name: [getattr(method, name)] for name in ("projection_model", "prediction_model")}
    assert parts == {
        name: sum(p.numel() for module in modules for p in module.parameters()) for name, modules in expected.items()
    }
    flops = {part.name: part.flops for part in count.heads(method.state_dict())}
    assert flops["prediction_model"] == 2 * (16 * 32 + 32 * 16)


@pytest.mark.slow
def test_an_exported_stem_of_another_system_is_read_back_as_itself(tmp_path):
    """And weights of one stem are refused for another, whose tensors have the same shapes."""
    model = SelfSupervisedMethod("simclr", dataset_name="cifar10", stem_variant="padding_2", dim=8, seed=0)
    save_checkpoint(model, tmp_path / "own.ckpt")
    exported = load_encoder(export.export(tmp_path / "own.ckpt", "safetensors", tmp_path / "own.safetensors"))
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert exported.params.stem_variant == "padding_2"
    assert close(exported.embed(images), load_encoder(tmp_path / "own.ckpt").embed(images))
    with pytest.raises(ValueError, match="first layers are those of stem_variant='padding_2'"):
        SelfSupervisedMethod("simclr", dataset_name="cifar10", encoder_weights=str(tmp_path / "own.ckpt"), dim=8)
    with pytest.raises(ValueError, match="'typo.pth' is not a file; timm's weights are called 'DEFAULT'"):
        SelfSupervisedMethod("simclr", encoder_arch="timm:vit_tiny_patch16_224", encoder_weights="typo.pth")
