"""Custom data sets: layouts, splits, patterns, labels, channels, statistics; training on them."""

import json
import re
import shutil
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import attrs
import numpy as np
import processes
import pytest
import tifffile
import torch
from earlier.tiny import earlier_tiny  # noqa: F401, which registers the encoder timm:earlier_tiny
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.neighbors import KNeighborsClassifier
from torchvision.datasets import ImageFolder

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import EncoderAndDataParams, ModelParams
from self_supervised import evaluate
from self_supervised import train as train_program
from self_supervised.data import class_labels, custom, data_sets, facts, folders, image_files
from self_supervised.data.facts import n_classes
from self_supervised.data.folders import check_settings
from self_supervised.data.image_files import central_square
from self_supervised.evaluation import features, fingerprints
from self_supervised.evaluation.protocols import runnable
from self_supervised.networks.pretrained import load_encoder
from self_supervised.report import compare, tables
from self_supervised.runs import earlier_run, preflight
from self_supervised.runs.run_options import RunOptions
from self_supervised.setting_groups import CUSTOM_DATA, FROM_PRETRAINING
from self_supervised.training import checkpoints

SIDE = 40
CLASSES = {"china": 30, "flower": 20}  # number of tiles, cut from a photograph

pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore::ResourceWarning")


def tiles(number: int, n: int) -> list[np.ndarray]:
    photo = load_sample_images().images[number]
    return [photo[y : y + SIDE, x : x + SIDE] for y in range(0, 400, SIDE) for x in range(0, 600, SIDE)][:n]


TILES = {name: tiles(number, n) for number, (name, n) in enumerate(CLASSES.items())}
NAMES = [f"{name}/{i:02}.png" for name, n in CLASSES.items() for i in range(n)]


def write(root: Path, names: dict[str, str] | None = None) -> Path:
    """Write class folders, or each image under another name."""
    for name in NAMES:
        label, number = name.split("/")
        path = root / (names or {}).get(name, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(TILES[label][int(number[:2])]).save(path)
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("photos"))


def params(root: Path, **fields) -> ModelParams:
    return ModelParams(
        **{
            "dataset_name": "folder",
            "data_path": str(root),
            "transform_crop_size": 32,
            "encoder_arch": "shufflenet_v2_x0_5",
            "low_resolution_stem": False,
            "num_data_workers": 0,
            "batch_size": 8,
            "K": 32,
            "dim": 16,
            "mlp_hidden_dim": 16,
            "seed": 0,
            **fields,
        }
    )


def listed(p: ModelParams, split: str = "train") -> dict[str, int]:
    """Return relative path -> class of the images of a split."""
    root = Path(p.data_path)
    return {str(Path(path).relative_to(root)): int(label) for path, label in data_sets.get_dataset(p, (split,)).files}


def three(p: ModelParams) -> list[dict[str, int]]:
    return [listed(p, split) for split in ("train", "val", "test")]


# ---- layouts ----


def test_class_folders_are_numbered_as_by_torchvision_and_split_in_proportion(photos):
    sets = three(params(photos, val_size=0.2, test_size=0.1))
    everything = {str(Path(path).relative_to(photos)): label for path, label in ImageFolder(str(photos)).samples}
    assert {name: label for one in sets for name, label in one.items()} == everything
    assert sum(map(len, sets)) == len(NAMES)
    counts = [[sum(label == k for label in one.values()) for k in (0, 1)] for one in sets]
    assert counts == [[21, 14], [6, 4], [3, 2]]  # 70, 20 and 10 % of 30 and of 20
    again, other = three(params(photos, val_size=0.2, seed=9)), three(params(photos, val_size=0.2, data_seed=1))
    assert again == sets and other != sets


def test_folders_of_splits(tmp_path):
    place = {name: f"{'train' if int(name[-6:-4]) < 10 else 'valid'}/{name}" for name in NAMES}
    p = params(write(tmp_path, place))
    assert listed(p) == {path: path.split("/")[1] == "flower" for path in place.values() if path.startswith("train")}
    assert listed(p, "val") == {path: path.split("/")[1] == "flower" for path in place.values() if "valid" in path}
    assert listed(p, "test") == listed(p, "val")  # the only one of the two


@pytest.mark.parametrize("separator", [" ", ",", ", "])
def test_lists_of_paths_and_labels(photos, tmp_path, separator):
    root = tmp_path / "root"
    root.symlink_to(photos)
    copy = write(tmp_path / "copy", {"china/00.png": "china/the first one.png"})
    (copy / "train.txt").write_text(f"china/the first one.png{separator}7\nflower/00.png{separator}3\n\n")
    (copy / "test.txt").write_text(f"flower/01.png{separator}3\n")
    assert three(params(copy)) == [
        {"china/the first one.png": 1, "flower/00.png": 0}, {"flower/01.png": 0}, {"flower/01.png": 0}
    ]  # fmt: skip
    (copy / "train.txt").write_text(f"china/01.png{separator}oak\nflower/00.png{separator}ash\n")
    (copy / "test.txt").write_text(f"flower/01.png{separator}oak\n")
    assert three(params(copy))[:2] == [{"china/01.png": 1, "flower/00.png": 0}, {"flower/01.png": 1}]
    (copy / "train.txt").write_text("china/the first one.png\nflower/00.png\n")  # labels from class folders
    (copy / "test.txt").unlink()
    (copy / "val.txt").write_text("flower/01.png\n")
    assert three(params(copy))[:2] == [{"china/the first one.png": 0, "flower/00.png": 1}, {"flower/01.png": 1}]
    (copy / "val.txt").write_text("flower/01.png\nflower/1000.png\n")
    with pytest.raises(ValueError, match="val.txt lists images that are not in .*: flower/1000.png"):
        listed(params(copy))


def test_lists_over_folders_of_splits_have_the_classes_within_them(tmp_path):
    place = {name: f"{'train' if int(name[-6:-4]) < 10 else 'val'}/{name}" for name in NAMES}
    root, lists = write(tmp_path / "photos", place), tmp_path / "lists"
    lists.mkdir()
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text("\n".join(path for path in place.values() if path.startswith(split)))
    for p in (params(root), params(root, splits_path=str(lists))):
        assert listed(p) == {path: "flower" in path for path in place.values() if path.startswith("train")}
        assert facts.count_classes(p) == (2, ["china", "flower"])


def test_class_to_idx_knows_numbers_by_their_digits_and_gives_names(photos, tmp_path):
    """A list's 00 is a number; the key "00" is a name, and "0" would be another."""
    (tmp_path / "train.txt").write_text("china/00.png 00\nflower/00.png 01\n")
    (tmp_path / "val.txt").write_text("flower/01.png 01\n")
    p = params(photos, splits_path=str(tmp_path), class_to_idx={"00": 1, "01": 0})
    with pytest.raises(ValueError, match="label 0 is the name of class 1 and the number of another"):
        listed(p)
    for class_to_idx, expected in (
        ({"00": 5, "01": 6}, [0, 1]),
        ({"00": 0, "01": 1}, [0, 1]),
        ({"x": 1, "y": 0}, [0, 1]),
    ):
        assert [*listed(params(photos, splits_path=str(tmp_path), class_to_idx=class_to_idx)).values()] == expected
    names = {0: "01", 1: "02", 2: "03"}  # no class is called 00, so 0 is a number
    assert class_labels.class_names_of({0, 1, 2}, [f"{name}={number}" for number, name in names.items()]) == names
    root = write(tmp_path / "numbers", {name: name.replace("china", "0").replace("flower", "1") for name in NAMES})
    shifted = params(root, class_to_idx={"0": 1, "1": 2})
    assert facts.count_classes(shifted) == (2, ["0", "1"])


def test_nested_folders(tmp_path):
    place = {name: f"{'ab'[int(name[-5]) % 2]}/{name}" for name in NAMES}
    write(tmp_path, place)
    first, last = (params(tmp_path, labels_from=f"{end}_folder") for end in ("first", "last"))
    assert all(label == (path[0] == "b") for path, label in listed(first).items())
    assert all(label == ("flower" in path) for path, label in listed(last).items())
    assert set(listed(params(tmp_path, labels_from=None)).values()) == {-1}
    Image.fromarray(TILES["china"][0]).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="1 of the 51 images for train .* have no label, such as stray.png"):
        listed(first)


def test_flat_images_have_no_labels(tmp_path):
    sets = three(params(write(tmp_path, {name: name.replace("/", "_") for name in NAMES})))
    assert [len(one) for one in sets] == [40, 5, 5] and {v for one in sets for v in one.values()} == {-1}


def test_patterns(photos, tmp_path):
    def chosen(**patterns) -> set[str]:
        return {name for one in three(params(photos, **patterns)) for name in one}

    assert chosen(include_patterns=["china/*"]) == {name for name in NAMES if "china" in name}
    assert chosen(exclude_patterns=["0*.png"]) == {name for name in NAMES if "/0" not in name}
    both = chosen(include_patterns=["*/1?.png"], exclude_patterns=["flower/*", "15.*"])
    assert both == {f"china/1{i}.png" for i in range(10) if i != 5}
    with pytest.raises(ValueError, match="holds 50 images .*exclude_patterns=.* select none"):
        chosen(exclude_patterns=["*"])
    for name, pattern in (
        ("exclude_patterns", "chinas/*"),
        ("exclude_patterns", "*.PNG"),
        ("include_patterns", "*.jpg"),
    ):
        with pytest.raises(ValueError, match=rf"{name}='{re.escape(pattern)}' matches none of the 50 .*china/00.png"):
            chosen(
                include_patterns=["*.png", pattern] if name == "include_patterns" else [], exclude_patterns=[pattern]
            )
    with pytest.raises(ValueError, match="holds 0 images"):
        listed(params(tmp_path))
    with pytest.raises(ValueError, match="data_path=.*nowhere.* is not a directory"):
        listed(params(tmp_path / "nowhere"))


def test_class_to_idx(photos, tmp_path):
    file = tmp_path / "lr=0.1" / "classes.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"flower": 0, "china": 5}))
    for given in ({"flower": 0, "china": 5}, str(file), ["flower=0", "china=5"]):
        p = params(photos, class_to_idx=given)
        assert p.class_to_idx == ["flower=0", "china=5"]
        assert listed(p)["china/00.png" if "china/00.png" in listed(p) else "china/01.png"] == 1
        assert set(listed(p).values()) == {0, 1} and n_classes(p) == 2
    with pytest.raises(ValueError, match="class_to_idx has no number for flower"):
        listed(params(photos, class_to_idx={"china": 0}))


def test_fraction_is_stratified_nested_and_of_training_images_only(photos):
    whole, half, fifth = (params(photos, data_fraction=fraction) for fraction in (1.0, 0.5, 0.2))
    assert set(listed(fifth)) < set(listed(half)) < set(listed(whole))
    counts = np.bincount(list(listed(whole).values()))
    assert np.bincount(list(listed(half).values())).tolist() == [count // 2 for count in counts]
    assert three(half)[1:] == three(whole)[1:]


@pytest.mark.slow
def test_the_fraction_of_a_pretraining_leaves_the_labels_of_evaluations_alone(photos, trainer, tmp_path):
    p = params(photos, data_fraction=0.2, evaluations=["rank_me"], probe_on_training_set=True)
    model, fit = SelfSupervisedMethod(p), trainer(limit_val_batches=1.0)
    fit.fit(model)
    assert len(fit.train_dataloader.dataset) == len(listed(p)) < len(listed(params(photos)))
    assert len(fit.val_dataloaders[1].dataset) == len(listed(params(photos)))
    fit.save_checkpoint(tmp_path / "x.ckpt")
    encoder, there = load_encoder(tmp_path / "x.ckpt"), {"data_path": str(photos)}
    assert features.data_params(encoder, **there).data_fraction == 1
    assert features.data_params(encoder, **there, data_fraction=0.5).data_fraction == 0.5
    assert LinearClassifierMethod.from_moco_checkpoint(tmp_path / "x.ckpt", **there).params.data_fraction == 1
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "x.ckpt", **there, data_fraction=0.5)
    assert linear.params.data_fraction == 0.5


def test_splits_are_written_once_and_reused(tmp_path, caplog):
    root = write(tmp_path / "photos")
    p = params(root, splits_path=str(tmp_path / "run" / "splits"))
    sets = three(p)
    assert (tmp_path / "run/splits/val.txt").read_text() == "".join(f"{k},{v}\n" for k, v in sets[1].items())
    (root / "ant").mkdir()  # would be class 0
    Image.fromarray(TILES["china"][0]).save(root / "ant" / "new.png")
    with caplog.at_level("INFO"):
        assert three(p) == sets
    assert caplog.text.count(f"1 images are in none of the lists in {tmp_path}/run/splits and are not used") == 1
    assert three(attrs.evolve(p, splits_path=None)) != sets
    with (tmp_path / "run/splits/train.txt").open("a") as file:  # as the line says
        file.write("ant/new.png,-1\n")
    assert listed(p) == {**sets[0], "ant/new.png": -1}
    with caplog.at_level("INFO"):
        listed(attrs.evolve(p, splits_path=str(tmp_path / "others")))
        listed(attrs.evolve(p, splits_path=str(tmp_path / "others")))
    assert caplog.text.count("none of the lists") == 1
    gone = next(iter(sets[2]))
    (root / gone).unlink()
    with pytest.raises(ValueError, match=f"test.txt lists images that are not in .*photos: {gone}.*images of the run"):
        listed(p)


def test_the_lists_of_a_run_are_left_out_for_other_images(photos, tmp_path):
    p = params(photos, splits_path=str(tmp_path / "splits"))
    listed(p)
    others = write(tmp_path / "others", {name: name.replace("/", "/other") for name in NAMES})
    encoder = SimpleNamespace(params=p)
    with pytest.raises(ValueError, match="not in .*others: .* If data_path holds others, pass --splits_path none"):
        listed(features.data_params(encoder, data_path=str(others)))
    sets = three(features.data_params(encoder, data_path=str(others), splits_path=None))
    assert sum(map(len, sets)) == len(NAMES)


def test_a_directory_that_is_missing_is_named_with_its_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="'nowhere' is not .* of a run, are read from .*directory, ") as caught:
        listed(params(Path("nowhere")))
    assert str(tmp_path) in str(caught.value) and "DATA_PATH" not in str(caught.value)
    with pytest.raises(ValueError, match="folder' is not a directory. Pass .* images, or set DATA_PATH"):
        data_sets.get_dataset(attrs.evolve(params(tmp_path), data_path=None), ("train",))


@pytest.mark.parametrize(
    "changed",
    [
        {"val_size": 0.3},
        {"test_size": 0},
        {"data_seed": 1},
        {"labels_from": None},
        {"include_patterns": ["china/*"]},
        {"exclude_patterns": ["china/0*"]},
        {"class_to_idx": ["china=1", "flower=0"]},
    ],
)
def test_lists_made_by_other_settings_are_refused(photos, tmp_path, changed):
    p = params(photos, splits_path=str(tmp_path))
    sets = three(p)
    ((name, value),) = changed.items()
    was = re.escape(repr(getattr(p, name)))
    with pytest.raises(ValueError, match=f"splits_path=.* {name}={was}, not {re.escape(repr(value))}"):
        listed(attrs.evolve(p, **changed))
    assert three(attrs.evolve(p, lr=0.1, seed=3)) == sets


def test_odd_names_are_kept_in_the_lists(tmp_path):
    odd = {
        "china/00.png": " china/ 00.png",
        "china/01.png": "china/a\x85b.png",
        "china/02.png": "china/a, b.png 2,3.png",
        "china/04.png": '"china", 3/1.png',
    }
    p = params(write(tmp_path / "photos", odd), splits_path=str(tmp_path / "splits"), labels_from="last_folder")
    p = attrs.evolve(p, class_to_idx=["china=1", " china=1", '"china", 3=1', "flower=0"])
    sets = three(p)
    assert set(odd.values()) < {path for one in sets for path in one} and three(p) == sets
    (tmp_path / "photos/china/03.png").rename(tmp_path / "photos/china/3\n.png")
    assert len(listed(attrs.evolve(p, splits_path=None))) == len(sets[0])
    (tmp_path / "photos/flower/03.png").rename(tmp_path / "photos/flower/\udce9.png")  # a byte that is not UTF-8
    with pytest.raises(ValueError, match=r"'china/3\\n.png', 'flower/\\udce9.png' \(2 in all\). Rename") as caught:
        listed(attrs.evolve(p, splits_path=str(tmp_path / "others")))
    assert str(tmp_path) not in str(caught.value) and not (tmp_path / "others/splits.json").exists()


TWO = "china/01.png\nflower/00.png\n"
AB = {"class_to_idx": {"a": 5, "b": 2}}


@pytest.mark.parametrize("beside", [True, False], ids=["beside the images", "in splits_path"])
@pytest.mark.parametrize(
    ("train", "val", "fields", "expected"),
    [
        ("./china/01.png\n./flower/00.png\n", "flower/./01.png", {}, [0, 1, 1]),
        ("ROOT/china/01.png\nflower/00.png\n", "ROOT/flower/01.png", {}, [0, 1, 1]),
        ("\ufeffchina/01.png\tb\nflower/00.png\ta\n", "flower/01.png a", {}, [1, 0, 0]),
        (f"{TWO}china/01.png\n", "flower/01.png", {}, [0, 1, 1]),
        ("flower/00.png 7", "flower/01.png 7", {"labels_from": None}, [-1, -1]),
        ('"china/01.png","4"', '"flower/01.png",""', {}, [0, -1]),
        ("china/01.png 4\nflower/00.png 3", "flower/01.png", {}, [1, 0, -1]),
        ("china/01.png 20240101\nflower/00.png 7", "flower/01.png 7", {}, [1, 0, 0]),
        ("china/01.png b\nflower/00.png a", "flower/01.png b", AB, [0, 1, 0]),
        ('"china/01.png", b\n"flower/00.png","a"', '"flower/01.png" a', {}, [1, 0, 0]),
        ('china/01.png,"big, ""red"""\nflower/00.png,a', 'flower/01.png "a"', {}, [1, 0, 0]),
        ("china/01.png 2\nflower/00.png 5", "flower/01.png 2", AB, [0, 1, 0]),
        ("china/01.png cat\nflower/00.png Cats", "flower/01.png cat", {"class_to_idx": ["cat=3", "Cats=3"]}, [0, 0, 0]),
        ("china/01.png café\nflower/00.png a", "flower/01.png cafe\u0301", {}, [1, 0, 1]),
        ("china/01.png cat\nflower/00.png dog", "flower/01.png Cats", {}, "val has .* 1 of 1: 'Cats' .nearest: 'cat'"),
        ("china/01.png 1\nflower/00.png 2", "flower/01.png 3", {}, "val has classes that train lacks, 1 of 1: '3'"),
        (TWO, "flower/01.png", {"exclude_patterns": ["china/*"]}, [0, 0]),
        (
            "china/01.png 0\nflower/00.png rose",
            "flower/01.png 0",
            {},
            "are numbers, such as 0, .* such as rose",
        ),
        ("china/01.png -5", "flower/01.png 0", {}, "label=-5"),
        (TWO, "./flower/00.png", {}, "flower/00.png is in train and in val"),
        ("china/01.png 1\nchina/01.png 0", "flower/00.png 0", {}, "china/01.png has two labels in train.txt"),
        ("/china/01.png 1", "flower/00.png 0", {}, "train.txt lists /china/01.png, .* not below .*data_path"),
        ("../photos/china/01.png 1", "flower/00.png 0", {}, "lists ../photos/china/01.png, .* not below"),
        (None, "flower/01.png", {}, "VAL.txt: there is no train.txt"),
        (
            "china/01.png 1 0\n",
            "flower/01.png 0",
            {},
            "train.txt has more than a path and a label in 'china/01.png 1 0'",
        ),
        ("china/01.png,1,train\n", "flower/01.png 0", {}, "more than a path and a label in 'china/01.png,1,train'"),
        ("china/01.png 3 wheels\nflower/00.png tench, Tinca", "flower/01.png 3 wheels", {}, [0, 1, 0]),
        ('china/01.png,"7, 11"\nflower/00.png,"1,000 things"', 'flower/01.png,"7, 11"', {}, [1, 0, 1]),
    ],
)
def test_lists_are_read_wherever_they_are(tmp_path, beside, train, val, fields, expected):
    root = write(tmp_path / "photos")
    folder = root if beside else tmp_path / "lists"
    folder.mkdir(exist_ok=True)
    for split, text in (("train", train), ("VAL", val)):
        if text is not None:
            (folder / f"{split}.txt").write_text(text.replace("ROOT", str(root)))
    before = sorted(folder.iterdir())
    p = params(root, splits_path=None if beside else str(folder), **fields)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            listed(p)
    else:
        assert [*listed(p).values(), *listed(p, "val").values()] == expected and set(listed(p)) < set(NAMES)
    assert sorted(folder.iterdir()) == before  # the user's lists are never overwritten


@pytest.mark.parametrize("own", ['{"train": ["china/01.png"]}', '["a"]', "no JSON"])
def test_a_file_of_the_users_may_be_called_as_that_of_the_settings(photos, tmp_path, own):
    (tmp_path / "splits.json").write_text(own)
    (tmp_path / "train.txt").write_text("china/01.png\nflower/00.png\n")
    (tmp_path / "val.txt").write_text("flower/01.png\n")
    assert listed(params(photos, splits_path=str(tmp_path))) == {"china/01.png": 0, "flower/00.png": 1}


def test_unlabeled_images_in_lists_are_drawn_from_and_do_not_hide_the_labels(photos, tmp_path, caplog):
    lists = tmp_path / "lists"
    listed(params(photos, splits_path=str(lists), val_size=0.2))
    lines = (lists / "train.txt").read_text().splitlines()
    unlabeled = [f"{line.rpartition(',')[0]},-1" for line in lines[::2]]
    (lists / "train.txt").write_text("\n".join([*lines[1::2], *unlabeled]) + "\n")
    half = data_sets.get_dataset(params(photos, splits_path=str(lists), val_size=0.2, data_fraction=0.5), ("train",))
    assert (half.labels < 0).sum() == pytest.approx(len(unlabeled) / 2, abs=1)
    assert class_labels.lacking([np.array([-1, 0, 1])]) == "" != class_labels.lacking([np.array([-1, -1])])
    assert class_labels.lacking([np.array([0, 1]), np.array([-1, 1])]) == "a single class"


@pytest.mark.parametrize(("bits", "values"), [(16, ">i2"), (-32, ">f4")])
def test_fits_whose_values_pillow_does_not_keep_is_refused_with_a_way_out(bits, values, tmp_path):
    """It ignores BZERO, by which unsigned 16 bits are stored."""
    cards = ["SIMPLE  = T", f"BITPIX  = {bits}", "NAXIS   = 2", "NAXIS1  = 4", "NAXIS2  = 4", "BZERO   = 32768", "END"]
    header = "".join(card.ljust(80) for card in cards).ljust(2880)
    (tmp_path / "x.fits").write_bytes(header.encode() + np.zeros(16, values).tobytes().ljust(2880, b"\0"))
    with pytest.raises(ValueError, match="Convert it to .npy or TIFF"):
        image_files.read_any("x.fits", str(tmp_path / "x.fits"), 3, [0, 100])


def test_lists_know_every_setting_that_is_not_of_another_place():
    others = {"data_path", "splits_path", "pixel_range", "data_fraction"}
    names = set(CUSTOM_DATA)
    assert set(custom.list_settings(EncoderAndDataParams(dataset_name="folder"))) == names - others
    check_settings(Path(), {"val_size": 0.1}, {"val_size": 0.1, "image_key": "jpg"})  # lists of an earlier version


def test_lists_of_pandas_have_whole_floats_and_names_of_any_case(photos, tmp_path):
    """pandas writes a column of integers with a gap as floats."""
    lines = [f"china/{i:02}.png {label}" for i, label in enumerate(("2.0", "10.0", "0.0"))]
    (tmp_path / "Train.TXT").write_text("\n".join(lines))
    (tmp_path / "val.txt").write_text("china/03.png 10\n")
    p = params(photos, splits_path=str(tmp_path))
    assert list(listed(p).values()) == [1, 2, 0] and list(listed(p, "val").values()) == [2]
    assert folders.as_label("-1.0") is None and folders.as_label("1.5") == "1.5"


def test_a_list_that_is_not_in_utf_8_is_named(photos, tmp_path):
    (tmp_path / "train.txt").write_bytes("china/01.png España\n".encode("latin-1"))
    with pytest.raises(ValueError, match="train.txt is not encoded in UTF-8"):
        listed(params(photos, splits_path=str(tmp_path)))


def test_pages_in_colors_are_no_channels(tmp_path):
    page = Image.fromarray(TILES["china"][0])
    page.save(tmp_path / "0.tif", save_all=True, append_images=[page])
    with pytest.raises(ValueError, match="its 2 pages are separate images"):
        data_sets.get_dataset(params(tmp_path, val_size=0, test_size=0), ("train",))[0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["aeroplane", "bus", "train"], "has train, and 40 images outside them, such as aeroplane/00.png. .*"),
        (["Train", "Val"], [20, 20, 20]),
        (["training", "validation", "TEST"], [20, 20, 20]),
        (["val", "test"], "0 images for training, but some for test and val.*train"),
        (["cats", "test"], "0 images for training, but some for test"),
        (["train", "val", "masks"], "has train and val, and 20 images outside them, such as masks/00.png"),
        (["train/train", "train/bus"], [32, 4, 4]),
    ],
)
def test_folders_called_like_splits(tmp_path, names, message):
    for name in names:
        (tmp_path / name).mkdir(parents=True)
        for j in range(20):
            Image.fromarray(TILES["china"][j]).save(tmp_path / name / f"{j:02}.png")
    (tmp_path / "empty" / "val").mkdir(parents=True)
    if isinstance(message, list):
        assert [len(one) for one in three(params(tmp_path))] == message
        return
    with pytest.raises(ValueError, match=message):
        listed(params(tmp_path))
    if "masks" in names:
        assert len(listed(params(tmp_path, exclude_patterns=["masks/*"]))) == 20


def test_what_is_refused_at_construction(photos):
    for wrong, message in [
        ({"val_size": 0.5, "test_size": 0.5}, "val_size=0.5 and test_size=0.5"),
        ({"pixel_range": [1, 0]}, "pixel_range"),
        ({"pixel_range": [0, float("inf")]}, "pixel_range=.* must be two finite numbers"),
        ({"class_to_idx": ["cat"]}, "class_to_idx='cat' could not be read"),
        ({"class_to_idx": {"cat": -1}}, "class_to_idx"),
        ({"class_to_idx": ["cat=-1"]}, "class_to_idx=.* must give each class a whole number"),
        ({"include_patterns": "*.png"}, "include_patterns='\\*.png' must be a list"),
        ({"labels_from": "name"}, "labels_from='name' is unknown"),
        ({"data_fraction": 0.0}, "data_fraction"),
    ]:
        with pytest.raises(ValueError, match=message):
            params(photos, **wrong)
    with pytest.raises(ValueError, match="data_path='x' is for your own images, not for dataset_name='digits'"):
        ModelParams(dataset_name="digits", data_path="x")
    with pytest.raises(ValueError, match="no images for val. Set val_size or test_size"):
        listed(params(photos, val_size=0.0, test_size=0.0), "val")
    with pytest.raises(ValueError, match="splits_path=.*00.png' is a file"):
        listed(params(photos, splits_path=str(photos / "china/00.png")))
    two = {"include_patterns": ["*/00.png", "*/01.png"]}
    with pytest.raises(
        ValueError, match="val_size=0.1: no class of the 4 .* test_size=0, add images, or set labels_from=None"
    ):
        listed(params(photos, **two))
    assert [len(listed(params(photos, val_size=0.0, **two), split)) for split in ("train", "test")] == [2, 2]


# ---- pixels ----


def one_image(tmp_path: Path, save, **fields) -> torch.Tensor:
    """Return what an evaluation sees of a file, at the size at which its central square is not resized: [C, 28, 28]."""
    tmp_path.mkdir(exist_ok=True)
    for i in range(3):
        save(tmp_path / f"{i}")
    p = params(tmp_path, transform_crop_size=28, val_size=0, test_size=0, **fields)
    return data_sets.get_dataset(p, ("train",))[0][0]


@pytest.mark.parametrize("kind", ["npy", "npy planes", "tif", "tif planes", "tif deflate", "png"])
@pytest.mark.parametrize("channels", [1, 3, 4, 13])
def test_pixels_of_any_number_of_channels_are_exact(tmp_path, kind, channels):
    if (kind == "png" and channels == 13) or ("planes" in kind and channels == 1):
        pytest.skip("no such file")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, channels), dtype=np.uint8)
    stored = pixels.transpose(2, 0, 1) if "planes" in kind else pixels[..., 0] if channels == 1 else pixels
    stored = np.ascontiguousarray(stored)

    def save(path: Path) -> None:
        if kind.startswith("npy"):
            np.save(f"{path}.npy", stored)
        elif kind.startswith("tif"):
            options = {"photometric": "rgb" if channels in (3, 4) and "planes" not in kind else "minisblack"}
            tifffile.imwrite(f"{path}.tif", stored, **options, compression="zlib" if "deflate" in kind else None)
        else:
            Image.fromarray(stored).save(f"{path}.png")

    if kind == "tif planes" and channels == 3:  # PIL would read only the first page
        for wrong in (1, 3):
            with pytest.raises(
                ValueError, match="its 3 pages of one size are channels. Set in_channels .* pixel_range"
            ):
                one_image(tmp_path, save, in_channels=wrong)
        found = one_image(tmp_path, save, in_channels=channels, pixel_range=[0, 255])
    else:
        found = one_image(tmp_path, save, in_channels=channels)
    assert torch.equal(found, torch.from_numpy(pixels[2:30, 2:30]).permute(2, 0, 1))


def test_values_of_other_types(tmp_path):
    ramp = np.linspace(0, 1, 32 * 32).reshape(32, 32)

    def expected(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values[2:30, 2:30].astype(np.uint8))[None]

    def read(name: str, values: np.ndarray, **fields) -> torch.Tensor:
        folder = tmp_path / name
        folder.mkdir()
        return one_image(folder, lambda path: np.save(f"{path}.npy", values), in_channels=1, **fields)

    assert torch.equal(read("floats", ramp.astype(np.float32)), expected(np.round(ramp.astype(np.float32) * 255.0)))
    deep = (ramp * 65535).astype(np.uint16)
    assert torch.equal(read("uint16", deep), expected(deep / 257))  # rounded down
    assert torch.equal(read("big endian", deep.astype(">u2")), expected(deep / 257))
    reflectance = (ramp * 12000).astype(np.int16)
    shown = np.round((reflectance.clip(1000, 10000) - 1000.0) / 9000 * 255)
    assert torch.equal(read("int16", reflectance, pixel_range=[1000, 10000]), expected(shown))
    for name, values, message in [
        ("int32", reflectance.astype(np.int32), "type int32 .*pixel_range"),
        ("above", ramp * 2, "values from 0 to 2 are not within 0 to 1"),
        ("nan", np.where(ramp > 0.5, np.nan, ramp), "not finite"),
        ("shape", np.zeros((32, 32, 5), np.uint8), r"shape \(32, 32, 5\) is not an image with in_channels=1"),
        ("objects", np.array([{}]), "allow_pickle"),
    ]:
        with pytest.raises(ValueError, match=f"0.npy could not be read as an image .*{message}"):
            read(name, values)


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "uint32"])
def test_tiffs_of_unknown_range_are_told_the_way_out(tmp_path, kind):
    """Pillow would read them as nearly black."""
    values = np.linspace(0, 100, 32 * 32).reshape(32, 32).astype(kind) - (kind == "int16")
    for channels in (1, 3):
        with pytest.raises(ValueError, match=f"type {kind} is unknown. Set pixel_range"):
            one_image(tmp_path, lambda path: tifffile.imwrite(f"{path}.tif", values), in_channels=channels)
    shown = one_image(
        tmp_path, lambda path: tifffile.imwrite(f"{path}.tif", values), in_channels=1, pixel_range=[0, 100]
    )
    assert torch.equal(shown[0], torch.from_numpy(np.rint(values.clip(0) * 2.55).astype(np.uint8)[2:30, 2:30]))
    if kind != "int32":
        with pytest.raises(ValueError, match="the range of values of its type is unknown. Set pixel_range"):
            one_image(
                tmp_path, lambda path: tifffile.imwrite(f"{path}.tif", np.stack([values] * 3, 2), photometric="rgb")
            )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_gray_of_16_bits_is_scaled_and_has_a_range(tmp_path, channels):
    """PIL would clip 16-bit images at 255. The last of two or four channels is opacity."""
    deep = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    for fields, gray in (
        ({}, deep // 257),
        ({"pixel_range": (np.float32(0), 4095)}, np.round(deep.clip(0, 4095) / 16.06)),
    ):
        found = one_image(
            tmp_path, lambda path: Image.fromarray(deep).save(f"{path}.png"), in_channels=channels, **fields
        )
        expected = torch.from_numpy(gray[2:30, 2:30].astype(np.int16)).expand(channels, -1, -1).clone()
        if channels in (2, 4):
            expected[-1] = 255
        assert (found.short() - expected).abs().max() <= (1 if fields else 0)


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """Return a PNG of pixels [H, W, C], which Pillow cannot write with more than one channel."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def test_a_range_of_values_that_pillow_has_scaled_is_refused(tmp_path):
    """It would be applied to other values, or not at all: 12 bits in 16 would be nearly black."""
    deep = np.linspace(0, 4095, 32 * 32 * 4).reshape(32, 32, 4).astype(np.uint16)
    for stored in (2, 3, 4):
        for channels in (1, 3, 4):
            folder = tmp_path / f"{stored}_{channels}"
            save = lambda path, n=stored: Path(f"{path}.png").write_bytes(png_of_16_bits(deep[..., :n]))  # noqa: E731
            with pytest.raises(ValueError, match="pixel_range cannot be applied: Pillow scales"):
                one_image(folder, save, in_channels=channels, pixel_range=[0, 4095])
    for maximum in (4095, 65535):
        content = f"P5 32 32 {maximum}\n".encode() + deep[..., 0].astype(">u2").tobytes()
        folder = tmp_path / str(maximum)
        save = lambda path, content=content: Path(f"{path}.pgm").write_bytes(content)  # noqa: E731
        if maximum == 4095:
            with pytest.raises(ValueError, match="pixel_range cannot be applied: Pillow scales"):
                one_image(folder, save, in_channels=1, pixel_range=[0, 4095])
        else:
            found = one_image(folder, save, in_channels=1, pixel_range=[0, 4095])
            assert torch.equal(found[0], torch.from_numpy(np.rint(deep[2:30, 2:30, 0] / 4095 * 255).astype(np.uint8)))


def test_bits_that_pillow_scales_in_jpeg_2000_and_sgi_are_refused_with_a_range(tmp_path):
    """15 bits of JPEG 2000 would be twice as bright, and 16 of SGI would keep their scale from 0 to 65535."""
    deep = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)
    for name, options in (("a.jp2", {}), ("a.sgi", {"bpc": 2})):
        kind = Image.fromarray(deep) if name == "a.jp2" else Image.fromarray((deep // 16).astype(np.uint8))
        save = lambda path, options=options, kind=kind, name=name: kind.save(f"{path}{name[1:]}", **options)  # noqa: E731
        one_image(tmp_path / name, save, in_channels=1)
        with pytest.raises(ValueError, match="pixel_range cannot be applied: Pillow scales"):
            one_image(tmp_path / name, save, in_channels=1, pixel_range=[0, 4095])


def tiff_of_12_bits(pixels: np.ndarray) -> bytes:
    """Return an uncompressed TIFF of pixels [H, W], two in three bytes, which no package here can write."""
    first, second = pixels.reshape(-1, 2).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()
    height, width = pixels.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8)]
    tags += [(277, 3, 1), (278, 4, height), (279, 4, len(packed))]
    rows = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = struct.pack("<I", 8 + len(packed))
    return b"II*\0" + start + packed + struct.pack("<H", len(tags)) + rows + bytes(4)


def test_tiffs_of_which_pillow_does_not_keep_the_meaning_are_refused(tmp_path):
    """12 bits in 16 would be nearly black, and with white as 0, 16 bits would be a negative, while 8 bits are not."""
    deep = np.linspace(0, 4095, 32 * 32).reshape(32, 32).astype(np.uint16)
    with pytest.raises(ValueError, match="the range of values of type uint12 is unknown. Set pixel_range"):
        one_image(tmp_path / "12", lambda path: Path(f"{path}.tif").write_bytes(tiff_of_12_bits(deep)), in_channels=1)
    negative = {"photometric": "miniswhite"}
    with pytest.raises(ValueError, match="its 16-bit pixels are white where they are 0"):
        one_image(tmp_path / "16", lambda path: tifffile.imwrite(f"{path}.tif", deep, **negative), in_channels=1)
    gray = (deep // 16).astype(np.uint8)
    found = one_image(tmp_path / "8", lambda path: tifffile.imwrite(f"{path}.tif", gray, **negative), in_channels=1)
    assert torch.equal(found[0], torch.from_numpy(255 - gray[2:30, 2:30]))


def test_tiffs_with_a_range_have_the_meaning_of_their_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)

    def read(name: str, stored: np.ndarray, channels: int, **options) -> torch.Tensor:
        folder = tmp_path / f"{name}{channels}"
        save = lambda path: tifffile.imwrite(f"{path}.tif", stored, **options)  # noqa: E731
        return one_image(folder, save, in_channels=channels, pixel_range=[0, 255])

    kept = torch.from_numpy(pixels[2:30, 2:30]).permute(2, 0, 1)
    assert torch.equal(read("rgba", pixels, 3, photometric="rgb", extrasamples=["unassalpha"]), kept[:3])
    assert torch.equal(read("rgba", pixels, 4, photometric="rgb", extrasamples=["unassalpha"]), kept)
    gray = {"photometric": "minisblack", "planarconfig": "contig", "extrasamples": ["unassalpha"]}
    assert torch.equal(read("la", pixels[..., :2], 3, **gray), kept[:1].expand(3, -1, -1))
    with pytest.raises(ValueError, match="its pixels are white where they are 0"):
        read("negative", pixels[..., 0], 1, photometric="miniswhite")
    colors = np.arange(768, dtype=np.uint16).reshape(3, 256)
    with pytest.raises(ValueError, match="its pixels are indices of a palette"):
        read("palette", pixels[..., 0], 3, photometric="palette", colormap=colors)
    for space, meaning in (("ycbcr", "YCbCr"), ("cielab", "L.a.b.")):
        with pytest.raises(ValueError, match=f"its pixels are {meaning}. Convert it to gray or RGB"):
            read(space, pixels[..., :3], 3, photometric=space)


def test_a_tiff_with_a_preview_of_itself_is_read_and_floats_are_told_the_way_out(tmp_path):
    photo = np.ascontiguousarray(TILES["china"][0][:32, :32])

    def with_preview(path: Path) -> None:
        Image.fromarray(photo).save(f"{path}.tif", save_all=True, append_images=[Image.fromarray(photo[::2, ::2])])

    found = one_image(tmp_path / "a", with_preview, in_channels=3)
    assert np.array_equal(found.permute(1, 2, 0), photo[2:30, 2:30])
    with pytest.raises(ValueError, match="floating-point pixels .*pixel_range"):
        one_image(tmp_path / "b", lambda path: Image.fromarray(photo[..., 0].astype(np.float32)).save(f"{path}.tif"))


def test_statistics_are_those_of_numpy(photos):
    model = SelfSupervisedMethod(params(photos, compute_statistics=True, transform_crop_size=35))
    pixels = []  # at 35, the central square of 40 pixels is not resized
    for name in listed(model.params):
        with Image.open(photos / name) as image:
            pixels.append(np.asarray(image, np.float64)[2:37, 2:37] / 255)
    # 7/8 of 40 pixels begin at 2.5: PIL interpolates between neighbors, which smooths by some percent
    np.testing.assert_allclose(model.params.image_mean, np.mean(pixels, (0, 1, 2)), atol=2e-3)
    np.testing.assert_allclose(model.params.image_std, np.std(pixels, (0, 1, 2)), rtol=0.1)
    assert model.hparams["image_mean"] == model.params.image_mean


def test_statistics_of_packed_sets(small):
    model = SelfSupervisedMethod(small(compute_statistics=True))
    pixels = data_sets.get_dataset(model.params, ("train",)).images[0] / 255
    np.testing.assert_allclose(model.params.image_mean, [pixels.mean()], rtol=1e-9)
    np.testing.assert_allclose(model.params.image_std, [pixels.std()], rtol=1e-9)
    own = SelfSupervisedMethod(small(compute_statistics=True, image_mean=[0.25])).params
    assert own.image_mean == [0.25] and own.image_std == model.params.image_std


# ---- training ----


def test_many_channels_train(tmp_path, trainer):
    rng = np.random.default_rng(0)
    for i in range(24):
        np.save(tmp_path / f"{i}.npy", rng.random((20, 30, 5), np.float32))
    model = SelfSupervisedMethod(params(tmp_path, in_channels=5, compute_statistics=True))
    fit = trainer()
    fit.fit(model)
    assert np.allclose(model.params.image_mean, 0.5, atol=0.02) and fit.global_step == 2
    assert next(model.parameters()).shape[1] == 5


@pytest.mark.slow
def test_a_folder_without_labels_trains_and_is_measured(tmp_path, trainer, caplog):
    p = params(write(tmp_path / "flat", {name: name.replace("/", "_") for name in NAMES}))
    model, fit = SelfSupervisedMethod(p), trainer(limit_val_batches=1.0)
    with caplog.at_level("INFO"):
        fit.fit(model)
    assert "valid_rank_me" in fit.callback_metrics and "valid_class_acc" not in fit.callback_metrics
    assert caplog.text.count("dataset_name='folder' has no labels") == 1
    scores = fit.test(model, verbose=False)[0]
    assert "test_rank_me" in scores and not any("acc" in name for name in scores)
    fit.save_checkpoint(tmp_path / "flat.ckpt")
    with pytest.raises(ValueError, match="data_path=.*flat': the images have no labels"):
        LinearClassifierMethod.from_moco_checkpoint(tmp_path / "flat.ckpt")
    encoder = load_encoder(tmp_path / "flat.ckpt")
    with pytest.raises(ValueError, match=r"'svm' needs labels, but the images of folder have none\. .*rank_me"):
        runnable(["svm"], encoder, encoder.params)
    assert "rank_me" in runnable(None, encoder, encoder.params)
    other = load_encoder(tmp_path / "flat.ckpt", dataset_name="cifar10").params
    assert other.dataset_name == "cifar10" and other.data_path is None


def test_protocols_without_labels_say_that_the_settings_have_none(photos, capsys):
    p, encoder = params(photos, labels_from=None), SimpleNamespace(model=torch.nn.Flatten())
    with pytest.raises(ValueError, match="'knn' .*labels_from=None, .*--labels_from first_folder. Choose"):
        runnable(["knn"], encoder, p)
    assert "knn" not in runnable(None, encoder, p)
    assert "labels are left out. Each needs labels, but the images of folder have none: lab" in capsys.readouterr().out
    assert "knn" in runnable(None, encoder, attrs.evolve(p, labels_from="first_folder"))
    assert "left out" not in capsys.readouterr().out


def test_one_class_is_named(tmp_path, trainer, caplog):
    model = SelfSupervisedMethod(params(write(tmp_path, {name: f"one/{name.replace('/', '_')}" for name in NAMES})))
    with caplog.at_level("INFO"):
        trainer().validate(model, verbose=False)
    assert "dataset_name='folder' has a single class" in caplog.text
    with pytest.raises(ValueError, match="'knn' needs two classes, but the training images of folder have one"):
        runnable(["knn"], SimpleNamespace(model=model.model), model.params)
    with pytest.raises(ValueError, match="save_best='valid_knn20_acc' is not logged"):
        preflight.check_run(RunOptions(save_best=["valid_knn20_acc"]), model.params)
    with pytest.raises(ValueError, match="a single class, and a classifier needs two"):
        preflight.check_labels(model.params)


def test_secret_labels_of_test_images_are_predicted_and_not_scored(tmp_path, trainer):
    """The layout of a competition: `test` has no class folders."""
    of_test = {name: f"test/{name.replace('/', '_')}" for name in NAMES if name.endswith("0.png")}
    p = params(write(tmp_path, {name: f"train/{name}" for name in NAMES} | of_test))
    with pytest.raises(
        ValueError, match="'linear' needs labels, but the test images .* none. .* with exclude_patterns"
    ):
        runnable(["linear"], SimpleNamespace(model=torch.nn.Flatten()), p)
    others = attrs.evolve(p, exclude_patterns=["test/*"])
    assert list(runnable(["linear"], SimpleNamespace(model=torch.nn.Flatten()), others)) == ["linear"]
    settings = {name: getattr(p, name) for name in FROM_PRETRAINING} | {"batch_size": 8}
    with pytest.raises(ValueError, match="dataset_name='folder' has images without a label"):
        trainer(limit_val_batches=1.0).fit(LinearClassifierMethod(**settings))
    model = LinearClassifierMethod(**{**settings, "exclude_patterns": ["test/*"]})
    trainer(limit_val_batches=1.0).fit(model)
    secret = data_sets.get_dataset(p, p.dataset.test_splits).files  # which the method predicts
    assert [path for path, _ in secret] == [str(tmp_path / path) for path in sorted(of_test.values())]


def test_runs_that_drew_the_same_lists_are_compared(photos, tmp_path):
    """Each run has its own file of them, and the same images, whose directory has several spellings."""
    seen = []
    for name in ("a_0", "a_1"):
        p = params(f"{photos}/" if name == "a_1" else photos, splits_path=str(tmp_path / name / "splits"))
        seen.append(fingerprints.seen(p))
        (tmp_path / name / "config.yaml").write_text(f"splits_path: {p.splits_path}\nseed: {name[-1]}\n")
    assert seen[0] == seen[1] and seen[0] != fingerprints.seen(params(photos, exif_orientation=False))
    assert seen[0]["images"] != fingerprints.seen(params(photos, data_seed=1))["images"]
    (tmp_path / "a_1").rename(tmp_path / "moved")
    (tmp_path / "c").mkdir()  # was given config.yaml of the first
    (tmp_path / "c/config.yaml").write_text(f"splits_path: {tmp_path / 'a_0/splits'}\nseed: 2\n")
    (group,), rows = compare.compare([tmp_path / name for name in ("a_0", "moved", "c")])
    assert len(group) == 3 and not rows
    (tmp_path / "b/splits").mkdir(parents=True)  # empty: the lists are those of the user
    (tmp_path / "b/config.yaml").write_text("splits_path: fold/splits\nseed: 0\n")
    assert len(compare.compare([tmp_path / "a_0", tmp_path / "b"])[0]) == 2


@pytest.mark.slow
def test_resumed_training_and_workers_change_nothing(photos, resumes_as_uninterrupted):
    resumes_as_uninterrupted(lambda workers: SelfSupervisedMethod(params(photos, num_data_workers=workers)))


@pytest.mark.slow
def test_the_program_scores_the_test_set_and_keeps_the_splits(photos, tmp_path, monkeypatch):
    p = params(photos)
    names = [
        "dataset_name",
        "data_path",
        "transform_crop_size",
        "encoder_arch",
        "num_data_workers",
        "batch_size",
        "dim",
    ]
    options = [text for name in names for text in (f"--{name}", str(getattr(p, name)))]
    line = ["train.py", "simclr", *options, "--max_epochs", "1", "--linear_epochs", "1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", [*line, "--compute_statistics", "true", "--online_classifier", "--seed", "0"])
    train_program.main()
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert {"test_class_acc", "test_knn20_acc", "test_rank_me", "test_online_acc1"} <= results["test set"].keys()
    assert 0 <= results["linear classifier"]["valid_acc1"] <= 100
    found = [(tmp_path / f"run/splits/{split}.txt").read_text().splitlines() for split in ("train", "val", "test")]
    assert [len(lines) for lines in found] == [40, 5, 5]
    config = (tmp_path / "run/config.yaml").read_text()
    monkeypatch.setattr(sys, "argv", [*line, "--resume", "auto", "--val_size", "0.3"])
    with pytest.raises(SystemExit, match="splits_path=.* val_size=0.1, not 0.3"):
        train_program.main()
    assert (tmp_path / "run/config.yaml").read_text() == config
    encoder = load_encoder(tmp_path / "run/pretrained.ckpt")
    assert encoder.params.image_mean is not None and listed(encoder.params).keys() == listed(p).keys()
    linear = LinearClassifierMethod.load_from_checkpoint(tmp_path / "run/linear.ckpt")
    assert linear.classifier.out_features == linear.params.n_classes == 2
    others = write(tmp_path / "others", {name: f"{name.replace('/', '/other')}" for name in NAMES})
    line = ["evaluate.py", str(tmp_path / "run/pretrained.ckpt"), "--data_path", str(others)]
    line += ["--protocols", "uniformity"]
    monkeypatch.setattr(sys, "argv", line)
    with pytest.raises(SystemExit, match="lists images that are not in .*others: .* another splits_path"):
        evaluate.main()
    monkeypatch.setattr(sys, "argv", [*line, "--splits_path", str(tmp_path / "drawn"), "--include_patterns", "none"])
    evaluate.main()
    assert "/other" in (tmp_path / "drawn/test.txt").read_text()
    (tmp_path / "run").rename(tmp_path / "moved")
    kept = str(tmp_path / "moved/splits")
    assert load_encoder(tmp_path / "moved/pretrained.ckpt").params.splits_path == kept
    config = ["--config", str(tmp_path / "moved/config.yaml"), "--out", str(tmp_path / "moved"), "--resume", "auto"]
    monkeypatch.setattr(sys, "argv", ["train.py", *config])
    train_program.main()
    assert not (tmp_path / "run").exists() and kept in (tmp_path / "moved/config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:1 files could not be read")
def test_an_unreadable_image_ends_no_run_for_good_and_lists_are_kept(tmp_path, capsys):
    photos = write(
        tmp_path / "photos", {name: f"{'test' if name.endswith('0.png') else 'train'}/{name}" for name in NAMES}
    )
    broken = {split: photos / split / "china" / name for split, name in (("train", "01.png"), ("test", "10.png"))}
    for path in broken.values():
        path.write_bytes(b"")
    size = "--transform_crop_size 32 --encoder_arch timm:earlier_tiny --batch_size 8 --dim 8 --mlp_hidden_dim 8"
    line = f"simclr --dataset_name folder --data_path photos {size} --num_data_workers 0 --seed 0 --evaluations rank_me"
    line = f"{line} --val_size 0.2 --max_epochs"
    (photos / "val/china").mkdir(parents=True)
    shutil.copy(photos / "test/china/20.png", photos / "val/china")
    with pytest.raises(SystemExit, match="train/china/01.png could not be read"):
        train_program.main(f"{line} 1 --out run".split())
    broken["train"].unlink()
    with pytest.raises(SystemExit, match="test/china/10.png could not be read"):
        train_program.main(f"{line} 1 --out run --data_seed 1".split())
    assert "run starts over with changed settings: data_seed 0 -> 1" in capsys.readouterr().out
    assert {"epochs", "trained encoder"} <= json.loads((tmp_path / "run/results.json").read_text()).keys()
    line = f"{line} 1 --data_seed 1 --unreadable_images skip --resume"
    train_program.main(f"{line} auto --out run".split())
    assert "test set" in json.loads((tmp_path / "run/results.json").read_text())
    Image.new("RGB", (SIDE, SIDE)).save(photos / "train/china/new.png")
    train_program.main(f"{line} run --out other --max_epochs 2".split())
    assert f"splits_path: {tmp_path / 'run/splits'}" in (tmp_path / "other/config.yaml").read_text()
    p = params(photos, data_seed=1, val_size=0.2)
    assert earlier_run.with_resumed_lists(p, tmp_path / "run", "auto").splits_path == str(tmp_path / "run/splits")


@pytest.mark.slow
def test_an_encoder_of_unlabeled_images_is_evaluated_on_a_directory_of_labels(tmp_path, monkeypatch):
    write(tmp_path / "unlabeled", {name: f"batch/{name.replace('/', '_')}" for name in NAMES})
    labeled = write(tmp_path / "labeled", {name: f"{name.split('/')[0]}/day/{name.split('/')[1]}" for name in NAMES})
    size = "--transform_crop_size 32 --encoder_arch timm:earlier_tiny --batch_size 8 --dim 8 --mlp_hidden_dim 8"
    line = f"simclr --dataset_name folder --data_path unlabeled --labels_from none {size} --num_data_workers 0"
    train_program.main(f"{line} --max_epochs 1 --seed 0 --evaluations [] --out run".split())
    with pytest.raises(SystemExit, match="needs labels, but the images of folder have none"):
        evaluate.main(["run", "--protocols", "knn"])
    with pytest.raises(SystemExit, match="lists were created with labels_from=None, not 'first_folder'"):
        evaluate.main(["run", "--labels_from", "first_folder", "--protocols", "knn"])  # of images that were trained on
    options = "--labels_from first_folder --test_size 0.4 --no_baselines --protocols knn"
    evaluate.main(f"run --data_path labeled {options}".split())
    (found,) = json.loads((tmp_path / "run/pretrained.evaluation/results.json").read_text())["runs"]
    assert (found["seen"]["labels_from"], found["seen"]["test_size"]) == ("first_folder", 0.4)
    assert len((tmp_path / "run/splits/train.txt").read_text().splitlines()) == 40  # the pretraining's, as they were
    encoder = load_encoder("run")
    sets = three(params(labeled, test_size=0.4))
    train, _, test = ({path: read_square(labeled / path) for path in of_split} for of_split in sets)
    assert (len(train), len(test)) == (25, 20)
    x, y = (encoder.embed(torch.stack(list(images.values()))).numpy() for images in (train, test))
    nearest = KNeighborsClassifier(1, metric="cosine").fit(x, [path.split("/")[0] for path in train])
    expected = 100 * nearest.score(y, [path.split("/")[0] for path in test])
    assert found["scores"]["knn1_acc1"] == pytest.approx(expected)
    with pytest.raises(SystemExit, match="needs labels"):  # None is a value
        evaluate.main(f"run --data_path labeled {options} --labels_from none".split())
    with pytest.raises(SystemExit, match="class_to_idx has no number for flower"):
        evaluate.main(f"run --data_path labeled {options} --class_to_idx china=0".split())


def read_square(path: Path) -> torch.Tensor:
    """Return an image as evaluations see it: its central square, [C, 32, 32]."""
    return central_square(Image.open(path).convert("RGB"), 32)


HINT = "; labels_from=None (--labels_from none) if these are not classes"
TWO = f"2 classes from the first folder: china (30 images), flower (20 images){HINT}"
DAYS = [*[f"day{i} (5 images)" for i in range(10, 16)], *["day16 (4 images)", "day17 (4 images)"]]  # i, i + 12, i + 24
DAYS += ["day18 (3 images)", "day19 (3 images)"]


def by_day(name: str) -> str:
    return f"a/day{10 + int(name[-6:-4]) % 12}/{name[0]}{name[-6:-4]}.png"


@pytest.mark.parametrize(
    ("names", "fields", "expected"),
    [
        (str, {}, TWO),
        ("train/{}".format, {}, TWO),
        ("a/{}".format, {}, f"1 class from the first folder: a (50 images){HINT}"),
        (
            by_day,
            {"labels_from": "last_folder"},
            f"12 classes from the last folder: {', '.join(DAYS)} and 2 more{HINT}",
        ),
        (lambda name: name.replace("/", "_"), {}, "none"),
        (str, {"labels_from": None}, "none"),
        (
            str,
            {"class_to_idx": ["flower=3", "china=5"]},
            f"2 classes from the first folder: flower (20 images), china (30 images){HINT}",
        ),
    ],
)
def test_the_names_that_became_classes_are_named(names, fields, expected, tmp_path):
    write(tmp_path / "images", {name: names(name) for name in NAMES})
    for lists in (None, str(tmp_path / "lists"), str(tmp_path / "lists")):  # drawn, drawn and written, read
        p = params(tmp_path / "images", splits_path=lists, data_fraction=0.5, **fields)
        for split in ("train", "test"):
            assert data_sets.get_dataset(p, (split,)).about_labels == expected
    (tmp_path / "images/train.txt").write_text("".join(f"{names(name)} {int(name[-5]) % 2}\n" for name in NAMES))
    if not fields:
        line = f"2 classes from lists: 0 (25 images), 1 (25 images){HINT}"
        assert data_sets.get_dataset(params(tmp_path / "images"), ("train",)).about_labels == line


def test_a_run_says_once_which_names_became_classes(tmp_path, monkeypatch, capsys, caplog):
    write(tmp_path / "photos")
    size = "--transform_crop_size 32 --encoder_arch timm:earlier_tiny --batch_size 8 --dim 8 --mlp_hidden_dim 8"
    line = f"simclr --dataset_name folder --data_path photos {size} --num_data_workers 0 --max_epochs 1".split()
    monkeypatch.setenv("COLUMNS", "200")
    with caplog.at_level("INFO"):
        train_program.main([*line, "--splits_path", "lists", "--dry_run"])
    assert not (tmp_path / "lists").exists()
    assert caplog.text.count(f"labels: {TWO}") == 1
    assert re.search(rf"│ labels +│ {re.escape(TWO)} +│", capsys.readouterr().out)
    caplog.clear()
    with caplog.at_level("INFO"):
        train_program.main([*line, "--out", "run"])
    for log in (caplog.text, (tmp_path / "run/log.txt").read_text()):
        assert log.count(f"labels: {TWO}") == log.count(TWO) == 1
    facts = tables.facts_of_run(compare.read_run("run"), "run")["facts"]
    assert facts["labels"] == TWO
    for split, n in (("train", 2), ("val", 1)):
        for i, name in enumerate(NAMES[:n] + NAMES[-n:]):
            path = tmp_path / "imagenet" / split / f"n{name[:5]}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "photos" / name, path)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    imagenet = attrs.evolve(params(tmp_path), dataset_name="imagenet", data_path=None)
    of_train = data_sets.get_dataset(imagenet, ("train",)).about_labels
    assert of_train == "2 classes from the class folders: nchina (2 images), nflowe (2 images)"
    assert data_sets.get_dataset(imagenet, ("val",)).about_labels == ""


@pytest.mark.slow
def test_examples_of_the_page(photos, tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text()
    blocks = [block.split("```")[0] for block in page.split("```python\n")[1:]]
    assert blocks
    code = "\n".join(blocks)
    places = {"photos": photos, "june": photos / "flower", "december": photos / "china"}
    for name, path in places.items():
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(path)))
    textures = tmp_path / "data/dtd/dtd"  # torchvision would download them
    for folder in ("images/dotted", "labels"):
        (textures / folder).mkdir(parents=True)
    for split in ("train", "val", "test"):
        Image.fromarray(TILES["china"][0]).save(textures / f"images/dotted/{split}.jpg")
        (textures / f"labels/{split}1.txt").write_text(f"dotted/{split}.jpg\n")
    caches = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    processes.run(processes.run_code, 1, tmp_path / "process", code, str(tmp_path), caches)
    assert (tmp_path / "data/dtd_folders/test/0/test.jpg").resolve().is_file()


@pytest.mark.slow
@pytest.mark.parametrize("version", ["this", "earlier"])
@pytest.mark.parametrize("images", ["gone", "with one class more"])
def test_a_classifier_is_loaded_where_the_images_are_others(images, version, photos, tmp_path, trainer):
    """The checkpoint stores the number of classes; resuming it on other data names the difference."""
    root = shutil.copytree(photos, tmp_path / "photos")
    online = SelfSupervisedMethod(params(root, online_classifier=True, evaluations=[]))
    fields = {"dataset_name": "folder", "data_path": str(root), "batch_size": 8, "num_data_workers": 0, "seed": 0}
    fields |= {"encoder_arch": "shufflenet_v2_x0_5", "transform_crop_size": 32}
    linear = LinearClassifierMethod(lr=0.1, **fields)
    for name, method in (("online", online), ("linear", linear)):
        fit = trainer(limit_train_batches=1, limit_val_batches=0)
        fit.fit(method)
        fit.save_checkpoint(tmp_path / f"{name}.ckpt", weights_only=False)
        content = checkpoints.read_checkpoint(tmp_path / f"{name}.ckpt")
        if version == "earlier":
            content["hyper_parameters"].pop("n_classes")
        torch.save(content, tmp_path / f"{name}.ckpt")
    if images == "gone":
        shutil.rmtree(root)
    else:
        shutil.copytree(next(path for path in root.iterdir() if path.is_dir()), root / "zebra")
    for name, method in (("online", online), ("linear", linear)):
        loaded = type(method).load_from_checkpoint(tmp_path / f"{name}.ckpt")
        assert loaded.state_dict().keys() == method.state_dict().keys()
        assert getattr(loaded, loaded.CLASSIFIER).out_features == 2
    assert load_encoder(tmp_path / "online.ckpt").params.data_path == str(root)
    if images != "gone":
        with pytest.raises(ValueError, match="n_classes|classifier"):
            again = LinearClassifierMethod(lr=0.1, **fields)
            trainer(max_epochs=2).fit(again, ckpt_path=tmp_path / "linear.ckpt")
