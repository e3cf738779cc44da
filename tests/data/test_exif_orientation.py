"""EXIF orientation: compared with Pillow's `ImageOps.exif_transpose`, in every place where images are read."""

import io
import tarfile
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pytorch_lightning import Trainer
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import BYOLParams, EncoderAndDataParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, image_files
from self_supervised.data.array_files import read_array
from self_supervised.data.decoders import read_folder
from self_supervised.data.image_files import ImageFiles, read_image, samples_in_class_folders
from self_supervised.embeddings.batches import Batches
from self_supervised.embeddings.sources import open_source
from self_supervised.evaluation.fingerprints import settings_for_features
from self_supervised.networks.pretrained import load_encoder
from self_supervised.training.hyperparameters import use_earlier_defaults

ORIENTATIONS = range(1, 9)


def oriented(orientation: int, kind: str = "JPEG", width: int = 400, height: int = 300, mode: str = "RGB") -> bytes:
    """Return an image file with a smooth picture that no flip or rotation leaves unchanged."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = (np.stack([x, y, x * y**2], 2) * 255).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, exif=exif, **options)
    return file.getvalue()


def expected(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert(mode))


def as_stored(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright_as_by_pillow(kind, orientation):
    content = oriented(orientation, kind)
    assert np.array_equal(read_image(io.BytesIO(content), 3), expected(content))
    assert np.array_equal(read_image(io.BytesIO(content), 1), expected(content, "L"))
    if kind != "TIFF":  # which Pillow always turns
        assert np.array_equal(read_image(io.BytesIO(content), 3, None, False), as_stored(content))
    if kind in ("PNG", "WEBP"):
        content = oriented(orientation, kind, mode="RGBA")
        found = read_array(f"x.{kind.lower()}", io.BytesIO(content), 4, None, True)
        assert np.array_equal(found, expected(content, "RGBA"))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_large_jpegs_of_reduced_scale_are_cropped_as_upright_images(orientation, tmp_path):
    content = oriented(orientation, "JPEG", 801, 403)  # sides that no scale divides
    upright = expected(content)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "1.jpg").write_bytes(content)
    views = [ViewSettings(crop_size=32, crop_scale=(0.5, 1.0))] * 2
    dataset = ImageFiles(tmp_path, samples_in_class_folders(tmp_path), 3, 32, views, seed=0)
    assert image_files.jpeg_size(dataset.files[0][0]) == upright.shape[1::-1]
    image, _ = dataset.read(0)
    scale = upright.shape[1] / image.width
    assert scale > 3.9 and image.height == -(-upright.shape[0] // round(scale))
    for dataset.epoch in range(3):
        for crop, box in zip(dataset[0][0], dataset.boxes(0, upright.shape[1::-1]), strict=True):
            exact = Image.fromarray(upright).resize((32, 32), Image.Resampling.BILINEAR, box=box)
            difference = np.abs(crop.numpy().transpose(1, 2, 0).astype(float) - np.asarray(exact))
            assert difference.mean() < 6  # shifted by less than a pixel of the reduced image


def stored(folder, kind: str, contents: dict[str, bytes]) -> str:
    """Write images as class folders, shards or a Hugging Face data set, and return the value of data_path."""
    if kind == "shards":
        with tarfile.open(folder / "train.tar", "w") as shard:
            for name, content in contents.items():
                member = tarfile.TarInfo(f"class/{name}.jpg")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
        return str(folder / "train.tar")
    if kind == "parquet":
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": content, "path": None} for content in contents.values()]}
        datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()})).save_to_disk(folder / "hf")
        return str(folder / "hf")
    (folder / "photos" / "class").mkdir(parents=True)
    for name, content in contents.items():
        (folder / "photos" / "class" / f"{name}.jpg").write_bytes(content)
    return str(folder / "photos")


@pytest.mark.parametrize("kind", ["folder", "shards", "parquet"])
def test_training_evaluation_and_embed_see_the_same_upright_images(kind, tmp_path):
    content = oriented(6)
    path = stored(tmp_path, kind, {f"{i}": content for i in range(4)})
    for upright, pixels in ((True, expected(content)), (False, as_stored(content))):
        params = EncoderAndDataParams(
            dataset_name="folder", data_path=path, labels_from=None, transform_crop_size=32, exif_orientation=upright
        )
        square = image_files.central_square(Image.fromarray(pixels), 32)
        assert torch.equal(data_sets.get_dataset(params, ("val",))[0][0], square)
        whole = [ViewSettings(crop_size=300, crop_scale=(1.0, 1.0), crop_ratio=(0.75, 0.75))]  # 300 x 400, if upright
        assert data_sets.get_dataset(params, ("train",), whole).read(0)[0].size == pixels.shape[1::-1]
        source = open_source(path)
        assert torch.equal(Batches(source, params).prepared(source.paths()[0]), square)


def test_imagenet_and_directories_of_frames_are_turned_too(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    content = oriented(8)
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split / "class").mkdir(parents=True)
        (tmp_path / "imagenet" / split / "class" / "1.jpg").write_bytes(content)
    for upright, pixels in ((True, expected(content)), (False, as_stored(content))):
        params = EncoderAndDataParams(dataset_name="imagenet", exif_orientation=upright)
        assert np.array_equal(data_sets.get_dataset(params, ("val",)).read(0)[0], pixels)
        folder = str(tmp_path / "imagenet" / "val" / "class")
        frames, _ = read_folder(folder, lambda times: np.array([0]), 3, 1, 30.0, upright)
        assert np.array_equal(frames[0], pixels)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\0\0nonsense", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0"])
def test_an_image_with_corrupt_metadata_is_read_as_stored(exif):
    file = io.BytesIO()
    Image.fromarray(as_stored(oriented(1))).save(file, "PNG", exif=exif)
    assert np.array_equal(read_image(file, 3), as_stored(oriented(1)))


def test_checkpoints_of_earlier_versions_keep_the_old_way(tmp_path):
    own = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    settings = BYOLParams(dataset_name="folder", transform_crop_size=32, dim=8, mlp_hidden_dim=8, evaluations=[])
    method = SelfSupervisedMethod(settings, encoder=own)
    trainer = Trainer(logger=False, accelerator="cpu", enable_checkpointing=False)
    trainer.strategy.connect(method)
    now, earlier = tmp_path / "now.ckpt", tmp_path / "earlier.ckpt"
    trainer.save_checkpoint(now)
    content = torch.load(now, weights_only=True)
    del content["hyper_parameters"]["exif_orientation"]
    torch.save(content, earlier)
    for path, upright in ((now, True), (earlier, False)):
        load = partial(SelfSupervisedMethod.load_from_checkpoint, path, encoder=own)
        assert load().params.exif_orientation == upright and load(exif_orientation=True).params.exif_orientation
        assert load_encoder(path, encoder=own).params.exif_orientation == upright
        linear = LinearClassifierMethod.from_moco_checkpoint(path, own, n_classes=2)
        assert linear.params.exif_orientation == upright
        resumed = SelfSupervisedMethod(settings, encoder=own)
        use_earlier_defaults(resumed, torch.load(path, weights_only=True))
        assert resumed.params.exif_orientation == resumed.hparams["exif_orientation"] == upright


def test_cached_features_of_earlier_versions_are_found_only_without_orientation():
    """Keys of features whose images cannot differ are those of earlier versions."""
    packed = EncoderAndDataParams(dataset_name="cifar10")
    files, old = (EncoderAndDataParams(dataset_name="imagenet", exif_orientation=upright) for upright in (True, False))
    videos = EncoderAndDataParams(dataset_name="kinetics")
    assert "exif_orientation" not in settings_for_features(packed).keys() | settings_for_features(videos).keys()
    assert {**settings_for_features(old), "exif_orientation": True} == settings_for_features(files)
