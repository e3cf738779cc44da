"""Packed image files: pixels and views compared with torchvision and with unpacked ones, changes, interruption."""

import os
import shutil
from collections import namedtuple
from pathlib import Path

import attrs
import numpy as np
import processes
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from model_params import ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, loading, packed_files
from self_supervised.data.image_files import draw_box, read_any
from self_supervised.data.shard_urls import UnreachableShard
from self_supervised.numerics import generator
from self_supervised.views.augmentations import draw_crops

N = 12  # images


@pytest.fixture
def params(tmp_path, monkeypatch):
    """Settings for class folders of photographs of many shapes, one of which is turned by its EXIF orientation."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    for i in range(N):
        write_photo(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.jpg", i, (60 + 7 * i, 90 - 3 * i))
    return ModelParams(
        dataset_name="folder", data_path=str(tmp_path / "photos"), transform_crop_size=28, batch_size=4, seed=0,
        num_data_workers=0, val_size=0, test_size=0, pack_images=True, evaluations=[], drop_last_batch=False,
    )  # fmt: skip


def write_photo(path: Path, seed: int, size: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6 if seed == 3 else 1
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(path, exif=exif)


def dataset_of(params, training: bool = True):
    """Return the data set after its loader has packed it, and the batches in order."""
    views = [attrs.evolve(params.dataset.view, crop_size=28)] * 2 if training else ()
    dataset = data_sets.get_dataset(params, ("train",), views)
    return dataset, list(loading.get_loader(params, dataset, training=training, in_order=True))


def parts(tmp_path) -> list[Path]:
    return sorted((tmp_path / "data" / "packed").glob("*/part-*"))


def test_packed_pixels_are_those_of_torchvision(params, capfd):
    dataset, _ = dataset_of(params)
    assert "packing 12 images" in capfd.readouterr().out
    for index, (path, _) in enumerate(dataset.files):
        upright = read_any(path, path, 3, None)
        expected = np.asarray(functional.resize(upright, 32))  # 8/7 of 28; PIL's own resizing
        assert np.abs(dataset.packed_pixels(index).astype(int) - expected).max() <= 1
        assert dataset.packed_pixels(index).shape == expected.shape


def test_views_of_packed_images_are_those_of_the_files(params):
    """Crops have the same place and size relative to the image, up to the rounding to packed pixels."""
    packed, batches = dataset_of(params)
    files, originals = dataset_of(attrs.evolve(params, pack_images=False))
    for (crops, labels), (exact, labels_of_files) in zip(batches, originals, strict=True):
        assert torch.equal(labels, labels_of_files)
        for view, expected in zip(crops, exact, strict=True):
            assert view.shape == expected.shape and view.dtype == torch.uint8
            assert (view.float() - expected.float()).abs().mean() < 16
    for index in range(N):
        size = packed.packed_pixels(index).shape[1::-1]
        original = read_any(files.files[index][0], files.files[index][0], 3, None).size
        drawn, exact = packed.boxes(index, size), files.boxes(index, original)
        assert np.abs(np.array(drawn) - np.array(exact) * np.tile(size, 2) / np.tile(original, 2)).max() < 2


def test_evaluations_see_the_same_bits(params, tmp_path):
    _, batches = dataset_of(params, training=False)
    _, originals = dataset_of(attrs.evolve(params, pack_images=False), training=False)
    assert len(parts(tmp_path)) == 1
    for (squares, labels), (expected, labels_of_files) in zip(batches, originals, strict=True):
        assert torch.equal(squares, expected) and torch.equal(labels, labels_of_files)


@pytest.mark.parametrize("size", [(500, 375), (20, 900), (3, 2), (1, 1)])
def test_box_of_one_image_is_that_of_draw_crops(size):
    view = ViewSettings(crop_size=8)
    for seed in range(200):
        one, many = generator(seed), generator(seed)
        left, top, right, bottom = draw_box(one, size, view)
        expected = draw_crops(many, 1, size[1], size[0], view)
        found = {"top": top, "left": left, "height": bottom - top, "width": right - left}
        assert found == {name: int(value[0]) for name, value in expected.items()}
        assert one.random() == many.random()


def test_changed_and_new_images_are_packed_again(params, tmp_path, capfd):
    dataset_of(params)
    capfd.readouterr()
    before = parts(tmp_path)
    dataset_of(attrs.evolve(params, data_fraction=0.5, data_seed=3))
    assert not capfd.readouterr().out and parts(tmp_path) == before  # other splits, the same images
    write_photo(tmp_path / "photos" / "cat" / "00.jpg", 100, (70, 50))
    write_photo(tmp_path / "photos" / "cat" / "new.jpg", 101, (50, 70))
    dataset, _ = dataset_of(params)
    assert "packing 2 images" in (said := capfd.readouterr().out) and "1 of which have changed" in said
    assert len(parts(tmp_path)) == 2
    for index, (path, _) in enumerate(dataset.files):
        expected = functional.resize(read_any(path, path, 3, None), 32)
        assert np.abs(dataset.packed_pixels(index).astype(int) - np.asarray(expected)).max() <= 1
    for i in range(N):
        os.utime(tmp_path / "photos" / ("cat", "dog")[i % 2] / f"{i:02d}.jpg", ns=(0, 10**9))
    dataset_of(params)
    assert before[0] not in parts(tmp_path)  # nothing in it is current
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert not [link for link in links if link.startswith(str(tmp_path)) and link.endswith("(deleted)")]
    views = dataset[0][0]  # of a training that began before, and now reads the files
    assert [view.shape for view in views] == [view.shape for view in dataset_of(params)[0][0][0]]


def test_relative_and_absolute_paths_share_the_packed_images(params, tmp_path, monkeypatch, capfd):
    dataset_of(params)
    capfd.readouterr()
    monkeypatch.chdir(tmp_path)
    for path in ("photos", "photos/../photos"):
        dataset_of(attrs.evolve(params, data_path=path))
    assert "packing" not in capfd.readouterr().out and len(parts(tmp_path)) == 1


def test_unreadable_images_stop_or_are_skipped(params, tmp_path):
    (tmp_path / "photos" / "dog" / "03.jpg").write_bytes(b"not an image")
    with pytest.raises(ValueError, match="03.jpg could not be read as an image"):
        dataset_of(params)
    assert not parts(tmp_path)
    dataset, batches = dataset_of(attrs.evolve(params, unreadable_images="skip"))
    assert sum(len(labels) for _, labels in batches) == N and len(dataset.skipped()) == 1
    with pytest.raises(ValueError, match="03.jpg could not be read as an image"):
        dataset_of(params)


def test_a_shard_that_stays_away_is_no_unreadable_image(params, tmp_path, monkeypatch):
    def away(*_):
        raise UnreachableShard("https://host/0.tar could not be read")

    monkeypatch.setattr(packed_files, "reduced_pixels", away)
    with pytest.raises(UnreachableShard, match="0.tar"):
        dataset_of(attrs.evolve(params, unreadable_images="skip"))
    assert not parts(tmp_path)


def test_interrupted_packing_keeps_complete_parts_only(params, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(packed_files, "PART", 5)
    real, reads = packed_files.reduced_pixels, []

    def interrupted(*args):
        reads.append(args)
        if len(reads) > N + 8:  # the first N are the sample for the estimate
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(packed_files, "reduced_pixels", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dataset_of(params)
    assert len(parts(tmp_path)) == 1 and len(list(parts(tmp_path)[0].parent.iterdir())) == 1
    leftover = parts(tmp_path)[0].parent / ".part-0.host.1.00.unfinished"  # as of a killed process
    leftover.mkdir()
    monkeypatch.setattr(packed_files, "reduced_pixels", real)
    capfd.readouterr()
    dataset, _ = dataset_of(params)
    assert "packing 7 images" in capfd.readouterr().out and not leftover.exists()
    assert (dataset.packed_pixels.part >= 0).all()


def test_truncated_part_is_packed_again(params, tmp_path):
    dataset_of(params)
    (part,) = parts(tmp_path)
    os.truncate(part / packed_files.PIXEL_FILE, 100)
    dataset, _ = dataset_of(params)
    assert dataset.packed_pixels(N - 1) is not None and len(parts(tmp_path)) == 2


def test_too_little_space_is_refused(params, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(1000))
    with pytest.raises(ValueError, match="pack_images=True: 12 images .* GB are free"):
        dataset_of(params)
    assert not parts(tmp_path)


def pack_in_process(rank: int, fields: dict) -> list[str]:
    dataset, _ = dataset_of(ModelParams(**fields))
    assert (dataset.packed_pixels.part >= 0).all()
    return [str(file) for file in dataset.packed_pixels.files]


def test_two_processes_pack_once(params, tmp_path):
    files, files_of_other = processes.run(pack_in_process, 2, tmp_path / "two", attrs.asdict(params))
    assert files == files_of_other and len(parts(tmp_path)) == 1
