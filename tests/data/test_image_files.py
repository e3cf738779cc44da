"""Image files of all kinds: modes and shapes, corrupt files, empty folders."""

import os
import re
import shutil
import signal
import tarfile
from functools import partial

import attrs
import numpy as np
import processes
import pytest
import pytorch_lightning as pl
import torch
from conftest import QUIET
from PIL import Image
from sklearn.datasets import load_sample_images
from test_custom_data import params as custom_params
from torch import nn

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, image_files, loading, packed
from self_supervised.data.image_files import ImageFiles, read_image, samples_in_class_folders
from self_supervised.data.video_files import videos_in_class_folders
from self_supervised.embeddings.batches import Batches
from self_supervised.embeddings.sources import open_source

RAMP = np.linspace(0, 255, 40 * 30).reshape(40, 30).astype(np.uint8)


def photo(height: int = 40, width: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write(path, kind: str) -> None:
    """Write a file of this kind; the first kinds are images, the others are not."""
    saved = {
        "jpeg": lambda: photo().save(path, "JPEG"),
        "gray": lambda: Image.fromarray(RAMP).save(path, "PNG"),
        "palette": lambda: photo().quantize(16).save(path, "PNG"),
        "palette with transparency": lambda: photo().quantize(16).save(path, "PNG", transparency=b"\x80" * 16),
        "rgba": lambda: photo().convert("RGBA").save(path, "PNG"),
        "gray with alpha": lambda: Image.fromarray(RAMP).convert("LA").save(path, "PNG"),
        "one bit": lambda: Image.fromarray(RAMP).convert("1").save(path, "PNG"),
        "cmyk": lambda: photo().convert("CMYK").save(path, "JPEG"),
        "16 bit": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257).save(path, "PNG"),
        "16 bit tiff": lambda: Image.fromarray(RAMP.astype(np.uint16) * 257).save(path, "TIFF"),
        "1 x 1": lambda: photo(1, 1).save(path, "PNG"),
        "20,000 x 3": lambda: photo(3, 20000).save(path, "PNG"),
        "3 x 20,000": lambda: photo(20000, 3).save(path, "JPEG"),
        "truncated": lambda: (photo(400, 300).save(path, "JPEG"), path.write_bytes(path.read_bytes()[:20000])),
        "truncated png": lambda: (photo().save(path, "PNG"), path.write_bytes(path.read_bytes()[:-500])),
        "corrupted": lambda: (photo().save(path, "PNG"), path.write_bytes(path.read_bytes()[:60] + b"x" * 900)),
        "empty": lambda: path.write_bytes(b""),
        "text": lambda: path.write_text("not an image"),
        "html": lambda: path.write_text("<html><body>404 Not Found</body></html>"),
        "floating point": lambda: Image.fromarray(RAMP.astype(np.float32)).save(path, "TIFF"),
        "dangling link": lambda: path.symlink_to(path.with_name("nowhere.jpg")),
    }
    saved[kind]()


GOOD = ["jpeg", "gray", "palette", "palette with transparency", "rgba", "gray with alpha", "one bit", "cmyk", "16 bit",
        "16 bit tiff", "1 x 1", "20,000 x 3", "3 x 20,000"]  # fmt: skip
BAD = ["truncated", "truncated png", "corrupted", "empty", "text", "html", "floating point", "dangling link"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Class folders with twelve readable images each, and settings for them."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "imagenet" / split / label
            folder.mkdir(parents=True)
            for i in range(12):
                photo().save(folder / f"{i:02d}.jpg")
    return ModelParams(
        dataset_name="imagenet", encoder_arch="module", batch_size=4, transform_crop_size=16, num_data_workers=0, K=16,
        dim=8, mlp_hidden_dim=16, seed=0, evaluations=[],
    )  # fmt: skip


def everything(params, training: bool = True):
    dataset = data_sets.get_dataset(params, params.dataset.train_splits, [params.dataset.view] * 2 if training else ())
    return dataset, list(loading.get_loader(params, dataset, training))


@pytest.mark.parametrize("kind", GOOD)
def test_images_of_every_mode_and_shape_are_read(kind, folders, tmp_path):
    path = packed.data_path() / "imagenet" / "train" / "cat" / "00.jpg"
    path.unlink()
    write(path, kind)
    for training in (True, False):
        dataset, batches = everything(folders, training)
        assert sum(len(labels) for _, labels in batches) == 24 and not dataset.skipped()
    image = np.asarray(read_image(str(path), 3))
    assert image.ndim == 3 and image.dtype == np.uint8
    gray = np.asarray(read_image(str(path), 1))
    if kind in ("gray", "gray with alpha", "16 bit", "16 bit tiff"):
        assert np.array_equal(gray, RAMP) and np.array_equal(image, np.repeat(RAMP[..., None], 3, axis=2))
    if kind in ("rgba", "1 x 1", "20,000 x 3"):
        size = {"rgba": (40, 30), "1 x 1": (1, 1), "20,000 x 3": (3, 20000)}[kind]
        assert np.array_equal(image, np.asarray(photo(*size)))
    if kind.startswith("palette"):
        assert np.array_equal(image, np.asarray(photo().quantize(16).convert("RGB")))
    if kind == "cmyk":
        assert np.array_equal(image, np.asarray(Image.open(path).convert("RGB")))


@pytest.mark.parametrize("kind, workers", [*((kind, 0) for kind in BAD), ("truncated", 2), ("empty", 2)])
def test_what_is_no_image_is_named_or_skipped(kind, workers, folders):
    path = packed.data_path() / "imagenet" / "train" / "cat" / "05.jpg"
    path.unlink()
    write(path, kind)
    params = attrs.evolve(folders, num_data_workers=workers)
    with pytest.raises(ValueError, match=r"cat/05.jpg could not be read as an image \(.*unreadable_images=\"skip\""):
        everything(params)
    dataset, batches = everything(attrs.evolve(params, unreadable_images="skip"))
    assert dataset.skipped() == [str(path)] and sum(len(labels) for _, labels in batches) == 24


def test_skipped_images_are_reported_with_their_number(folders, trainer):
    for name in ("03.jpg", "07.jpg"):
        (packed.data_path() / "imagenet" / "train" / "dog" / name).write_bytes(b"")
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.BatchNorm1d(12))
    fit = trainer(max_epochs=2, limit_train_batches=None, limit_val_batches=0)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="2 files could not be read and were skipped: .*03.jpg, .*07.jpg") as found:
        fit.fit(SelfSupervisedMethod(folders, encoder=encoder, num_data_workers=2, unreadable_images="skip"))
    assert len([w for w in found if "could not be read" in str(w.message)]) == 1


def test_folders_that_hold_nothing_are_refused_in_one_sentence(folders, monkeypatch, tmp_path):
    train = packed.data_path() / "imagenet" / "train"
    with pytest.raises(ValueError, match="batch_size=32: the 24 images of imagenet are fewer than one batch of 32"):
        everything(attrs.evolve(folders, batch_size=32))
    everything(attrs.evolve(folders, batch_size=32, drop_last_batch=False))
    for path in (train / "cat").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="train must hold one folder of images per class, but cat"):
        everything(folders)
    for path in (train / "dog").iterdir():
        path.write_bytes(b"")
        (train / "cat" / path.name).write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 24 images can be read, the last one is .*jpg"):
        everything(attrs.evolve(folders, unreadable_images="skip"))
    for label in ("cat", "dog"):
        for path in (train / label).iterdir():
            path.unlink()
        (train / label).rmdir()
    with pytest.raises(ValueError, match="train must hold one folder of images per class"):
        everything(folders)
    (tmp_path / "a_file").touch()
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "a_file"))
    for name in ("imagenet", "digits", "cifar10"):
        with pytest.raises(ValueError, match="DATA_PATH=.*a_file is a file"):
            data_sets.prepare_data(name)


def train_on_what_kills(rank: int, params: ModelParams) -> None:
    def read_or_die(path, *how):
        if path.endswith("dog/04.jpg"):
            os.kill(os.getpid(), signal.SIGKILL)
        return read_image(path, *how)

    image_files.read_image = read_or_die
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, num_sanity_val_steps=0, **QUIET)
    trainer.fit(SelfSupervisedMethod(params, encoder=encoder, num_data_workers=2))


def test_a_worker_that_dies_is_reported_with_the_file_it_read(folders, tmp_path):
    """In a separate process, since PyTorch raises at an arbitrary place, even during an import."""
    assert processes.join(processes.launch(train_on_what_kills, 1, tmp_path, folders)) != [0]
    said = (tmp_path / "output_0.txt").read_text()
    assert re.search(r"died \(SIGKILL\); the last file that this worker read is .*dog/04\.jpg", said), said


def test_memory_of_the_workers_is_shared(folders):
    dataset, _ = everything(attrs.evolve(folders, num_data_workers=2))
    workers = {process for process, _ in dataset.reading.tolist()} - {-1}
    assert len(workers) == 2 and os.getpid() not in workers
    assert torch.equal(dataset.unreadable, torch.zeros(24, dtype=torch.bool))


def one_class(folder, image: Image.Image, **options):
    """Directory with one class and one JPEG, and the JPEG's path."""
    (folder / "cat").mkdir(parents=True)
    image.save(folder / "cat" / "0.jpg", quality=95, **options)
    return folder / "cat" / "0.jpg"


def pil_view(image: Image.Image, box: tuple[int, ...], size: int) -> np.ndarray:
    pixels = np.asarray(image.crop(box).resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    return pixels.reshape(size, size, -1).transpose(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_views_are_the_crops_of_pil_to_one_gray_level(channels, mode, tmp_path):
    path = one_class(tmp_path, Image.fromarray(load_sample_images().images[0]).convert(mode))
    views = [
        ViewSettings(crop_size=224),
        ViewSettings(crop_size=200, crop_scale=(0.05, 0.2)),
    ]  # views smaller and larger than the crop
    dataset = ImageFiles(tmp_path, samples_in_class_folders(tmp_path), channels, 224, views, seed=0)
    image = read_image(str(path), channels)
    for dataset.epoch in range(5):
        for crop, box, view in zip(dataset[0][0], dataset.boxes(0, image.size), views, strict=True):
            assert crop.shape == (channels, view.crop_size, view.crop_size) and crop.permute(1, 2, 0).is_contiguous()
            assert np.abs(crop.numpy() - pil_view(image, box, view.crop_size)).max() <= 1


@pytest.mark.parametrize("size, scale", [(96, 2), (46, 4), (16, 8)])
@pytest.mark.parametrize("progressive", [False, True])
def test_large_jpegs_are_decoded_at_a_reduced_scale_and_views_stay_close(size, scale, progressive, tmp_path):
    photograph = Image.fromarray(load_sample_images().images[0])  # a temple with fine tiles, 640 x 427
    path = one_class(tmp_path, photograph, progressive=progressive)
    views = [
        ViewSettings(crop_size=size, crop_scale=(0.6, 1.0)),
        ViewSettings(crop_size=size // 2, crop_scale=(0.5, 1.0)),
    ]
    dataset = ImageFiles(tmp_path, samples_in_class_folders(tmp_path), 3, size, views, seed=0)
    image, differences = read_image(str(path), 3), []
    for dataset.epoch in range(10):
        exact = dataset.boxes(0, image.size)
        decoded, boxes = dataset.read(0)
        assert decoded.size == tuple(-(-side // scale) for side in image.size)
        for crop, box, drawn, view in zip(dataset[0][0], boxes, exact, views, strict=True):
            near = [scale * edge for edge in box]
            assert max(abs(a - b) for a, b in zip(near, drawn, strict=True)) <= scale / 2
            differences.append(np.abs(crop.numpy() - pil_view(image, near, view.crop_size)).mean())
    assert np.mean(differences) < 2 and max(differences) < 3, differences


def test_no_crop_becomes_smaller_than_its_view(folders):
    views = [ViewSettings(crop_size=224), ViewSettings(crop_size=96)]
    for sides, scale in (((559, 500), 1), ((560, 500), 2), ((1200, 239), 1), ((1200, 480), 4), ((99999, 99999), 8)):
        assert image_files.reduction([(7, 7, 7 + side, 2007 + side) for side in sides], views) == scale
    dataset, _ = everything(folders)  # 40 x 30 pixels, too small for a reduced scale
    assert dataset.read(0)[0].size == (30, 40)


@pytest.mark.parametrize("mode, kept", [("CMYK", False), ("L", True)])
def test_only_jpegs_of_known_modes_are_reduced(mode, kept, tmp_path):
    path = one_class(tmp_path, photo(200, 400).convert(mode))
    assert image_files.jpeg_size(str(path)) == ((400, 200) if kept else None)
    dataset = ImageFiles(tmp_path, samples_in_class_folders(tmp_path), 3, 16, [ViewSettings(crop_size=16)] * 2, seed=0)
    assert (dataset.read(0)[0].width < 400) == kept and dataset.read(0)[0].mode == "RGB"


def test_a_large_truncated_jpeg_is_named_too(tmp_path):
    path = one_class(tmp_path, photo(400, 300))
    path.write_bytes(path.read_bytes()[:20000])
    for views in ([ViewSettings(crop_size=16)] * 2, []):
        with pytest.raises(ValueError, match="cat/0.jpg could not be read as an image .*truncated"):
            ImageFiles(tmp_path, samples_in_class_folders(tmp_path), 3, 16, views, seed=0)[0]
        with pytest.raises(ValueError, match="none of the 1 images can be read"):
            ImageFiles(tmp_path, samples_in_class_folders(tmp_path), 3, 16, views, seed=0, skip_unreadable=True)[0]


def test_class_folders_are_numbered_by_those_of_train(tmp_path):
    """torchvision's ImageFolder would number each split separately, and every score would silently be wrong."""

    def make(split: str, *names: str) -> None:
        shutil.rmtree(tmp_path / split, ignore_errors=True)
        for name in names:
            (tmp_path / split / name / "frames").mkdir(parents=True)
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / split / name / "frames" / "0.png")

    def labels(split: str) -> list[int]:
        found = [[label for _, label in read(tmp_path / split)] for read in (samples_in_class_folders, frames)]
        assert found[0] == found[1]
        return found[0]

    frames = partial(videos_in_class_folders, of_frames=True)
    make("train", "ant", "bee", "café")
    assert labels("train") == [0, 1, 2]
    make("val", "ant", "cafe\u0301")  # a class may be missing, and macOS decomposes accents
    assert labels("val") == [0, 2]
    for name, message in (("all", "'all'"), ("Bees", "'Bees' .nearest: 'bee'"), ("000", "'000'")):
        make("val", "ant", name)
        for read in (samples_in_class_folders, frames):
            with pytest.raises(ValueError, match=f"val has classes that train lacks, 1 of 2: {message}"):
                read(tmp_path / "val")
    shutil.rmtree(tmp_path / "train")
    assert labels("val") == [0, 1]  # train has no labels: alphabetical order


@pytest.mark.parametrize("side", [12, 40])  # below and above twice the limit, which Pillow treats differently
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.npy"])
def test_one_limit_of_pixels_for_all_readers_before_decoding(name, side, tmp_path, monkeypatch):
    path = tmp_path / "train" / "c" / name
    path.parent.mkdir(parents=True)
    pixels = np.zeros((side, side, 3), np.uint8)
    np.save(path, pixels) if name == "a.npy" else Image.fromarray(pixels).save(path)
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        tar.add(path, f"c/{name}")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    views = [ViewSettings(crop_size=4)] * 2
    pages = {"a.tif": [None, [0, 255]], "a.npy": [[0, 255]]}.get(name, [None])
    for pixel_range in pages:
        for root in (tmp_path / "train", tmp_path / "train.tar"):
            p = custom_params(root, pixel_range=pixel_range, val_size=0, test_size=0)
            for of_training in (views, []):
                with pytest.raises(ValueError, match="more than 100 pixels"):
                    data_sets.get_dataset(p, ("train",), of_training)[0]
            source = open_source(str(root))
            _, images, unreadable = Batches(source, p).__getitems__(source.paths())
            assert images is None and "more than 100 pixels" in next(iter(unreadable.values()))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert data_sets.get_dataset(p, ("train",))[0][0].shape == (3, 32, 32)


def test_a_header_that_lies_about_its_size_is_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "c" / "a.npy"
    path.parent.mkdir()
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 3)})
    with pytest.raises(ValueError, match="a.npy could not be read as an image .*pixels"):
        data_sets.get_dataset(custom_params(tmp_path, val_size=0, test_size=0), ("train",))[0]
