"""Features of a directory, neighbors and a map, on files of real photographs and scans of digits."""

import base64
import hashlib
import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import attrs
import numpy as np
import processes
import pyarrow.parquet as pq
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import LONG, save_checkpoint
from PIL import ExifTags, Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.manifold import trustworthiness
from sklearn.neighbors import NearestNeighbors
from torch import nn
from videos import write_video

from moco import SelfSupervisedMethod
from model_params import EncoderAndDataParams
from self_supervised import program
from self_supervised.data import data_sets
from self_supervised.embeddings import embed, job, map_page, nearest, parquet, sources
from self_supervised.embeddings import projection as embedding_map
from self_supervised.embeddings.sources import open_source
from self_supervised.networks import encoders
from self_supervised.networks.frozen_encoder import Encoder, Report
from self_supervised.networks.pretrained import load_encoder
from self_supervised.report import curves

N_DIGITS = 150
OPTIONS = {"batch_size": 16, "num_workers": 0, "device": "cpu"}


@pytest.fixture
def photos(tmp_path):
    """A directory with 24 crops of two photographs, nested, as JPEG and PNG."""
    folder = tmp_path / "photos"
    for name, photo in zip(("china", "flower"), load_sample_images().images, strict=True):
        for i in range(12):
            top, left = 30 * i, 40 * i
            file = folder / name / ("far" if i % 2 else "near") / (f"{i}.png" if i % 3 else f"{i}.JPEG")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo[top : top + 64, left : left + 80]).save(file)
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Scans of digits as files in class folders."""
    folder, source = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (image, label) in enumerate(zip(source.images[:N_DIGITS], source.target[:N_DIGITS], strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(np.round(image / 16 * 255).astype(np.uint8)).save(folder / str(label) / f"{i:04d}.png")
    return folder


@pytest.fixture
def checkpoint(small, tmp_path):
    return save_checkpoint(SelfSupervisedMethod(small()), tmp_path / "small.ckpt")


def tiny(size: int = 32, dataset: str = "imagenet", seed: int = 0) -> Encoder:
    """A convolution as an encoder of photographs: [N, 3, size, size] -> [N, 64]."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 16, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    params = EncoderAndDataParams(encoder_arch="module", dataset_name=dataset, transform_crop_size=size)
    return with_report(model, params, f"tiny {seed}")


def with_report(model: nn.Module, params: EncoderAndDataParams, source: str) -> Encoder:
    return Encoder(model, params, Report(source, "module", "module", len(model.state_dict()), ()))


def run_command(monkeypatch, command, *arguments) -> str:
    """Run a command and return its error message, "" if there is none."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    try:
        command.main()
    except SystemExit as end:
        return str(end)
    return ""


# ---- embeddings ----


def test_photographs_are_embedded_as_the_encoder_sees_them(photos, tmp_path):
    encoder = tiny()
    embed.embed(encoder, photos, tmp_path / "f.parquet", batch_size=7, num_workers=2, device="cpu")
    paths, embeddings, labels = parquet.read_embeddings(tmp_path / "f.parquet")
    assert paths == sorted(str(file.relative_to(photos)) for file in photos.rglob("*.*"))
    assert embeddings.dtype == np.float32 and embeddings.shape == (24, 64) and set(labels) == {None}
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    for path, embedding in zip(paths, embeddings, strict=True):
        square = Image.open(photos / path).resize((32, 32), Image.Resampling.BILINEAR, box=(12, 4, 68, 60))
        x = (np.asarray(square).transpose(2, 0, 1) / 255 - mean) / std
        expected = encoder.model.double()(torch.from_numpy(x)[None])[0].numpy()
        encoder.model.float()
        assert np.allclose(embedding, expected, atol=1e-4), path


def test_digits_in_class_folders(digits, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"
    assert run_command(monkeypatch, embed, checkpoint, digits, "--out", out, "--num_workers", 0) == ""
    paths, embeddings, labels = parquet.read_embeddings(out)
    pixels = np.stack([np.asarray(Image.open(digits / path)) for path in paths])
    expected = load_encoder(checkpoint).embed(torch.from_numpy(pixels)[:, None])
    no_images = load_encoder(checkpoint).embed(torch.empty(0, 1, 30, 20, dtype=torch.uint8))
    assert no_images.shape == (0, expected.shape[1])
    assert np.allclose(embeddings, expected, atol=1e-4 * expected.abs().max())
    assert labels == [str(load_digits().target[int(Path(path).stem)]) for path in paths]
    schema = pq.read_schema(out)
    assert [str(field.type) for field in schema][::2] == ["string", "string"]
    assert str(schema.field("embedding").type) == f"fixed_size_list<element: float>[{expected.shape[1]}]"
    about = json.loads(schema.metadata[b"self_supervised"])
    assert about["sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert about["checkpoint"] == str(checkpoint) and about["images"] == str(digits)
    assert about["preprocessing"]["size"] == 8 and about["versions"]["torch"] == torch.__version__


def test_labels_of_a_directory_are_those_that_are_asked_for(photos, tmp_path):
    (photos / "extra.png").write_bytes((photos / "china/near/2.png").read_bytes())
    kinds = {"first_folder": {"china", "flower", None}, "last_folder": {"near", "far", None}, None: {None}}
    for labels_from, expected in kinds.items():
        out = embed.embed(tiny(), photos, tmp_path / "f.parquet", labels_from=labels_from, overwrite=True, **OPTIONS)
        paths, _, labels = parquet.read_embeddings(out)
        assert set(labels) == expected and labels[paths.index("extra.png")] is None
        assert parquet.facts_of_file(out)["columns"] == {"labels_from": labels_from}
    with pytest.raises(ValueError, match="columns was {'labels_from': None}, is now {}"):
        embed.embed(tiny(), photos, out, **OPTIONS)
    with pytest.raises(ValueError, match="labels_from='first'"):
        embed.embed(tiny(), photos, tmp_path / "g.parquet", labels_from="first", **OPTIONS)
    with pytest.raises(ValueError, match="label_key: no effect"):
        embed.embed(tiny(), photos, out, labels_from=None, label_key="a", **OPTIONS)


@pytest.mark.slow
def test_a_fact_that_a_file_lacks_is_an_option(photos, tmp_path, monkeypatch):
    """As in the other programs: this file does not say which stem its ResNet had."""
    params = EncoderAndDataParams(encoder_arch="resnet18", dataset_name="cifar10", stem_variant="no_relu")
    torch.save(encoders.get_encoder(params)[0].state_dict(), tmp_path / "cifar.pt")
    found = {}
    for stem in ("standard", "no_relu"):
        out = tmp_path / f"{stem}.parquet"
        facts = ["--dataset_name", "cifar10", "--stem_variant", stem]
        assert run_command(monkeypatch, embed, tmp_path / "cifar.pt", photos, "--out", out, *facts) == ""
        expected = load_encoder(tmp_path / "cifar.pt", dataset_name="cifar10", stem_variant=stem)
        embed.embed(expected, photos, tmp_path / "expected.parquet", device="cpu", overwrite=True)
        found[stem] = parquet.read_embeddings(out)[1]
        np.testing.assert_allclose(found[stem], parquet.read_embeddings(tmp_path / "expected.parquet")[1], rtol=1e-5)
    assert not np.allclose(*found.values())


def test_a_link_to_a_checkpoint_is_recorded_as_the_link(digits, checkpoint, tmp_path, monkeypatch):
    """Its target may have no name that says what it is, as in the cache of the hub."""
    (tmp_path / "link.ckpt").symlink_to(checkpoint)
    out = tmp_path / "f.parquet"
    assert run_command(monkeypatch, embed, tmp_path / "link.ckpt", digits, "--out", out, "--num_workers", 0) == ""
    assert parquet.facts_of_file(out)["checkpoint"] == str(tmp_path / "link.ckpt")


def test_a_packed_data_set_by_name_and_its_images_as_files_have_the_same_embeddings(checkpoint, tmp_path):
    embed.embed(checkpoint, "digits/test", tmp_path / "packed.parquet", device="cpu")
    images, labels = data_sets.get_dataset(load_encoder(checkpoint).params, ("test",)).__getitems__(range(500))
    for i, image in enumerate(images):
        file = tmp_path / "test" / f"{i:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image[0].numpy()).save(file)
    embed.embed(checkpoint, tmp_path / "test", tmp_path / "files.parquet", device="cpu")
    packed, files = (
        parquet.read_embeddings(tmp_path / "packed.parquet"),
        parquet.read_embeddings(tmp_path / "files.parquet"),
    )
    assert np.array_equal(packed[1], files[1])
    assert packed[2] == [str(int(label)) for label in labels]
    assert packed[0] == [f"test/{i:03d}" for i in range(500)]
    assert len(open_source("digits").paths()) == 1797


def test_a_file_of_an_earlier_version_is_extended_only_if_its_preprocessing_agrees(checkpoint, tmp_path):
    file = embed.embed(checkpoint, "digits/test", tmp_path / "f.parquet", exif_orientation=False, **OPTIONS)
    about = parquet.facts_of_file(file)
    record = about["preprocessing"]
    for part in (record["central_crop"], 7 / 8):
        about["preprocessing"] = {"central square, of the shorter side": part}
        about["preprocessing"] |= {name: record[name] for name in ("size", "channels", "mean", "std")}
        metadata = {b"self_supervised": json.dumps(about)}
        pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)
        if part == 1:
            embed.embed(checkpoint, "digits/test", file, exif_orientation=False, **OPTIONS)
            with pytest.raises(ValueError, match="'exif_orientation': False.* is now .*'exif_orientation': True"):
                embed.embed(checkpoint, "digits/test", file, **OPTIONS)
    with pytest.raises(ValueError, match=r"preprocessing was .*'central_crop': 0.875.* is now .*'central_crop': 1.0"):
        embed.embed(checkpoint, "digits/test", file, exif_orientation=False, **OPTIONS)


def test_a_data_set_in_place_of_the_folder_is_not_a_setting_of_the_encoder():
    named, by_option = (
        embed.embed_options(["x.ckpt", *more, "--out", "f.parquet"])
        for more in (["digits"], ["--dataset_name", "digits"])
    )
    assert named == by_option
    both = embed.embed_options(["x.ckpt", "photos", "--dataset_name", "digits", "--out", "f.parquet"])
    assert (both.folder, both.dataset_name) == ("photos", "digits")


def test_order_links_extensions_and_skipped_files(tmp_path):
    folder = tmp_path / "images"
    for name in ("a/1.png", "a-b/1.png", "a/Ä.webp", "b.gif", ".hidden.png", ".cache/1.png", "é/deep/1.bmp", "x.PNG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), "red").save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / "a" / "up").symlink_to(folder)  # an endless loop
    (folder / "linked").symlink_to(folder / "a-b")
    source = open_source(folder)
    expected = ["a-b/1.png", "a/1.png", "a/Ä.webp", "b.gif", "x.PNG", "é/deep/1.bmp"]
    assert source.paths() == expected
    counts = {reason: n for reason, (n, _) in source.passed_over.items()}
    assert counts == {".txt": 1, "hidden": 2, "links to folders that were already searched": 2}
    embed.embed(tiny(), folder, tmp_path / "f.parquet", device="cpu")
    assert parquet.read_embeddings(tmp_path / "f.parquet")[0] == expected
    assert source.paths_of(folder / "linked" / "1.png") == ["linked/1.png", "a-b/1.png"]
    (tmp_path / "pick.png").symlink_to(folder / "a" / "1.png")
    assert source.paths_of(tmp_path / "pick.png") == ["a/1.png"] and source.paths_of(tmp_path / "f") == []


def test_arrays_are_embedded_as_they_are_read_in_training_and_shown(tmp_path):
    """Whatever the encoder was trained on, from files and from a shard; five channels, floats above 1."""
    rng = np.random.default_rng(0)
    arrays = {f"{label}/{i}.npy": rng.normal(size=(5, 20, 30)).astype(np.float32) for label in "ab" for i in range(4)}
    for name, pixels in arrays.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "set" / name, pixels)
    shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path / "set", ".")
    p = EncoderAndDataParams(
        encoder_arch="module", dataset_name="folder", data_path=str(tmp_path / "set"), in_channels=5,
        transform_crop_size=16, pixel_range=[-3, 3], val_size=0, test_size=0,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = with_report(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(20, 6)), p, "five")
    images = torch.stack([image for image, _ in data_sets.get_dataset(p, ("train",))])
    for root, prefix in ((tmp_path / "set", ""), (tmp_path / "train.tar", "train.tar/")):
        out = tmp_path / "f.parquet"
        embed.embed(encoder, root, out, device="cpu", num_workers=0, overwrite=True)
        paths, found, labels = parquet.read_embeddings(out)
        assert paths == [f"{prefix}{name}" for name in arrays]
        np.testing.assert_allclose(found, encoder.embed(images), atol=1e-6)
        source = open_source(str(root))
        assert source.picture(paths[0]).size == (30, 20) and source.picture(paths[0], side=8).mode == "RGB"
    nearest.nearest_sheet(out, paths[:1], tmp_path / "n.png", k=2)
    page = map_page.as_html(map_page.Map("", "", paths, np.zeros((8, 2)), np.zeros(8, int), ["a"]), source, 10**6)
    assert page.count("data:image/jpeg;base64,") == 8


def test_pictures_of_any_values_are_scaled_to_be_seen(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = np.arange(600, dtype=np.float32).reshape(20, 30) * 5  # of 12 bits
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "gray_16.png")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(values.astype(np.uint16).T[::-1]).save(tmp_path / "turned.png", exif=turned)
    Image.fromarray(values).save(tmp_path / "float.tif")
    tifffile.imwrite(
        tmp_path / "bands.tif", np.repeat(values[..., None], 12, 2).astype(np.uint16), photometric="minisblack"
    )
    tifffile.imwrite(tmp_path / "pages.tif", np.repeat(values[None], 5, 0).astype(np.uint8), photometric="minisblack")
    Image.fromarray(np.full((20, 30, 3), (250, 100, 0), np.uint8)).save(tmp_path / "color.tif")
    shutil.make_archive(str(tmp_path / "train"), "tar", tmp_path, ".")
    for source, prefix in ((open_source(str(tmp_path / "train.tar")), "train.tar/"), (sources.Folder(tmp_path), "")):
        for name in ("gray_16.png", "turned.png", "float.tif", "bands.tif", "pages.tif"):
            pixels = np.asarray(source.picture(prefix + name))
            assert pixels.shape == (20, 30, 3) and pixels.min() == 0 and pixels.max() == 255, name
        upright, kept = (source.picture(f"{prefix}{name}.png") for name in ("turned", "gray_16"))
        assert np.array_equal(upright, kept)
        assert np.asarray(source.picture(f"{prefix}color.tif"))[0, 0].tolist() == [250, 100, 0]


def test_patterns_of_the_pretraining_select_the_images(photos, tmp_path, capsys):
    for path in list(photos.rglob("*.png")):
        shutil.copy(path, path.with_name(f"{path.stem}_mask.png"))
    names = sorted(path.relative_to(photos).as_posix() for path in photos.rglob("*") if path.is_file())
    images = [name for name in names if "_mask" not in name]
    encoder, out = tiny(dataset="folder"), tmp_path / "f.parquet"
    encoder.params = attrs.evolve(encoder.params, exclude_patterns=["*_mask.png"])
    embed.embed(encoder, photos, out, **OPTIONS)
    assert parquet.paths_in(out) == images and len(names) > len(images)
    assert f"{len(names) - len(images)} by exclude_patterns=['*_mask.png'] (such as" in capsys.readouterr().out
    embed.embed(encoder, photos, out, exclude_patterns=None, overwrite=True, **OPTIONS)
    assert parquet.paths_in(out) == names
    shutil.make_archive(str(tmp_path / "train"), "tar", photos, ".")
    embed.embed(encoder, tmp_path / "train.tar", out, overwrite=True, **OPTIONS)
    assert parquet.paths_in(out) == [f"train.tar/{name}" for name in images]
    wrong = {"include_patterns='cats/x' matches none of the": ["cats/x"], "must be a list of strings": "*.png"}
    for message, patterns in wrong.items():
        with pytest.raises(ValueError, match=message):
            embed.embed(encoder, photos, out, include_patterns=patterns, **OPTIONS)
    encoder.params = attrs.evolve(encoder.params, include_patterns=["train/*"])
    with pytest.raises(
        ValueError, match=r"include_patterns=\['train/\*'\].* is selected. Pass other patterns, or none"
    ):
        embed.embed(encoder, photos, out, overwrite=True, **OPTIONS)
    with pytest.raises(ValueError, match="exclude_patterns: images in digits/test have no names to match"):
        embed.embed(encoder, "digits/test", out, exclude_patterns=["a"], overwrite=True, **OPTIONS)


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere", "neither a directory nor"),
        ("digits/valid", "no split 'valid'"),
        (".", "holds no images"),
        ("notes.txt", "notes.txt is a file. Pass its directory"),
    ],
)
def test_sources_without_images_are_refused(name, message, tmp_path, checkpoint, monkeypatch):
    Path("notes.txt").write_text("no image")
    assert message in run_command(monkeypatch, embed, checkpoint, name, "--out", tmp_path / "out" / "f.parquet")
    assert list(tmp_path.glob("out/*")) == []


# ---- interrupted and resumed ----

KILLED_AT = [("before", 0), ("after", 0), ("before", 2), ("after", 3), ("before", 5), ("after", 5)]


def in_a_fork(function, *args) -> int:
    """Run a function in a forked process and return its exit status."""
    if (child := os.fork()) == 0:
        try:
            function(*args)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def embed_until_killed(checkpoint: str, folder: str, out: Path, when: str, n: int) -> None:
    """Embed, and kill the process with SIGKILL right before or after the n-th file is renamed."""
    replace, named = os.replace, []

    def replace_and_die(old, new):
        if when == "before" and len(named) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)
        if when == "after" and len(named) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        named.append(new)

    os.replace, job.ROWS = replace_and_die, 32
    embed.embed(checkpoint, folder, out, **OPTIONS)


def be_killed(_: int, checkpoint: str, folder: str, out: str) -> list[int]:
    return [
        in_a_fork(embed_until_killed, checkpoint, folder, Path(out, f"{when}{n}.parquet"), when, n)
        for when, n in KILLED_AT
    ]


@pytest.mark.slow
def test_a_job_killed_at_any_moment_resumes_to_the_same_file(digits, checkpoint, tmp_path, monkeypatch):
    """150 images in parts of 32: five parts are renamed, then the file itself."""
    (ends,) = processes.run(be_killed, 1, tmp_path / "processes", str(checkpoint), str(digits), str(tmp_path))
    assert ends == [signal.SIGKILL] * len(KILLED_AT)
    uninterrupted = embed.embed(checkpoint, digits, tmp_path / "whole.parquet", **OPTIONS).read_bytes()
    seen = count_images(monkeypatch)
    for when, n in KILLED_AT:
        out = tmp_path / f"{when}{n}.parquet"
        assert out.exists() == ((when, n) == ("after", 5))
        assert len(list(out.with_name(f"{out.name}.parts").glob("*.parquet"))) == min(n + (when == "after"), 5)
        seen.clear()
        assert embed.embed(checkpoint, digits, out, **OPTIONS).read_bytes() == uninterrupted
        assert sum(seen) == N_DIGITS - min(32 * (n + (when == "after")), N_DIGITS)
    assert {file.suffix for file in tmp_path.iterdir()} == {".parquet", ".ckpt", ""}  # no temporary files are left


def count_images(monkeypatch) -> list[int]:
    """Return a list to which each call of `Encoder.embed` adds its number of images."""
    seen, original = [], Encoder.embed
    monkeypatch.setattr(Encoder, "embed", lambda self, images: (seen.append(len(images)), original(self, images))[1])
    return seen


def test_a_finished_file_is_kept_and_updated_for_new_and_removed_images(photos, tmp_path, monkeypatch, capsys):
    out, encoder = tmp_path / "f.parquet", tiny()
    embed.embed(encoder, photos, out, device="cpu")
    paths, embeddings, _ = parquet.read_embeddings(out)
    written = out.stat().st_mtime_ns
    seen = count_images(monkeypatch)
    capsys.readouterr()
    embed.embed(encoder, photos, out, device="cpu")
    assert "complete and unchanged" in capsys.readouterr().out and out.stat().st_mtime_ns == written and seen == []
    (photos / paths[3]).rename(photos / "china" / "0new.png")  # sorted before and after existing images
    (photos / paths[5]).unlink()
    Image.new("RGB", (50, 40), "red").save(photos / "zebra.png")
    monkeypatch.setattr(parquet, "ROWS", 10)
    embed.embed(encoder, photos, out, device="cpu")
    assert "24 embeddings, 2 images are new, 2 are gone" in capsys.readouterr().out
    now, changed, labels = parquet.read_embeddings(out)
    assert now == sorted({*paths, "china/0new.png", "zebra.png"} - {paths[3], paths[5]}) and sum(seen) == 2
    for path, row in zip(now, changed, strict=True):
        if path in paths:
            assert np.array_equal(row, embeddings[paths.index(path)])
    assert np.allclose(changed[now.index("china/0new.png")], embeddings[3], atol=1e-5)


def test_another_checkpoint_or_folder_is_refused_unless_told_to_overwrite(photos, digits, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"
    before = embed.embed(tiny(), photos, out, device="cpu").read_bytes()
    for other, folder, word in [
        (tiny(seed=1), photos, "sha256"),
        (tiny(), digits, "images"),
        (tiny(40), photos, "size"),
    ]:
        with pytest.raises(ValueError, match=f"was created with different settings .*{word}.*--overwrite"):
            embed.embed(other, folder, out, device="cpu")
    assert out.read_bytes() == before
    embed.embed(tiny(seed=1), photos, out, device="cpu", overwrite=True)
    embed.embed(tiny(seed=1), photos, tmp_path / "g.parquet", device="cpu")
    assert out.read_bytes() == (tmp_path / "g.parquet").read_bytes() != before


def with_facts(file: Path, **facts) -> None:
    """Change the metadata of a file of features."""
    metadata = {b"self_supervised": json.dumps(parquet.facts_of_file(file) | facts)}
    pq.write_table(pq.read_table(file).replace_schema_metadata(metadata), file)


def test_shards_are_the_same_by_every_spelling_of_their_path(photos, tmp_path, monkeypatch, capsys):
    shutil.make_archive("shards/train", "tar", photos)
    file = embed.embed(tiny(), "shards", tmp_path / "f.parquet", **OPTIONS)
    assert parquet.facts_of_file(file)["images"] == str(tmp_path / "shards")
    (tmp_path / "elsewhere").mkdir()
    for folder, stored in (
        ("shards/", str(tmp_path / "shards")),
        ("shards", "shards"),
        ("../shards", str(tmp_path / "shards")),
    ):
        with_facts(file, images=stored)  # the second as in an earlier version
        if folder.startswith(".."):
            monkeypatch.chdir(tmp_path / "elsewhere")
        capsys.readouterr()
        embed.embed(tiny(), folder, file, **OPTIONS)
        assert "complete and unchanged" in capsys.readouterr().out
    shutil.make_archive("shards/train", "tar", photos)  # another data set of this name
    with pytest.raises(ValueError, match="images was .*shards, is now .*elsewhere/shards"):
        embed.embed(tiny(), "shards", file, **OPTIONS)
    shutil.rmtree("shards")
    path = parquet.paths_in(file)[0]
    assert run_command(monkeypatch, nearest, file, path) == ""
    with_facts(file, images="shards")
    assert (
        "error: shards is neither" in (error := run_command(monkeypatch, nearest, file, path)) and "--folder" in error
    )
    (tmp_path / "shards" / "train.tar").unlink()  # another shard takes its place, without some of the images
    shutil.rmtree(photos / "china")
    shutil.make_archive(str(tmp_path / "shards" / "train"), "tar", photos)
    assert run_command(monkeypatch, nearest, file, path, "--folder", tmp_path / "shards") == ""
    assert f"{path}: its picture cannot be shown (" in capsys.readouterr().out
    embedding_map.make_map(file, [Path("map.html")], folder=str(tmp_path / "shards"))
    assert 0 < sum(map(bool, data_of(Path("map.html"))["pictures"])) < 24


def test_numbered_images_that_were_written_again_are_refused(photos, tmp_path, monkeypatch, capsys):
    """Rows and keys are numbers, so the same paths may be other images."""
    datasets = pytest.importorskip("datasets")
    files = sorted(str(file) for file in photos.rglob("*.*"))

    def save(rows: list[str]) -> None:
        datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image()).save_to_disk(tmp_path / "hf")

    save(files[:6])
    made = embed.embed(tiny(), tmp_path / "hf", tmp_path / "hf.parquet", **OPTIONS)
    before = made.read_bytes()
    embed.embed(tiny(), tmp_path / "hf", made, **OPTIONS)
    shutil.rmtree(tmp_path / "hf")
    save(files[3:6])
    with pytest.raises(ValueError, match=r"different settings or images \(.*hf has been written again\).*--overwrite"):
        embed.embed(tiny(), tmp_path / "hf", made, **OPTIONS)
    assert made.read_bytes() == before
    capsys.readouterr()
    assert run_command(monkeypatch, nearest, made, "0") == ""
    assert "warning: " in (said := capsys.readouterr().out) and "hf has been written again: pictures may not" in said
    embed.embed(tiny(), tmp_path / "hf", made, overwrite=True, **OPTIONS)
    assert run_command(monkeypatch, nearest, made, "0") == ""
    assert "written again" not in capsys.readouterr().out
    assert len(parquet.paths_in(made)) == 3

    shards = tmp_path / "shards"
    shutil.make_archive(str(shards / "a"), "tar", photos / "china")
    out = embed.embed(tiny(), shards, tmp_path / "s.parquet", **OPTIONS)
    shutil.make_archive(str(shards / "b"), "tar", photos / "flower")  # a new shard extends the file
    embed.embed(tiny(), shards, out, **OPTIONS)
    assert len(parquet.paths_in(out)) == 24 and [*parquet.facts_of_file(out)["contents"]] == ["a.tar", "b.tar"]
    shutil.make_archive(str(shards / "a"), "tar", photos / "flower")
    with pytest.raises(ValueError, match=r"\(a.tar has been written again\)"):
        embed.embed(tiny(), shards, out, **OPTIONS)


def test_unreadable_images_stop_or_are_listed(photos, tmp_path, capsys):
    out, bad = tmp_path / "f.parquet", photos / "china" / "near" / "2.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:300])
    options = {**OPTIONS, "batch_size": 4}
    with pytest.raises(ValueError, match="china/near/2.png in .* could not be read .*--skip_unreadable"):
        embed.embed(tiny(), photos, out, **options)
    assert not out.exists() and out.with_name("f.parquet.parts").is_dir()  # earlier batches are kept
    embed.embed(tiny(), photos, out, skip_unreadable=True, **options)
    assert "1 unreadable images were left out" in capsys.readouterr().out
    assert parquet.count_rows(out) == 23 and list(parquet.facts_of_file(out)["unreadable"]) == ["china/near/2.png"]
    embed.embed(tiny(), photos, out, skip_unreadable=True, **options)
    assert "complete and unchanged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="china/near/2.png"):
        embed.embed(tiny(), photos, out, **options)
    bad.write_bytes(good)
    embed.embed(tiny(), photos, out, **options)
    assert parquet.count_rows(out) == 24 and parquet.facts_of_file(out)["unreadable"] == {}
    for file in photos.rglob("*.*"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 24 images in .* read, such as china/far/1.png \([^)]*\). Fix"):
        embed.embed(tiny(), photos, tmp_path / "g.parquet", skip_unreadable=True, **options)


def test_overwriting_resumes_only_what_was_overwriting(photos, tmp_path, monkeypatch, capsys):
    bad, seen = photos / "flower" / "near" / "8.png", count_images(monkeypatch)  # in the last batch of 4
    good = bad.read_bytes()
    bad.write_bytes(b"")
    for overwrite, n in ((False, 20), (True, 40), (True, 44)):
        with nullcontext() if n == 44 else pytest.raises(ValueError, match="8.png"):
            embed.embed(tiny(), photos, tmp_path / "f.parquet", **OPTIONS | {"batch_size": 4}, overwrite=overwrite)
        assert sum(seen) == n
        said = re.findall(r"(\d+) embeddings of an interrupted --overwrite are kept", capsys.readouterr().out)
        assert said == (["20"] if n == 44 else [])
        if n == 40:
            bad.write_bytes(good)


def test_a_name_with_a_colon_is_no_url_and_files_of_others_stay(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = tmp_path / "run:1.parquet.parts" / "notes.txt"
    others.parent.mkdir()
    others.write_text("mine")
    out = embed.embed(tiny(), photos, "run:1.parquet", **OPTIONS)
    assert others.read_text() == "mine" and len(parquet.read_embeddings(out)[0]) == parquet.count_rows(out) > 0


def embed_and_measure(folder: Path) -> None:
    """Embed, and write the peak memory of the process in kB to a file."""
    job.ROWS = parquet.ROWS = 64
    params = EncoderAndDataParams(encoder_arch="module", dataset_name="imagenet")
    model = nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(3072, 512))
    embed.embed(with_report(model, params, "mean"), folder, folder.with_suffix(".parquet"), **OPTIONS)
    folder.with_suffix(".peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def measure(_: int, folder: str) -> list[int]:
    return [in_a_fork(embed_and_measure, Path(folder, n)) for n in ("200", "1000")]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    """800 more images of 224 x 224 pixels would take 120 MB."""
    Image.fromarray(load_sample_images().images[0]).resize((64, 64)).save(tmp_path / "one.jpg")
    for n in (200, 1000):
        (tmp_path / str(n)).mkdir()
        for i in range(n):
            (tmp_path / str(n) / f"{i}.jpg").hardlink_to(tmp_path / "one.jpg")
    assert processes.run(measure, 1, tmp_path / "processes", str(tmp_path)) == [[0, 0]]
    few, many = (int((tmp_path / f"{n}.peak").read_text()) for n in (200, 1000))
    assert many - few < 60_000, (few, many)  # kB; 37 MB were seen once


def test_only_one_process_writes_a_file(photos, tmp_path, holder):
    holder(tmp_path / "f.parquet.parts")
    with pytest.raises(ValueError, match="f.parquet.parts is in use by process"):
        embed.embed(tiny(), photos, tmp_path / "f.parquet", device="cpu")


def test_invalid_arguments_are_refused(photos, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "f.parquet"
    arguments = [checkpoint, photos, "--out", out]
    assert "batch_size=0" in run_command(monkeypatch, embed, *arguments, "--batch_size", 0)
    assert "device='abacus': cannot be used" in run_command(monkeypatch, embed, *arguments, "--device", "abacus")
    out.write_text("something else")
    assert "is not a Parquet file" in run_command(monkeypatch, embed, *arguments)
    broken = tiny()
    broken.model[0].bias[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        embed.embed(broken, photos, tmp_path / "g.parquet", device="cpu")
    with pytest.raises(ValueError, match="image_mean: an Encoder keeps its own settings"):
        embed.embed(tiny(), photos, tmp_path / "g.parquet", device="cpu", image_mean=[0.5])


def test_a_missing_package_is_named_where_it_is_needed(monkeypatch):
    """Reports and the demo import the search for neighbors, which needs no file."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    needed = runpy.run_path(parquet.__file__)["schema"]
    with pytest.raises(ImportError, match="pip install pyarrow"):
        needed(1, {})


# ---- neighbors ----


@pytest.fixture
def features(digits, checkpoint, tmp_path, capsys):
    out = embed.embed(checkpoint, digits, tmp_path / "features.parquet", num_workers=0, device="cpu")
    capsys.readouterr()
    return out


def test_neighbors_are_those_of_scikit_learn(features, monkeypatch):
    monkeypatch.setattr(parquet, "ROWS", 40)  # multiple pieces
    paths, x, _ = parquet.read_embeddings(features)
    own = [paths[i] for i in (3, 77, 149)]
    found = nearest.nearest_rows(features, x[[3, 77, 149]], k=9, own=own)
    distances, rows = (
        NearestNeighbors(n_neighbors=10, metric="cosine").fit(x.astype(np.float64)).kneighbors(x[[3, 77, 149]])
    )
    for query, expected, distance in zip(found, rows[:, 1:], distances[:, 1:], strict=True):
        assert np.allclose([n.cosine for n in query], 1 - distance, atol=1e-5)
        assert {n.path for n in query} == {paths[i] for i in expected}
        assert all(n.path.startswith(f"{n.label}/") for n in query)


def test_an_image_finds_its_own_copy_first(digits, features, tmp_path, monkeypatch, capsys):
    copy, out = tmp_path / "copy.png", tmp_path / "sheet" / "nearest.png"
    copy.write_bytes((digits / "7" / "0007.png").read_bytes())
    images = [copy, "7/0007.png", digits / "3" / "0003.png"]
    assert run_command(monkeypatch, nearest, features, *images, "--out", out, "-k", 8) == ""
    tables = capsys.readouterr().out.split("\n\n")
    assert tables[0].splitlines()[0] == str(copy) and tables[0].splitlines()[2].split() == [
        "1",
        "1.0000",
        "7",
        "7/0007.png",
    ]
    assert [table.splitlines()[0] for table in tables[1:3]] == ["7/0007.png (7)", "3/0003.png (3)"]
    assert "7/0007.png" not in tables[1].split("\n", 1)[1]
    height, width, _ = np.asarray(Image.open(out)).shape
    assert width > 7 * nearest.PICTURE_SIDE and height > 6 * nearest.PICTURE_SIDE  # three queries, two lines each


def test_a_file_is_not_taken_for_a_row_of_the_same_path(digits, features, monkeypatch, capsys):
    Path("7").mkdir()
    shutil.copy(digits / "3" / "0003.png", "7/0007.png")
    assert run_command(monkeypatch, nearest, features, "7/0007.png", "-k", 1) == ""
    assert capsys.readouterr().out.splitlines()[2].split() == ["1", "1.0000", "3", "3/0003.png"]
    assert parquet.rows_of_ids(features, []) == {}


def test_a_picture_that_is_gone_is_left_empty(digits, features, tmp_path, monkeypatch, capsys):
    moved = shutil.copytree(digits, tmp_path / "moved")
    (moved / "7" / "0007.png").unlink()
    arguments = [features, "7/0007.png", "--folder", moved, "--out", tmp_path / "sheet.png"]
    assert run_command(monkeypatch, nearest, *arguments) == ""
    assert "7/0007.png: its picture cannot be shown (" in capsys.readouterr().out


def test_videos_are_shown_also_if_their_directory_holds_features(tmp_path, monkeypatch, capsys):
    paths = [write_video(tmp_path / "videos" / f"{i}.mp4", n=2).name for i in range(4)]
    about = {"images": str(tmp_path / "videos"), "preprocessing": {"num_frames": 8}, "columns": {}}
    about |= {"encoder_arch": "r3d_18", "checkpoint": "x.ckpt"}
    file = tmp_path / "videos" / "features.parquet"
    parquet.write_part(file, paths, np.eye(4, dtype=np.float32), about)
    assert run_command(monkeypatch, nearest, file, "0.mp4") == ""
    embedding_map.make_map(file, [Path("map.html")])
    assert all(data_of(Path("map.html"))["pictures"]) and "cannot be shown" not in capsys.readouterr().out


def test_nearest_overwrites_no_file_that_it_reads(features, digits, tmp_path, monkeypatch):
    query = shutil.copy(digits / "7/0007.png", tmp_path / "query.png")
    for read in (features, query):
        before = Path(read).read_bytes()
        found = run_command(monkeypatch, nearest, features, query, "--out", read)
        assert "this file is read, and would be overwritten" in found and Path(read).read_bytes() == before


def test_a_corrupt_array_is_named_or_shown_as_an_empty_picture(photos, tmp_path, monkeypatch, capsys):
    """NumPy raises a tokenizer's error for a corrupt header."""
    np.save(photos / "array.npy", np.zeros((40, 40, 3), np.uint8))
    file = embed.embed(tiny(), photos, tmp_path / "f.parquet", device="cpu")
    corrupt = b"\x93NUMPY\x01\x00\x10\x00{'descr': '|u1', ("
    (photos / "array.npy").write_bytes(corrupt)
    (tmp_path / "query.npy").write_bytes(corrupt)
    monkeypatch.setattr(nearest, "load_encoder", lambda *args, **more: tiny())
    error = run_command(monkeypatch, nearest, file, tmp_path / "query.npy", "--out", tmp_path / "n.png")
    assert "query.npy could not be read as an image" in error
    assert run_command(monkeypatch, nearest, file, "array.npy", "--out", tmp_path / "n.png", "-k", 1) == ""
    assert "array.npy: its picture cannot be shown" in capsys.readouterr().out


def test_nearest_refuses_what_has_no_embedding(features, digits, small, tmp_path, monkeypatch):
    assert "neither a file nor the path of a row" in run_command(monkeypatch, nearest, features, "7/nothing.png")
    other, copy = tmp_path / "other.ckpt", tmp_path / "copy.png"
    save_checkpoint(SelfSupervisedMethod(small(seed=1)), other)
    copy.write_bytes((digits / "7" / "0007.png").read_bytes())
    message = run_command(monkeypatch, nearest, features, copy, "--checkpoint", other)
    assert "is not the checkpoint of" in message
    assert "k=0" in run_command(monkeypatch, nearest, features, "7/0007.png", "-k", 0)
    assert "there is no file" in run_command(monkeypatch, nearest, tmp_path / "no.parquet", copy)


def test_a_contact_sheet_keeps_proportions():
    wide, small = Image.new("RGB", (600, 200), "#ff0000"), Image.new("L", (8, 4), 0)
    lead = nearest.Tile(wide, "query", "", ("a/very/long/path" * 9,), nearest.LEAD_COLOR)
    sheet = nearest.neighbor_sheet([(lead, [nearest.Tile(small, "1", "0.9", ("b",))] * 8)])
    pixels = np.asarray(sheet)
    ys, xs = np.nonzero((pixels == (255, 0, 0)).all(2))
    assert np.ptp(xs) + 1 == nearest.PICTURE_SIDE and np.ptp(ys) + 1 == round(nearest.PICTURE_SIDE / 3)
    assert nearest.fitted(small).size == (176, 88)
    line = nearest.shortened("a/very/long/path" * 9)
    assert (
        line.startswith("…")
        and line.endswith("long/path")
        and nearest.PLAIN_FONT.getlength(line) <= nearest.PICTURE_SIDE
    )


# ---- map ----


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


@pytest.mark.parametrize(
    "method", ["tsne"] if LONG == 1 else embedding_map.METHODS
)  # compiling UMAP takes half a minute
def test_a_map_keeps_neighbors_and_is_reproducible(method, features):
    if method == "umap":
        pytest.importorskip("umap")
    _, x, _ = parquet.read_embeddings(features)
    points = embedding_map.project(x, method, seed=0)
    assert trustworthiness(x, points, n_neighbors=10, metric="cosine") > 0.9
    assert np.array_equal(points, embedding_map.project(x, method, seed=0))


def test_umap_that_is_not_installed_is_named(features, monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    assert "pip install umap-learn" in run_command(
        monkeypatch, embedding_map, features, "--method", "umap", "--out", "m.png"
    )


def test_the_page_is_self_contained(digits, features, tmp_path, monkeypatch):
    png, page = tmp_path / "map.png", tmp_path / "map.html"
    assert run_command(monkeypatch, embedding_map, features, "--out", png, page) == ""
    assert "://" not in page.read_text()
    content, (paths, _, labels) = data_of(page), parquet.read_embeddings(features)
    assert content["paths"] == paths and len(set(zip(content["x"], content["y"], strict=True))) == N_DIGITS
    assert [content["names"][kind] for kind in content["kind"]] == labels and len(set(content["colors"])) == 10
    assert min(content["x"] + content["y"]) >= 0 and max(content["x"] + content["y"]) <= 1
    for path, uri in zip(paths, content["pictures"], strict=True):
        seen = np.asarray(
            Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/jpeg;base64,")))).convert("L")
        )
        assert np.abs(seen.astype(float) - np.asarray(Image.open(digits / path))).mean() < 8, path
    drawn = np.asarray(Image.open(png).convert("RGB")).reshape(-1, 3)
    for color in content["colors"]:  # the legend shows them without transparency
        assert (drawn == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(1).any(), color


def test_samples_clusters_hostile_names_and_budgets(photos, tmp_path, monkeypatch, capsys):
    hostile = photos / "x<" / "script><b>" / "0.png"
    hostile.parent.mkdir(parents=True)
    Image.new("RGB", (500, 30), "red").save(hostile)
    features, page = embed.embed(tiny(), photos, tmp_path / "f.parquet", device="cpu"), tmp_path / "map.html"
    found = embedding_map.make_map(features, [page], n=25)
    assert "</script><b>" not in page.read_text() and data_of(page)["paths"][-1] == "x</script><b>/0.png"
    assert "no labels: colored by 10 k-means clusters" in data_of(page)["note"] and len(found.names) == 10
    paths, x, _ = parquet.read_embeddings(features)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    copy = tmp_path / "clusters.parquet"
    before = features.read_bytes()
    three = embedding_map.make_map(features, [page, copy], clusters=3)  # of all rows
    table = pq.read_table(copy)
    assert table.drop_columns("cluster").equals(pq.read_table(features)) and features.read_bytes() == before
    assert table["cluster"].to_pylist() == (three.kind + 1).tolist() and len(three.names) == 3
    assert parquet.read_embeddings(copy)[0] == paths and parquet.facts_of_file(copy) == parquet.facts_of_file(features)
    for kind, rows in enumerate(data_of(page)["examples"]):
        mean = unit[three.kind == kind].mean(0)
        of_kind = [(unit[i] @ mean, i) for i in np.flatnonzero(three.kind == kind)]
        assert [unit[i] @ mean for i in rows] == pytest.approx([one for one, _ in sorted(of_kind, reverse=True)][:4])
    for more, message in (({"clusters": 1}, "clusters=1"), ({}, "is the file of the embeddings")):
        with pytest.raises(ValueError, match=message):
            embedding_map.make_map(features, [features] if not more else [page], **more)
    monkeypatch.setattr(map_page, "BUDGET", 8000)
    part = embedding_map.make_map(features, [page], n=20, seed=3)
    assert len(set(part.paths)) == 20 and part.paths == sorted(part.paths)
    pictures = [uri for uri in data_of(page)["pictures"] if uri]
    assert 0 < len(pictures) < 20 and sum(map(len, pictures)) <= 8000
    photos.rename(tmp_path / "elsewhere")
    embedding_map.make_map(features, [page], n=20)
    assert "no pictures" in capsys.readouterr().out and not any(data_of(page)["pictures"])
    embedding_map.make_map(features, [page], n=20, folder=str(tmp_path / "elsewhere"))
    assert any(data_of(page)["pictures"])


def test_maps_of_many_classes_and_of_too_few_images(photos, tmp_path, monkeypatch):
    for n in (3, 10, 20, 21, 200):
        assert len(set(map_page.palette(n))) == n
    kind, names, _ = embedding_map.kinds(["10", "9", None, "a", "9"], None)
    assert names == ["9", "10", "a", "no label"] and kind.tolist() == [1, 0, 3, 2, 0]
    few = tmp_path / "few"
    few.mkdir()
    for i in range(30):
        Image.new("RGB", (9, 9), ("red", "green", "blue")[i % 3]).save(few / f"{i}.png")
    features = embed.embed(tiny(), few, tmp_path / "few.parquet", device="cpu")
    assert "at least 4 different directions, but there are 3" in run_command(
        monkeypatch, embedding_map, features, "--out", "m.png"
    )
    assert "sample=3" in run_command(monkeypatch, embedding_map, features, "--sample", 3, "--out", "m.png")
    assert "must end in .png, .html or .parquet" in run_command(monkeypatch, embedding_map, features, "--out", "m.pdf")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_works_in_a_browser(features, tmp_path):
    embedding_map.make_map(features, [tmp_path / "map.html"])
    with Browser(tmp_path / "map.html", tmp_path / "profile", width=400, dark=True) as browser:
        assert browser.run("document.documentElement.scrollWidth") == 400  # no horizontal scrolling
        assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 21, 26)"
        at = "(box => [toX(data.x[5]) + box.left, toY(data.y[5]) + box.top])(canvas.getBoundingClientRect())"
        browser.run("fit([5])")  # zoom in, so that no other point is near
        x, y = browser.run(at)
        browser.mouse("mouseMoved", x, y)
        assert data_of(tmp_path / "map.html")["paths"][5] in browser.run("tip.innerText")
        assert browser.run("tip.querySelector('img').naturalWidth") == 8
        browser.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
        assert np.allclose(browser.run(at), (x, y), atol=1)  # the point under the pointer stays there
        browser.mouse("mousePressed", x, y, button="left", buttons=1)
        browser.mouse("mouseMoved", x + 30, y - 20, button="left", buttons=1)
        browser.mouse("mouseReleased", x + 30, y - 20, button="left")
        assert np.allclose(browser.run(at), (x + 30, y - 20), atol=1)
        browser.run("everything(); buttons[0].click()")
        assert browser.run("shown.filter(Boolean).length") == 9
        browser.run("$('search').value = '3/'; $('search').dispatchEvent(new Event('input'))")
        assert browser.run("matches.filter(Boolean).length") == sum(
            "3/" in p for p in data_of(tmp_path / "map.html")["paths"]
        )
        kind = data_of(tmp_path / "map.html")["examples"]
        shown = browser.run("[...document.querySelectorAll('.examples')].map(box => box.children.length)")
        assert shown == [len(rows) for rows in kind] == [4] * 10
        side = "(() => { later(); draw(); return drawnSide; })()"
        small = browser.run(side)
        browser.run("$('size').value = 2; $('size').dispatchEvent(new Event('input'))")
        assert browser.run("$('pictures').checked") and browser.run(side) == pytest.approx(2 * small)
        browser.settle()
        assert browser.errors == [] and all(url.startswith(("file:", "data:")) for url in browser.requests)


NAMES = ["$x_$", "100%_$", "line\nbreak", "_hidden", "<b>&amp;", "n" * 3000, "\u05e9\u05dc\u05d5\u05dd", "a\x00\udc80"]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_class_or_run_is_shown_as_it_is(name, tmp_path, monkeypatch):
    """On the map, its page, the curves and the contact sheet; line breaks become spaces."""
    shown = []
    monkeypatch.setattr(map_page.plt, "close", shown.append)
    points = np.random.default_rng(0).random((6, 2))
    found = map_page.Map(name, name, [name] * 6, points, np.array([0, 1] * 3), [name, "other"])
    map_page.draw_map(found, None, tmp_path / "map.png")
    map_page.page(found, None, tmp_path / "map.html")
    curve = {"step_train_loss": (np.arange(3), np.arange(3))}
    curves.draw_curves({name: curve, "other": curve}, tmp_path / "curves.png")
    for figure in shown:
        assert len(figure.legends[0].get_texts()) == 2
        map_page.plt.figure(figure).clear()
    tile = nearest.Tile(Image.new("RGB", (8, 8)), name, "0.9", (name,))
    assert nearest.neighbor_sheet([(tile, [tile])]).width > 100
    assert program.in_one_line("line\nbreak") == "line break"
