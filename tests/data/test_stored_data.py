"""Custom data sets in WebDataset's shards and in Hugging Face data sets, written by webdataset and by datasets."""

import io
import json
import math
import os
import shutil
import sys
import tarfile
import warnings
from pathlib import Path
from unittest.mock import Mock

import attrs
import numpy as np
import processes
import pytest
import stored_training
import tifffile
import torch
from braceexpand import braceexpand
from PIL import Image
from test_custom_data import NAMES, TILES, params
from test_custom_data import write as write_folder
from torch import nn

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import catalogue, train
from self_supervised.data import (
    batches,
    custom,
    data_sets,
    file_search,
    loading,
    packed_files,
    shard_names,
    tar_shards,
)
from self_supervised.data.batches import ResumableSampler
from self_supervised.data.image_files import read_any
from self_supervised.embeddings import embed, parquet, sources
from self_supervised.evaluate import evaluate_checkpoint
from self_supervised.evaluation import fingerprints
from self_supervised.networks.frozen_encoder import Encoder, Report
from self_supervised.report import pictures

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets
    import webdataset

datasets.disable_progress_bars()
pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore::ResourceWarning")


def png(name: str) -> bytes:
    label, number = name.split("/")
    file = io.BytesIO()
    Image.fromarray(TILES[label][int(number[:2])]).save(file, "PNG")
    return file.getvalue()


def classes(name: str) -> int:
    return int(name.startswith("flower"))


def write_shards(folder: Path, names: list[str] = NAMES, per_shard: int = 12, **more) -> str:
    """Write shards with webdataset. `more`: extension -> function of an image's name, for further members."""
    folder.mkdir(parents=True, exist_ok=True)
    more = more or {"cls": lambda name: str(classes(name))}
    for shard, start in enumerate(range(0, len(names), per_shard)):
        with webdataset.TarWriter(str(folder / f"train-{shard:06d}.tar")) as writer:
            for name in names[start : start + per_shard]:
                members = {ending.replace("_", "."): make(name) for ending, make in more.items()}
                writer.write({"__key__": name.removesuffix(".png"), "png": png(name), **members})
    return f"{folder}/train-{{000000..{shard:06d}}}.tar"


def write_arrow(folder: Path, names: list[str] = NAMES, label: str = "label", as_dict: dict | None = None) -> str:
    """Save a Dataset, or (split -> names) a DatasetDict."""
    features = datasets.Features({"image": datasets.Image(), label: datasets.ClassLabel(names=["china", "flower"])})

    def dataset(names: list[str]) -> datasets.Dataset:
        images = [{"bytes": png(name), "path": None} for name in names]
        return datasets.Dataset.from_dict({"image": images, label: list(map(classes, names))}, features=features)

    if as_dict:
        datasets.DatasetDict({split: dataset(chosen) for split, chosen in as_dict.items()}).save_to_disk(folder)
    else:
        dataset(names).save_to_disk(folder, num_shards=3)
    return str(folder)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, str]:
    """The same images, in the same order, as `photos`."""
    folder = tmp_path_factory.mktemp("stored")
    return {"shards": write_shards(folder / "shards"), "arrow": write_arrow(folder / "arrow")}


def labels(p, split: str = "train") -> list[int]:
    return data_sets.get_dataset(p, (split,)).labels.tolist()


def test_patterns_of_shards_are_known_and_reach_every_level(tmp_path):
    shards = [tmp_path / name for name in ("0.tar", "a/1.tar", "a/b/2.tar")]
    for shard in shards:
        shard.parent.mkdir(exist_ok=True)
        shard.touch()
    assert sorted(shard_names.expanded_shards(f"{tmp_path}/**/*.tar", file_search.PassedOver())) == [*map(str, shards)]
    for pattern in ("a/0.tar::b", "a::b", "{0.tar,1.tar}", "a/{00..12}.tar", "0.TAR", "0.tar.gz"):
        assert shard_names.is_pattern(pattern)
    assert not shard_names.is_pattern("photos/{a}")
    (tmp_path / "photos.tar").mkdir()
    assert not shard_names.is_pattern(str(tmp_path / "photos.tar"))


def test_pages_call_classes_by_their_names(stored, photos):
    def shown(path: Path | str, **how) -> list[str | None]:
        p = params(Path(path), val_size=0.0, test_size=0.0, **how)
        dataset = data_sets.get_dataset(p, ("train",))
        return sorted(pictures.names(p, dataset, torch.from_numpy(dataset.labels)))

    names = sorted(["china", "flower"][classes(name)] for name in NAMES)
    assert shown(photos) == shown(stored["arrow"]) == shown(stored["shards"]) == names
    assert shown(stored["arrow"], class_to_idx=["china=1", "flower=0"]) == names
    assert pictures.class_names(ModelParams(dataset_name="cifar10"), None)[3] == "cat"
    assert all(len(info.class_names.split()) in (0, info.n_classes) for info in catalogue.DATASETS.values())


# ---- the same as files ----


@pytest.mark.parametrize("kind", ["shards", "arrow"])
def test_every_batch_is_that_of_class_folders(kind, stored, photos):
    """Splits, order, views, labels; read by two workers."""
    how = {"val_size": 0.2, "data_fraction": 0.8}
    for split in ("train", "val", "test"):
        ours, files = params(Path(stored[kind]), num_data_workers=2, **how), params(photos, **how)
        views = files.views if split == "train" else []
        loaders = [
            loading.get_loader(p, data_sets.get_dataset(p, (split,), views), split == "train") for p in (ours, files)
        ]
        n = 0
        for (images, classes), (expected, of_files) in zip(*loaders, strict=True):
            assert torch.equal(classes, of_files)
            for found, wanted in zip(images if views else [images], expected if views else [expected], strict=True):
                assert torch.equal(found, wanted)
                n += len(found)
        assert n >= 5


def test_reduced_jpegs_and_arrays_are_read_from_shards_as_from_files(tmp_path):
    """A large JPEG, which is decoded at a half, and five channels from .npy."""
    rng, jpeg = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(np.kron(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8), np.ones((20, 20, 1), np.uint8))).save(
        jpeg, "JPEG"
    )
    array = io.BytesIO()
    np.save(array, rng.random((20, 30, 5), np.float32))
    for ending, content, channels in (("jpg", jpeg, 3), ("npy", array, 5)):
        shard, folder = tmp_path / f"{ending}.tar", tmp_path / ending
        folder.mkdir()
        with webdataset.TarWriter(str(shard)) as writer:
            for i in range(3):
                writer.write({"__key__": f"{i}", ending: content.getvalue()})
                (folder / f"{i}.{ending}").write_bytes(content.getvalue())
        found = []
        for root in (shard, folder):
            p = params(root, in_channels=channels, val_size=0, test_size=0)
            dataset = data_sets.get_dataset(p, ("train",), p.views)
            found += [dataset[i][0] for i in range(3)] + [[data_sets.get_dataset(p, ("train",))[0][0]]]
        for ours, files in zip(found[:4], found[4:], strict=True):
            assert all(map(torch.equal, ours, files))


# ---- lists of an earlier run ----


def with_lists(root: str | Path, lists: Path) -> ModelParams:
    return params(root, splits_path=str(lists), val_size=0.2, test_size=0.2)


@pytest.mark.parametrize("write", [write_arrow, write_shards])
def test_lists_of_rows_are_not_those_of_other_images(write, tmp_path):
    """Which have the same row, or the same name in a shard."""
    labels(with_lists(write(tmp_path / "set", NAMES), tmp_path / "lists"))
    shutil.rmtree(tmp_path / "set")
    others = {"cls": lambda name: str(1 - classes(name))} if write is write_shards else {"names": NAMES[::-1]}
    root = write(tmp_path / "set", **others)
    with pytest.raises(ValueError, match="have other labels than in the lists in .*--splits_path none"):
        labels(with_lists(root, tmp_path / "lists"))
    labels(params(root))
    (tmp_path / "lists/splits.json").unlink()  # now they are the user's
    labels(with_lists(root, tmp_path / "lists"))


def test_rows_that_were_added_and_labels_that_were_corrected_are_told(tmp_path, caplog):
    before = labels(with_lists(write_arrow(tmp_path / "set", NAMES), tmp_path / "lists"))
    corrected = [NAMES[-1], *NAMES[1:], *NAMES[:3]]
    assert labels(with_lists(write_arrow(tmp_path / "more", corrected), tmp_path / "lists")) == before
    assert f"1 of {len(NAMES)} images have other labels than in the lists" in caplog.text
    assert f": 3 images are in none of the lists in {tmp_path}/lists and are not used" in caplog.text


# ---- shards ----


@pytest.mark.parametrize(
    "pattern", ["a/{000..012}.tar", "{train-{8..11},val-{0..1}}.tar", "x.tar", "{a,b}{1..2}/{c,}.tar"]
)
def test_braces_are_those_of_braceexpand(pattern):
    assert list(shard_names.with_braces(pattern)) == list(braceexpand(pattern))


def test_samples_are_those_of_webdataset(stored):
    p = params(Path(stored["shards"]), val_size=0, test_size=0)
    dataset = data_sets.get_dataset(p, ("train",))
    theirs = webdataset.WebDataset(stored["shards"], shardshuffle=False, empty_check=False)
    expected = {f"{sample['__key__']}.png": (sample["png"], int(sample["cls"])) for sample in theirs}
    found = {path.split(".tar/")[1]: (dataset.source.open(path).getvalue(), label) for path, label in dataset.files}
    assert found == expected and len(found) == len(NAMES)


def test_labels_in_shards(tmp_path):
    def found(name: str, fields: dict, **members) -> list[int]:
        write_shards(tmp_path / name, NAMES[::7], **members)
        return labels(params(tmp_path / name, val_size=0, test_size=0, **fields))

    expected = [classes(name) for name in NAMES[::7]]
    assert found("cls", {}, cls=lambda name: str(classes(name))) == expected
    assert found("names", {}, cls=lambda name: name.split("/")[0]) == expected
    swapped = {"class_to_idx": {"china": 1, "flower": 0}}
    assert found("swapped", swapped, cls=lambda name: name.split("/")[0]) == [1 - label for label in expected]
    entries = {"json": lambda name: json.dumps({"label": classes(name), "kind": f"kind {classes(name)}"})}
    assert found("json", {}, **entries) == found("json", {"label_key": "kind"}, **entries) == expected
    assert found("folders", {}, txt=lambda name: "a caption") == expected
    assert set(found("none", {"labels_from": None})) == {-1}
    with pytest.raises(ValueError, match="label_key='kinds': no sample"):
        found("json", {"label_key": "kinds"}, **entries)
    with pytest.raises(ValueError, match="holds 0 images"):
        found("json", {"image_key": "jpg;webp"}, **entries)
    with pytest.raises(ValueError, match="the label of china/00.png in .*train-000000.tar could not be read"):
        found("damaged", {}, json=lambda name: "{")
    entries_of = {
        "float": float,
        "object": lambda label: {"id": label},
        "half": lambda label: label + 0.5,
    }
    one_missing = {"json": lambda name: json.dumps({"label": math.nan if name == NAMES[0] else 1.0})}  # of pandas
    with pytest.raises(ValueError, match="1 of the .* have no label"):
        found("nan", {"label_key": "label"}, **one_missing)
    for name, change in entries_of.items():
        entry = {"json": lambda name, change=change: json.dumps({"label": change(classes(name))})}
        if name == "float":
            assert found(name, {}, **entry) == expected
        else:
            message = "label of china/00.png .*under 'label' is not a class. Set label_key"
            with pytest.raises(ValueError, match=message):
                found(name, {"label_key": "label"}, **entry)
    two = {"mask_png": lambda name: png(NAMES[0]), **entries}
    assert found("two", {}, **two) == found("two", {"image_key": "jpg;mask.png"}, **two) == expected
    p = params(tmp_path / "two", val_size=0, test_size=0, image_key="jpg;mask.png")
    dataset = data_sets.get_dataset(p, ("train",))
    assert torch.equal(dataset[0][0], dataset[1][0]) and dataset.files[1][0].endswith("china/07.mask.png")


def test_splits_are_words_in_the_names_of_shards(tmp_path):
    mixed = NAMES[::2] + NAMES[1::2]  # both classes in train
    thirds = {"imagenet1k-train-00": mixed[:20], "imagenet1k-validation-00": mixed[20:40], "test_0": mixed[40:]}
    for name, chosen in thirds.items():
        write_shards(tmp_path / "made", chosen, per_shard=20)
        os.rename(tmp_path / "made" / "train-000000.tar", tmp_path / f"{name}.tar")
    (tmp_path / "made").rmdir()
    for root in (tmp_path, f"{tmp_path}/*.tar", f"{tmp_path}/imagenet1k-*.tar::{tmp_path}/test_{{0..0}}.tar"):
        p = params(Path(root) if root is tmp_path else root)
        assert [len(labels(p, split)) for split in ("train", "val", "test")] == [20, 20, 10]
    some = params(tmp_path, exclude_patterns=["*/china/1*"])
    assert len(labels(some)) == 15
    os.rename(tmp_path / "test_0.tar", tmp_path / "extra-0.tar")
    with pytest.raises(ValueError, match="has train and val, and 10 images outside them, such as extra-0.tar/"):
        labels(params(tmp_path))
    assert len(labels(params(tmp_path, exclude_patterns=["extra-*/*"]))) == 20
    os.rename(tmp_path / "imagenet1k-train-00.tar", tmp_path / "val-1.tar")
    with pytest.raises(ValueError, match="holds 0 images for training"):
        labels(params(tmp_path))


def test_tar_files_of_tar(photos, tmp_path):
    """As `tar cf shard.tar -C photos .` writes them, with folders as members and ./ before every name."""
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(photos, ".")
    p = params(tmp_path, splits_path=str(tmp_path / "splits"))
    for _ in range(2):  # drawn, then read from the lists
        assert sorted(labels(p) + labels(p, "val") + labels(p, "test")) == [0] * 30 + [1] * 20


def test_lists_of_the_users_own_name_images_in_shards_and_rows(stored, tmp_path):
    rows = {"shards": ["./train-000000.tar/china/03.png", "train-000004.tar/flower/19.png"], "arrow": ["3", "49"]}
    for kind, paths in rows.items():
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "train.txt").write_text("\n".join(paths))
        root = Path(stored["arrow"] if kind == "arrow" else stored["shards"])
        p = params(root, splits_path=str(folder), val_size=0, test_size=0)
        assert labels(p) == [0, 1] and labels(
            params(root, splits_path=str(folder), val_size=0, test_size=0, labels_from=None)
        ) == [-1, -1]
        (folder / "train.txt").write_text("".join(f"{path} {name}\n" for path, name in zip(paths, "ba", strict=True)))
        assert labels(p) == [1, 0]


def test_the_index_is_kept_beside_the_splits(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path / "shards")
    p = params(pattern, splits_path=str(tmp_path / "splits"))
    expected = labels(p)
    tar_shards.known.clear()
    read, members = [], tar_shards.members
    monkeypatch.setattr(tar_shards, "members", lambda shard: read.append(shard) or members(shard))
    assert labels(p) == expected and data_sets.get_dataset(p, ("train",))[3][1] == expected[3] and not read
    os.utime(tmp_path / "shards" / "train-000001.tar")
    assert labels(p) == expected and read == [str(tmp_path / "shards" / "train-000001.tar")]
    os.utime(tmp_path / "shards" / "train-000001.tar")
    monkeypatch.setattr(tar_shards, "atomic_write", Mock(side_effect=OSError("read-only")))
    assert labels(p) == expected  # the index saves time and nothing else


def test_what_is_refused_of_shards(tmp_path, stored):
    shards = tmp_path / "shards"
    write_shards(shards, NAMES[:24])
    for root, message in [
        (f"{shards}/train-{{000000..000002}}.tar", "data_path=.*train-000002.tar does not exist"),
        (f"{shards}/val-*.tar", "matches no shards"),
        ("pipe:curl https://example.org/train-{0..9}.tar", "data_path=.* is a command"),
        (f"file://{shards}/train-000001.tar", "data_path=.* is on this machine. Pass the path"),
    ]:
        with pytest.raises(ValueError, match=message):
            labels(params(root))
    first = shards / "train-000000.tar"
    assert labels(params(shutil.copy(first, tmp_path / "train.TAR"))) == labels(params(first)) != []
    whole = (shards / "train-000001.tar").read_bytes()
    (shards / "train-000001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="train-000001.tar could not be read as a tar file"):
        labels(params(shards))
    import gzip

    (shards / "train-000001.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(ValueError, match="train-000001.tar could not be read as a tar file .*decompress"):
        labels(params(shards))


def write_tar(shard: Path, members: dict[str, bytes | str], **options) -> str:
    """Write a tar file of members: files (bytes) and links to a path (text; a hard link if it begins with "=")."""
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w", **options) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return str(shard)


def in_shard(root: Path | str, **fields) -> tuple[list[str], dict[str, int]]:
    """Return the images, and reason -> number of the members that are passed over."""
    source = custom.get_source(params(root, **fields), str(root))
    found = [path.partition(".tar/")[2] for path, _ in source.find()["train"]]
    return found, {reason: n for reason, (n, _) in source.passed_over.items()}


def test_dots_in_names_within_shards(tmp_path):
    image = png(NAMES[0])
    dotted = {f"v1.0/IMG_2024.05.{i}.png": image for i in range(3)} | {f"v1.0/plain{i}.png": image for i in range(2)}
    labeled = dotted | {f"v1.0/IMG_2024.05.{i}.cls": str(i % 2).encode() for i in range(3)}
    labeled |= {f"v1.0/plain{i}.cls": b"1" for i in range(2)}
    for members in (dotted, labeled):
        shard = write_tar(tmp_path / "a.tar", members)
        assert sorted(in_shard(shard)[0]) == sorted(dotted) and not in_shard(shard)[1]
    dataset = data_sets.get_dataset(params(shard, val_size=0, test_size=0), ("train",))
    assert {path.split("/")[-1]: label for path, label in dataset.files}["IMG_2024.05.1.png"] == 1
    masks = {"a.png": image, "a.mask.png": image, "b.mask.png": image, "c.jpg": image, "c.png": image}
    shard = write_tar(tmp_path / "masks.tar", masks | {"d.heic": b"", "d.cls": b"0", "a.json": b"{}"})
    found, passed_over = in_shard(shard)
    assert found == ["a.png", "c.jpg"]
    counts = {".png next to the image of a sample": 2, ".png": 1, ".heic": 1, ".cls": 1}
    assert passed_over == counts
    assert in_shard(shard, image_key="mask.png")[0] == ["a.mask.png", "b.mask.png"]


def test_hidden_members_links_and_long_names(tmp_path):
    image = png(NAMES[0])
    members = {"a/1.png": image, "__MACOSX/a/._1.png": b"x", "a/.hidden.png": image, "./b/2.png": "=a/1.png",
               "b/3.png": "../a/1.png", "b/4.png": "3.png", "b/5.png": "6.png", "b/6.png": "5.png",
               "b/7.png": "/etc/hosts", f"b/{'long' * 60}.png": image}  # fmt: skip
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        shard = write_tar(tmp_path / f"{kind}.tar", members, format=kind)
        found, passed_over = in_shard(shard)
        assert sorted(found) == ["a/1.png", "b/2.png", "b/3.png", "b/4.png", f"b/{'long' * 60}.png"]
        assert passed_over == {"hidden": 2, "links to no file of the shard": 3}
        dataset = data_sets.get_dataset(params(shard, val_size=0, test_size=0), ("train",))
        assert all(torch.equal(dataset[0][0], dataset[i][0]) for i in range(5))


@pytest.mark.parametrize("bit", [3, 150, 151 + 512 * 3])
def test_no_image_is_lost_after_a_damaged_header(bit, tmp_path):
    shard = Path(write_tar(tmp_path / "a.tar", {f"{i}.png": bytes(512 * 2) for i in range(6)}))
    content = bytearray(shard.read_bytes())
    content[3 * 512 + bit] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="a.tar could not be read as a tar file .*byte"):
        in_shard(shard)


def test_shards_are_read_to_their_last_byte(tmp_path):
    shard = Path(write_tar(tmp_path / "a.tar", {f"{i}.png": b"x" * 700 for i in range(3)}))
    whole = shard.read_bytes()
    end = 3 * (512 + 1024)
    for cut in (end, end - 1, end - 1025, end + 100):
        shard.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="a.tar could not be read as a tar file"):
            in_shard(shard)
    shard.write_bytes(whole[: end + 512])  # one block of the two that mark the end
    assert in_shard(shard)[0] == ["0.png", "1.png", "2.png"]
    other = Path(write_tar(tmp_path / "b" / "b.tar", {"3.png": b"y" * 10})).read_bytes()
    shard.write_bytes(whole + other)  # by `cat`
    source = custom.get_source(params(shard), str(shard))
    assert [path for path, _ in source.find()["train"]] == [f"a.tar/{i}.png" for i in range(4)]
    assert source.open(f"{shard}/3.png").getvalue() == b"y" * 10
    assert not source.passed_over
    again = Path(write_tar(tmp_path / "c" / "c.tar", {"1.png": b"z" * 10})).read_bytes()
    shard.write_bytes(whole + again)
    assert in_shard(shard) == (["0.png", "1.png", "2.png"], {"replaced by a later member of the same name": 1})
    shard.write_bytes(whole + b"garbage" * 100)
    with pytest.raises(ValueError, match="a.tar could not be read as a tar file"):
        in_shard(shard)


def test_a_path_with_brackets_or_braces_is_itself(tmp_path):
    image = {"1.png": png(NAMES[0])}
    for name in ("run [1]/train[2].tar", "run [1]/train{a}.tar", "set.tar/train-0.tar", "run 1/train2.tar"):
        write_tar(tmp_path / name, image)
    for pattern, n in {
        "run [1]/train[2].tar": 1, "run [1]/*.tar": 2, "run [1]/train{a}.tar": 1, "run [1]": 2,
        "run [1]/train[[]*.tar": 1, "set.tar/train-{0..0}.tar": 1,
        "run [1]/train[2].tar::set.tar/train-0.tar": 2, "r*/train*.tar": 3,
    }.items():  # fmt: skip
        root = "::".join(f"{tmp_path}/{part}" for part in pattern.split("::"))
        dataset = data_sets.get_dataset(params(root, val_size=0, test_size=0), ("train",))
        assert len(dataset) == n and dataset[0][0].shape == (3, 32, 32), pattern
    for pattern in ("run [3]/a.tar", "run [1]/train[3].tar", "run [1]/{b,c}.tar"):
        with pytest.raises(ValueError, match="data_path="):
            labels(params(f"{tmp_path}/{pattern}"))


@pytest.mark.parametrize("name", ["train-{0..3}.tar.gz", "a.tgz", "a.tar.zst"])
def test_compressed_shards_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match="data_path=.*is compressed"):
        labels(params(f"{tmp_path}/{name}"))
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(ValueError, match="passed over: 1 .gz"):
        labels(params(tmp_path))


def test_the_kept_index_says_what_was_passed_over(tmp_path, caplog):
    shard = write_tar(tmp_path / "shards" / "train.tar", {"a/1.png": png(NAMES[0]), "a/2.heic": b"", ".x.png": b""})
    (tmp_path / "shards" / "sizes.json").touch()
    for how in ({"splits_path": str(tmp_path / "kept")}, {}):
        with caplog.at_level("INFO"):
            labels(params(Path(shard).parent, val_size=0, test_size=0, **how))
        assert ": 1 images; passed over: 1 .json" in caplog.text and "1 .heic (such as" in caplog.text
        caplog.clear(), tar_shards.known.clear(), file_search.logged_lines.clear()
        how = json.loads((tmp_path / "kept" / "shards.json").read_text())
        assert how["shards"][shard]["passed_over"] == {
            "hidden": [1, f"{shard}/.x.png"],
            ".heic": [1, f"{shard}/a/2.heic"],
        }


def test_unreadable_images_in_shards_are_named_or_passed_over(tmp_path):
    pattern = write_shards(tmp_path, NAMES[:12], cls=lambda name: "0")
    shard = tmp_path / "train-000000.tar"
    content = shard.read_bytes()
    start = content.index(b"\x89PNG")
    shard.write_bytes(content[:start] + b"\0" * 60 + content[start + 60 :])
    p = params(pattern, val_size=0, test_size=0)
    with pytest.raises(ValueError, match="train-000000.tar/china/00.png could not be read as an image"):
        data_sets.get_dataset(p, ("train",))[0]
    dataset = data_sets.get_dataset(params(pattern, val_size=0, test_size=0, unreadable_images="skip"), ("train",))
    assert torch.equal(dataset[0][0], dataset[1][0]) and dataset.skipped() == [f"{shard}/china/00.png"]


# ---- the order of large sets ----


class Numbers:
    """Data set of numbers, with these sizes of its shards."""

    def __init__(self, sizes: list[int]):
        self.shards = np.repeat(np.arange(len(sizes)), sizes)

    def __len__(self) -> int:
        return len(self.shards)


@pytest.mark.parametrize("sizes", [[30, 50, 41, 7, 60, 12], [97, 3], [100]])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_read_shards_one_after_the_other_and_every_image_once(world, sizes, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 32)
    dataset = Numbers(sizes)
    orders = []
    for epoch in (0, 1):
        shares = [ResumableSampler(dataset, world, rank, seed=3) for rank in range(world)]
        for share in shares:
            share.set_epoch(epoch)
        dealt = [list(share) for share in shares]
        assert [len(part) for part in dealt] == [len(share) for share in shares] == [len(shares[0])] * world
        gathered = [dealt[i % world][i // world] for i in range(len(dataset))]  # as distributed.gather_evaluated does
        assert sorted(gathered) == list(range(len(dataset)))
        for share, part in zip(shares, dealt, strict=True):
            runs = dataset.shards[part[: len(part) // 32 * 32]].reshape(-1, 32)
            assert sum(len(set(run)) for run in runs) <= len(sizes) + 2 * len(runs)  # a window spans few shards
            share.skip = 5
            assert list(share) == part[5:]
        orders.append(gathered)
    assert orders[0] != orders[1] and (
        len(sizes) == 1 or list(dataset.shards[orders[0]]) != list(dataset.shards[orders[1]])
    )
    short = [list(ResumableSampler(dataset, world, rank, seed=3, drop_last=True)) for rank in range(world)]
    assert len({i for part in short for i in part}) == len(dataset) // world * world
    in_order = [list(ResumableSampler(dataset, world, rank, shuffle=False)) for rank in range(world)]
    assert in_order[0] == list(range(0, len(dataset), world))


def test_a_set_within_the_window_is_shuffled_as_files_are():
    dataset = Numbers([50, 50])
    assert list(ResumableSampler(dataset, 2, 1, seed=3)) == list(ResumableSampler(range(100), 2, 1, seed=3))


# ---- training ----


def test_resumed_training_on_shards_and_workers_change_nothing(stored, resumes_as_uninterrupted, monkeypatch):
    monkeypatch.setattr(batches, "WINDOW", 10)
    resumes_as_uninterrupted(
        lambda workers: SelfSupervisedMethod(params(stored["shards"], num_data_workers=workers, evaluations=[]))
    )


@pytest.mark.slow
def test_two_processes(tmp_path, photos):
    """Class folders, shards and Arrow files give each image once per epoch and the same weights, also if resumed."""
    names = NAMES[:49]  # odd: one of the processes repeats an image
    number = {name: str(i) for i, name in enumerate(names)}
    folder = write_folder(tmp_path / "folder")
    (folder / "train.txt").write_text("".join(f"{name},{i}\n" for name, i in number.items()))
    images = [{"bytes": png(name), "path": None} for name in names]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    arrow = datasets.Dataset.from_dict({"image": images, "label": list(range(49))}, features=features)
    arrow.save_to_disk(tmp_path / "arrow")
    roots = {
        "folder": str(folder),
        "shards": write_shards(tmp_path / "shards", names, 13, cls=number.__getitem__),
        "arrow": str(tmp_path / "arrow"),
    }
    found = processes.run(stored_training.train_on, 2, tmp_path / "run", roots, str(tmp_path / "checkpoints"))
    for kind in roots:
        (first, weights), (second, others) = (process[kind, False] for process in found)
        for epoch in (0, 1):
            parts = [[i for batch in seen[epoch] for i in batch] for seen in (first, second)]
            assert [len(part) for part in parts] == [25, 25] and set(parts[0] + parts[1]) == set(range(49))
        assert torch.equal(weights, others)
        assert first[0] != first[1]
    for process in found:
        (seen, weights), (resumed, same) = (process["shards", again] for again in (False, True))
        assert resumed == {1: seen[1][1:]} and torch.equal(same, weights)
    first_step = [i for process in found for i in process["shards", False][0][0][0]]
    assert len(first_step) == 16 and len({i // 13 for i in first_step}) <= 3  # two windows of 10 images


# ---- Hugging Face ----


def test_splits_and_labels_of_dataset_dicts(tmp_path):
    parts = {"train": NAMES[::2], "validation": NAMES[1::4], "test": NAMES[3::4], "extra": NAMES[:3]}
    p = params(Path(write_arrow(tmp_path / "dict", as_dict=parts, label="kind")))
    for split, name in (("train", "train"), ("val", "validation"), ("test", "test")):
        assert labels(p, split) == list(map(classes, parts[name]))
    dataset = data_sets.get_dataset(p, ("val",))
    assert dataset.files[1][0] == str(tmp_path / "dict" / "validation" / "1")
    loaded = datasets.load_from_disk(tmp_path / "dict")["validation"]
    p = params(tmp_path / "dict", transform_crop_size=35)
    image = np.asarray(loaded[1]["image"])[2:37, 2:37].astype(int)  # interpolated at half a pixel
    ours = data_sets.get_dataset(p, ("val",))[1][0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(ours - image).mean() < 6 and np.abs(ours - image[:, ::-1]).mean() > 12
    swapped = params(tmp_path / "dict", class_to_idx={"china": 1, "flower": 0})
    assert labels(swapped) == [1 - classes(name) for name in parts["train"]]
    assert set(labels(params(tmp_path / "dict", labels_from=None))) == {-1}
    single = params(tmp_path / "dict" / "extra", val_size=0, test_size=0)
    assert labels(single) == list(map(classes, NAMES[:3]))


def test_splits_that_are_not_used_are_counted(tmp_path):
    root = write_arrow(tmp_path / "dict", as_dict={"train": NAMES[:9], "extra": NAMES[:3], "gone": NAMES[:1]})
    shutil.rmtree(tmp_path / "dict" / "gone")
    source = custom.get_source(params(root), root)
    assert len(source.find()["train"]) == 9
    assert source.passed_over == {"in unused splits": [3, f"{root}/extra"]}


def test_columns(tmp_path, photos):
    columns = {
        "left": [str(photos / name) for name in NAMES],  # datasets reads the files while saving
        "right": [{"bytes": png(name), "path": None} for name in NAMES],
        "coarse": [classes(name) for name in NAMES],
        "fine": [name.split("/")[0] for name in NAMES],
        "score": [0.5] * len(NAMES),
        "merged": [float(classes(name)) for name in NAMES],  # pandas: floats, because another part had no numbers
        "missing": [math.nan, *(float(classes(name)) for name in NAMES[1:])],
    }
    coarse, text = datasets.ClassLabel(names=["a", "b"]), datasets.Value("string")
    kinds = {"left": datasets.Image(), "right": datasets.Image(), "coarse": coarse, "fine": text}
    kinds |= dict.fromkeys(("score", "merged", "missing"), datasets.Value("float32"))
    datasets.Dataset.from_dict(columns, features=datasets.Features(kinds)).save_to_disk(tmp_path / "set")

    def read(**fields):
        return data_sets.get_dataset(params(tmp_path / "set", val_size=0, test_size=0, **fields), ("train",))

    with pytest.raises(ValueError, match="image_key=None: .* 2 columns of type Image.*left, right"):
        read()
    expected = [classes(name) for name in NAMES]
    for fields in ({"image_key": "left"}, {"image_key": "right", "label_key": "fine"}):
        assert read(**fields).labels.tolist() == expected
    assert torch.equal(read(image_key="left")[7][0], read(image_key="right")[7][0])
    packs = {packed_files.cache_folder(read(image_key=key)) for key in ("left", "right")}
    assert len(packs) == 2  # no column serves another's pixels
    with pytest.raises(ValueError, match="label_key='kind': .*left, right, coarse"):
        read(image_key="left", label_key="kind")
    with pytest.raises(ValueError, match="label_key='score': 0.5 "):
        read(image_key="left", label_key="score")
    assert read(image_key="left", label_key="merged").labels.tolist() == expected
    with pytest.raises(ValueError, match="1 of the .* have no label"):
        read(image_key="left", label_key="missing")
    secret = datasets.load_from_disk(tmp_path / "set").remove_columns(["coarse", "fine"])
    both = {"train": datasets.load_from_disk(tmp_path / "set"), "test": secret}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "secret")
    p = params(tmp_path / "secret", image_key="left")
    assert data_sets.get_dataset(p, ("train",)).labels.tolist() == expected
    assert set(data_sets.get_dataset(p, ("test",)).labels.tolist()) == {-1}
    encoder = params(tmp_path / "set", image_key="right")  # programs that embed read its column, unless told otherwise
    for columns, label in (({}, "a"), ({"label_key": "fine"}, "china"), ({"labels_from": None}, None)):
        source = sources.open_source(tmp_path / "set", columns=columns, preferred=encoder.image_key)
        assert source.source.image_key == "right" and source.labels(source.paths())[0] == label
    model = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    ready = Encoder(model, attrs.evolve(encoder, encoder_arch="module"), Report("own", "module", "module", 2, ()))
    embed.embed(ready, tmp_path / "set", tmp_path / "f.parquet", num_workers=0, label_key="fine")
    assert parquet.facts_of_file(tmp_path / "f.parquet")["columns"] == {"image_key": "right", "label_key": "fine"}
    with pytest.raises(ValueError, match="label_key: no effect, because .*neither shards nor"):
        embed.embed(ready, photos, tmp_path / "g.parquet", num_workers=0, label_key="fine")
    with pytest.raises(ValueError, match="include_patterns=\\['1\\*'\\]"):
        read(image_key="left", include_patterns=["1*"])
    with pytest.raises(ValueError, match="image_key='left', label_key=None: .* Hugging Face"):
        data_sets.get_dataset(params(photos, image_key="left"), ("train",))


def test_columns_that_hold_no_encoded_images_are_refused(tmp_path):
    array = datasets.Array3D((4, 5, 3), "uint8")
    kinds = {"string": datasets.Value("string"), "List": datasets.List(datasets.Value("uint8")), "Array3D": array}
    values = {"string": "a.png", "List": [1, 2], "Array3D": np.zeros((4, 5, 3), np.uint8)}
    for name, kind in kinds.items():
        rows, features = {"image": [values[name]] * 6}, datasets.Features({"image": kind})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
        with pytest.raises(ValueError, match=f"image_key='image': this column holds {name}, not encoded images"):
            data_sets.get_dataset(params(tmp_path / name, image_key="image"), ("train",))


def test_rows_of_tiff_and_npy_are_read_as_such_files(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (9, 12, 6)).astype(np.uint16)
    stored = {"tif": io.BytesIO(), "npy": io.BytesIO()}
    tifffile.imwrite(stored["tif"], pixels, photometric="minisblack", planarconfig="contig")
    np.save(stored["npy"], pixels)
    rows = {"image": [{"bytes": content.getvalue(), "path": None} for content in stored.values()]}
    images = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=images).save_to_disk(tmp_path / "set")
    fields = {"in_channels": 6, "pixel_range": [0, 4095], "image_mean": [0.5] * 6, "image_std": [0.5] * 6}
    dataset = data_sets.get_dataset(params(tmp_path / "set", val_size=0, test_size=0, **fields), ("train",))
    expected = np.rint(pixels / 4095 * 255).astype(np.uint8)
    for path, _ in dataset.files:
        assert np.array_equal(read_any(path, dataset.source.open(path), 6, [0, 4095]), expected)


def test_names_of_classes_may_be_numbers(tmp_path):
    kinds = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["1", "2", "3"])})
    rows = {"image": [{"bytes": png(name), "path": None} for name in NAMES[:9]], "label": [0, 1, 2] * 3}
    datasets.Dataset.from_dict(rows, features=kinds).save_to_disk(tmp_path / "set")
    for numbers in (None, {"1": 0, "2": 1, "3": 2}):
        dataset = data_sets.get_dataset(params(tmp_path / "set", class_to_idx=numbers), ("train",))
        assert dataset.class_names == ["1", "2", "3"]


def test_without_labels_or_train(tmp_path, monkeypatch):
    images = datasets.Features({"image": datasets.Image()})
    rows = {"image": [{"bytes": png(name), "path": None} for name in NAMES[:20]]}
    datasets.Dataset.from_dict(rows, features=images).save_to_disk(tmp_path / "bare")
    assert set(labels(params(tmp_path / "bare"))) == {-1}
    monkeypatch.chdir(tmp_path / "bare")
    here = data_sets.get_dataset(params(Path(".")), ("train",))
    there = data_sets.get_dataset(params(tmp_path / "bare"), ("train",))
    assert torch.equal(here[3][0], there[3][0])
    root = write_arrow(tmp_path / "others", as_dict={"unsupervised": NAMES[:4], "test": NAMES[4:8]})
    with pytest.raises(ValueError, match="has the splits test, unsupervised.* no train.*data_path=.*others/SPLIT"):
        labels(params(root))


@pytest.mark.parametrize("place", ["", "data"])
def test_parquet_files_are_read_as_what_was_saved(tmp_path, monkeypatch, place):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    parts = {"train": NAMES[::2], "test": NAMES[1::2]}
    saved = write_arrow(tmp_path / "saved", as_dict=parts)
    (tmp_path / "tables" / place).mkdir(parents=True)
    (tmp_path / "tables" / "README.md").write_text("# Photos\n")
    for split, rows in datasets.load_from_disk(saved).items():
        rows.to_parquet(tmp_path / "tables" / place / f"{split}-00000-of-00001.parquet")
    for split, names in parts.items():
        assert labels(params(tmp_path / "tables"), split) == list(map(classes, names))
    ours, expected = (data_sets.get_dataset(params(Path(root)), ("test",)) for root in (tmp_path / "tables", saved))
    assert torch.equal(ours[7][0], expected[7][0]) and ours.class_names == expected.class_names
    damaged = shutil.copytree(tmp_path / "tables", tmp_path / "damaged")
    file = next(damaged.rglob("test-*.parquet"))
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match="damaged': its Parquet files could not be read"):
        labels(params(damaged))
    for part in damaged.rglob("train-*"):
        part.unlink()
    shutil.copy(next((tmp_path / "tables").rglob("test-*.parquet")), file)
    with pytest.raises(ValueError, match="but no train. Name its files train-..."):
        labels(params(damaged))
    write_folder(tmp_path / "tables" / "photos")  # features next to their images
    assert not custom.is_stored(str(tmp_path / "tables"))


def test_a_missing_package_is_named(stored, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="data_path=.*pip install datasets"):
        labels(params(Path(stored["arrow"])))


def test_datasets_is_imported_for_its_folders_alone(tmp_path):
    """Importing datasets takes longer than importing all other readers."""
    (found,) = processes.run(stored_training.imported, 1, tmp_path)
    assert "self_supervised.data.custom" in found and "datasets" not in found


# ---- programs ----


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "arrow"])
def test_programs(kind, stored, tmp_path, monkeypatch, capsys):
    options = ["--dataset_name", "folder", "--data_path", stored[kind], "--transform_crop_size", "32", "--encoder_arch"]
    options += ["shufflenet_v2_x0_5", "--num_data_workers", "0", "--batch_size", "8", "--dim", "16", "--seed", "0"]
    line = ["train.py", "simclr", *options, "--max_epochs", "1", "--linear_epochs", "1", "--out", str(tmp_path / "run")]
    tried = [["--preview", "views.png"], ["--dry_run"]] if kind == "shards" else []
    for more in (*tried, ["--compute_statistics", "true"]):
        monkeypatch.setattr(sys, "argv", [*line, *more])
        train.main()
    if tried:
        assert Image.open("views.png").height > 100 and "40 for training" in capsys.readouterr().out
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert "test_class_acc" in results["test set"] and results["linear classifier"]["valid_acc1"] >= 0
    assert (tmp_path / "run/splits/shards.json").is_file() == (kind == "shards")
    checkpoint = tmp_path / "run" / "pretrained.ckpt"
    scores = evaluate_checkpoint(checkpoint, ["knn"], baselines=False, num_data_workers=0)
    assert [run["dataset"] for run in scores["runs"]] == ["folder"]
    embed.embed(checkpoint, stored[kind], tmp_path / "features.parquet", batch_size=16, num_workers=0)
    paths, embeddings, found = parquet.read_embeddings(tmp_path / "features.parquet")
    assert len(paths) == 50 and embeddings.shape[0] == 50
    assert sorted(found) == ["0"] * 30 + ["1"] * 20 if kind == "shards" else ["china"] * 30 + ["flower"] * 20


def test_features_are_extracted_anew_when_a_shard_changes(tmp_path):

    pattern = write_shards(tmp_path)
    p = params(pattern, val_size=0, test_size=0)

    def contents() -> list:
        return list(fingerprints.contents(data_sets.get_dataset(p, ("train",))))

    before = contents()
    assert contents() == before and len(before) == 50
    os.utime(tmp_path / "train-000001.tar")
    assert [a == b for a, b in zip(contents(), before, strict=True)] == [not 12 <= i < 24 for i in range(50)]


@pytest.mark.parametrize("content", ["", "[1]", '{"how": "other", "shards": 1}', '{"shards": {}}'])
def test_a_damaged_index_of_shards_is_made_anew(tmp_path, monkeypatch, content):
    pattern, lists = write_shards(tmp_path), tmp_path / "lists"
    lists.mkdir()
    (lists / "shards.json").write_text(content)
    monkeypatch.setattr(tar_shards, "known", {})
    data_sets.get_dataset(params(pattern, splits_path=str(lists)), ("train",))
    assert len(json.loads((lists / "shards.json").read_text())["shards"]) > 1


def test_splits_inside_of_a_shard_are_refused(tmp_path):
    """As `tar cf photos.tar train val` writes them. What the message asks for works."""
    images = {f"{split}/c{i % 2}/{i}.png": png(NAMES[i]) for i, split in enumerate(["train"] * 4 + ["val"] * 2)}
    photos = params(write_tar(tmp_path / "photos.tar", images))
    with pytest.raises(
        ValueError, match="photos.tar': its .* directories train, val, and all images would be for train"
    ):
        data_sets.get_dataset(photos, ("train",))
    as_one = data_sets.get_dataset(params(write_tar(tmp_path / "train.tar", images), val_size=0), ("train",))
    assert as_one.class_names == ["train", "val"]
    for split in ("train", "val"):
        own = {path.replace(split, ".", 1): image for path, image in images.items() if path.startswith(split)}
        write_tar(tmp_path / "each" / f"{split}.tar", own)
    each = params(f"{tmp_path}/each/{{train,val}}.tar")
    labels = [data_sets.get_dataset(each, (split,)).labels.tolist() for split in ("train", "val")]
    assert labels == [[0, 1, 0, 1], [0, 1]]
    only_train = write_tar(tmp_path / "photo.tar", {p: image for p, image in images.items() if p.startswith("train")})
    assert len(data_sets.get_dataset(params(only_train, val_size=0, test_size=0), ("train",))) == 4
    assert len(sources.open_source(str(tmp_path / "photos.tar")).paths()) == 6  # embeddings are of all splits
