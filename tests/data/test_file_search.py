"""Search for image files: hidden files and other kinds are passed over by every search, and counted."""

import os

import numpy as np
import pytest
from PIL import Image
from test_custom_data import params

from model_params import SimCLRParams
from self_supervised.data import custom, data_sets, file_search
from self_supervised.data.file_search import PassedOver, files_below, image_suffixes, is_hidden
from self_supervised.data.folders import entries
from self_supervised.data.image_files import samples_in_class_folders
from self_supervised.data.video_files import videos_in_class_folders
from self_supervised.embeddings.sources import open_source

HIDDEN = (".ipynb_checkpoints/1.png", "a/._1.png", "a/.DS_Store", "__MACOSX/a/1.png", "a/.cache/deep/2.png")


def save(path, kind: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(path, kind)


def found_below(base) -> tuple[list[str], dict[str, int]]:
    passed_over = PassedOver()
    paths = sorted(files_below(base, image_suffixes(), passed_over))
    return paths, {reason: n for reason, (n, _) in passed_over.items()}


def own(root, **fields):
    return data_sets.get_dataset(params(root, val_size=0, test_size=0, **fields), ("train",))


def test_one_list_of_extensions_for_all_that_read_images(tmp_path):
    kinds = {".jfif": "JPEG", ".jpe": "JPEG", ".gif": "GIF", ".jp2": "JPEG2000", ".avif": "AVIF", ".tga": "TGA"}
    assert {".jfif", ".jpe", ".gif", ".npy", ".webp", ".mpo"} <= set(image_suffixes())
    kinds = {
        suffix: kind for suffix, kind in kinds.items() if kind in Image.SAVE
    }  # older versions of Pillow do not have AVIF
    assert image_suffixes()[:3] == (".jpg", ".jpeg", ".png")  # the order is a preference in shards
    assert {".pdf", ".eps", ".mpg", ".h5", ".txt", ".mp4", ".heic"}.isdisjoint(image_suffixes())
    for split in ("imagenet/train", "own"):
        for suffix, kind in kinds.items():
            save(tmp_path / split / "a" / f"1{suffix}", kind)
            save(tmp_path / split / "b" / f"2{suffix.upper()}", kind)
    names = sorted(f"{name}{suffix}" for s in kinds for name, suffix in (("a/1", s), ("b/2", s.upper())))
    dataset = own(tmp_path / "own")
    assert sorted("/".join(path.split("/")[-2:]) for path, _ in dataset.files) == names
    assert {dataset[i][0].shape for i in range(len(names))} == {(3, 32, 32)}
    assert len(samples_in_class_folders(tmp_path / "imagenet" / "train")) == len(names)
    assert open_source(tmp_path / "own").paths() == names
    assert list(entries("a/one, two.jp2 3\nb/x.jfif,cat", tmp_path)) == [("a/one, two.jp2", 3), ("b/x.jfif", "cat")]


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_paths(name):
    assert is_hidden(name) and not is_hidden(name.replace(".ipynb", "ipynb").replace("/.", "/").replace("__MAC", "mac"))
    assert not is_hidden("./a/1.png") and not is_hidden("../a/1.png")
    assert is_hidden("a/@eaDir/1.jpg/SYNOPHOTO_THUMB_XL.jpg") and is_hidden("$RECYCLE.BIN/1.png")


def test_hidden_files_are_passed_over_by_every_search_also_below_a_hidden_folder(tmp_path, monkeypatch):
    root = tmp_path / ".cache" / "imagenet" / "train"
    for name in ("a/1.png", "b/2.png", *HIDDEN):
        save(root / name)
    expected = [("a/1.png", 0), ("b/2.png", 1)]
    assert [(os.path.relpath(path, root), label) for path, label in samples_in_class_folders(root)] == expected
    assert [(os.path.relpath(path, root), label) for path, label in own(root).files] == expected
    assert open_source(root).paths() == ["a/1.png", "b/2.png"]
    (root / ".empty").mkdir()
    for name in ("a/v", "b/v", ".ipynb_checkpoints/v", "a/.thumbnails"):
        save(root.parent / "frames" / name / "1.png")
    videos = videos_in_class_folders(root.parent / "frames", of_frames=True)
    assert [(os.path.relpath(path, root.parent / "frames"), label) for path, label in videos] == [
        ("a/v", 0),
        ("b/v", 1),
    ]
    monkeypatch.setenv("DATA_PATH", str(tmp_path / ".cache"))
    p = SimCLRParams(dataset_name="imagenet", transform_crop_size=16)
    assert data_sets.get_dataset(p, ("train",)).labels.tolist() == [0, 1]


def test_links_between_folders_give_each_image_once(tmp_path):
    for name in "abcdef":
        for i in range(3):
            save(tmp_path / name / f"{i}.png")
    for name in "abcdef":
        for other in "abcdef":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    real = sorted(f"{name}/{i}.png" for name in "abcdef" for i in range(3))
    assert found_below(tmp_path) == (real, {"links to folders that were already searched": 36})
    assert sorted(os.path.relpath(path, tmp_path) for path, _ in samples_in_class_folders(tmp_path)) == real


def test_class_folders_that_are_links_are_used(tmp_path):
    for name in ("x/1.png", "y/2.png"):
        save(tmp_path / "elsewhere" / name)
    (tmp_path / "train").mkdir()
    for name in "xy":
        (tmp_path / "train" / name).symlink_to(tmp_path / "elsewhere" / name)
    (tmp_path / "train" / "x" / "round").symlink_to(tmp_path / "train")
    expected = [(str(tmp_path / "train/x/1.png"), 0), (str(tmp_path / "train/y/2.png"), 1)]
    assert samples_in_class_folders(tmp_path / "train") == list(own(tmp_path / "train").files) == expected


def test_what_is_passed_over_is_counted_by_reason_and_said_once(tmp_path, caplog):
    for name in ("a/1.png", "a/2.png", "b/3.png"):
        save(tmp_path / name)
    for name in ("a/1.heic", "a/2.HEIC", "b/README", ".DS_Store", "b/x.txt"):
        (tmp_path / name).touch()
    assert found_below(tmp_path)[1] == {".heic": 2, "without an extension": 1, "hidden": 1, ".txt": 1}
    lists = tmp_path.with_name(f"{custom.TEMPORARY}{tmp_path.name}")
    with caplog.at_level("INFO"):
        for _ in range(2):  # the second time from lists, which a check of the run keeps for a moment
            own(tmp_path, exclude_patterns=["2.png"], splits_path=str(lists))
    assert caplog.text.count(f"{tmp_path}: 2 images; passed over: 2 .heic (such as ") == 1
    assert caplog.text.count("2 images") == 1
    for part in ("1 hidden", "1 .txt", "1 without an extension", "1 by include_patterns and exclude_patterns"):
        assert part in caplog.text
    with caplog.at_level("INFO"):
        samples_in_class_folders(tmp_path)
    assert f"{tmp_path}: 3 images; passed over: 2 .heic (such as " in caplog.text
    with pytest.raises(ValueError, match="c holds no images; passed over: .*heic"):
        (tmp_path / "c").mkdir()
        samples_in_class_folders(tmp_path)
    assert str(PassedOver({".txt": [1, "b\udcff/x.txt"]})) == "; passed over: 1 .txt (such as b\ufffd/x.txt)"
    many = PassedOver()
    for i in range(9):
        many.add(f".{i}", "x", n=10 - i)
    assert str(many).startswith("; passed over: 10 .0 (such as x), ") and str(many).endswith(", 9 others")


def test_folders_that_cannot_be_read_are_counted(tmp_path, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        save(tmp_path / name)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(file_search.os, "scandir", refuse)
    assert found_below(tmp_path) == (["a/1.png"], {"folders that cannot be read": 1})
