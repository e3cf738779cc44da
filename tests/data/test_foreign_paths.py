"""Paths in a checkpoint's settings: a stranger's are neither read nor created, those of the user's runs are found."""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import train
from self_supervised.data import data_sets
from self_supervised.data.foreign_paths import ForeignPath, is_near, run_of, vetted, vetted_start
from self_supervised.embeddings.embed import embed
from self_supervised.evaluate import evaluate_checkpoint
from self_supervised.networks.pretrained import load_encoder
from self_supervised.runs import earlier_run

pytestmark = pytest.mark.filterwarnings("ignore:collapse")


def photographs(folder: Path, first: int = 0, n: int = 20) -> Path:
    rng = np.random.default_rng(first)
    for name in "ab":
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(first, first + n):
            pixels = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:03}.png")
    return folder


@pytest.fixture
def strangers(tmp_path, small):
    """Return strangers(data_path=...), which writes a checkpoint with these settings to a directory of its own."""

    def write(**settings) -> Path:
        model = SelfSupervisedMethod(
            small(transform_crop_size=32, in_channels=3, image_mean=[0.5] * 3, image_std=[0.2] * 3)
        )
        content = {"state_dict": model.state_dict(), "pytorch-lightning_version": "2.0.0", "started_from": None}
        content["hyper_parameters"] = {**model.hparams, "dataset_name": "folder", "num_data_workers": 0, **settings}
        (tmp_path / "downloads").mkdir(exist_ok=True)
        torch.save({**content, "started_from": settings.pop("started_from", None)}, tmp_path / "downloads" / "x.ckpt")
        return tmp_path / "downloads" / "x.ckpt"

    return write


def test_images_and_lists_that_a_stranger_names_are_not_read(strangers, tmp_path):
    private = photographs(tmp_path / "private")
    for where in (str(private), f"{private}/{{a,b}}.tar", "../private", f"{tmp_path}/downloads/../private"):
        file = strangers(data_path=where, splits_path=str(tmp_path / "made"))
        assert load_encoder(file).params.data_path == where  # kept, but not used
        for load in (evaluate_checkpoint, LinearClassifierMethod.from_moco_checkpoint):
            with pytest.raises(ValueError, match="data_path=.*Pass data_path"):
                load(file)
        model = SelfSupervisedMethod.load_from_checkpoint(file)
        with pytest.raises(ValueError, match="data_path=.*Pass data_path"):
            data_sets.get_dataset(model.params, ("test",))
        assert type(model.hparams.data_path) is str  # so that it can be saved
    file = strangers(data_path=str(private), splits_path=str(tmp_path / "made"))
    with pytest.warns(UserWarning, match="splits_path=.*not written"):
        found = evaluate_checkpoint(file, ["knn"], baselines=False, data_path=str(private), out=tmp_path / "scores")
    assert found["runs"] and not (tmp_path / "made").exists()
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("a/000.png\n")
    with pytest.raises(ValueError, match="splits_path=.*Pass splits_path"):
        evaluate_checkpoint(strangers(splits_path=str(lists)), ["knn"], baselines=False, data_path=str(private))
    embed(file, private, tmp_path / "features.parquet")  # does not need the checkpoint's paths


def test_files_that_a_stranger_names_are_not_opened(strangers, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", str(tmp_path / "pipe"), "/etc/hostname"):
        for load in (load_encoder, SelfSupervisedMethod.load_from_checkpoint):
            with pytest.raises(ValueError, match="class_to_idx"):
                load(strangers(class_to_idx=[name]))
            load(strangers(encoder_weights=name))
        with pytest.raises(ValueError, match="class_to_idx"):
            ModelParams(dataset_name="folder", class_to_idx=name)
        assert load_encoder(strangers(class_to_idx=[name]), class_to_idx=["a=0"]).params.class_to_idx == ["a=0"]
        encoder = load_encoder(strangers(started_from=name))
        assert isinstance(encoder.started_from, ForeignPath)
    file = strangers(started_from=str(tmp_path / "pipe"), data_path=str(photographs(tmp_path / "downloads" / "images")))
    with pytest.warns(UserWarning, match="started from .*pass starting_weights"):
        found = evaluate_checkpoint(file, ["rank_me"])  # images next to the file
    assert {run["encoder"] for run in found["runs"]} == {"random", "trained"}


def test_what_is_near(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    run = run_of(tmp_path / "run" / "x.ckpt")
    near = [
        "photos",
        "shards/*.tar",
        f"{tmp_path}/data/photos",
        f"{tmp_path}/run/splits",
        f"{tmp_path}/run/t-{{0..3}}.tar",
    ]
    far = [
        "../photos",
        "/etc",
        "~/photos",
        f"{tmp_path}/run2",
        "{/etc,a}.tar",
        f"{tmp_path}/run/../x",
        f"{tmp_path}/r*.tar",
    ]
    assert [is_near(path, run) for path in near] == [True] * len(near)
    assert [is_near(path, run) for path in far] == [False] * len(far)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "link").symlink_to("/etc")
    assert not is_near(f"{tmp_path}/run/link", run)
    assert not is_near(str(Path.home() / "photos"), run_of(Path.home() / "x.ckpt"))
    (tmp_path / "run" / "config.yaml").write_text("data_path: /photos\nencoder_weights: start.pth\n")
    checkpoint = tmp_path / "run" / "pretraining" / "checkpoints" / "best_x.ckpt"
    for file in (checkpoint, tmp_path / "run" / "pretrained.ckpt"):
        assert not isinstance(vetted({"data_path": "/photos"}, file)["data_path"], ForeignPath)
        assert isinstance(vetted({"data_path": "/others"}, file)["data_path"], ForeignPath)
    assert vetted_start("resnet18:DEFAULT", checkpoint) == "resnet18:DEFAULT"
    assert not isinstance(vetted_start(os.path.abspath("start.pth"), checkpoint), ForeignPath)


def test_a_moved_run_keeps_its_lists_if_another_run_takes_its_place(tmp_path):
    old, moved = tmp_path / "x", tmp_path / "archive" / "x"
    for run in (old, moved):
        (run / "splits").mkdir(parents=True)
        (run / "splits" / "train.txt").touch()
        (run / "config.yaml").write_text(f"splits_path: {old / 'splits'}\n")
    found = vetted({"splits_path": str(old / "splits")}, moved / "pretrained.ckpt")
    assert found["splits_path"] == str(moved / "splits")
    (tmp_path / "lists").mkdir()  # lists that were passed
    (moved / "config.yaml").write_text(f"splits_path: {tmp_path / 'lists'}\n")
    found = vetted({"splits_path": str(tmp_path / "lists")}, moved / "pretrained.ckpt")
    assert found["splits_path"] == str(tmp_path / "lists")


@pytest.mark.slow
def test_a_run_of_images_with_own_splits_may_lose_its_lists(tmp_path, monkeypatch):
    """New lists have the same splits."""
    for split in ("train", "val", "test"):
        photographs(tmp_path / "photos" / split)
    line = f"""simclr --dataset_name folder --data_path {tmp_path}/photos --encoder_arch small_cnn --num_data_workers 0
        --transform_crop_size 32 --batch_size 8 --mlp_hidden_dim 8 --dim 8 --seed 0 --evaluations rank_me
        --logger csv --out {tmp_path}/run --resume auto --max_epochs"""
    train.main([*line.split(), "1"])
    shutil.rmtree(tmp_path / "run/splits")
    train.main([*line.split(), "2"])
    assert {file.name for file in (tmp_path / "run/splits").iterdir()} > {"train.txt", "val.txt", "test.txt"}


@pytest.mark.slow
def test_a_resumed_run_whose_lists_are_gone_is_refused(tmp_path, monkeypatch):
    """New ones would have images of its training in val and test, if images were added."""
    photos = photographs(tmp_path / "photos")
    line = f"""simclr --dataset_name folder --data_path {photos} --encoder_arch small_cnn --num_data_workers 0
        --transform_crop_size 32 --batch_size 8 --mlp_hidden_dim 8 --dim 8 --seed 0 --evaluations rank_me
        --logger csv --out"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DATA_PATH", raising=False)
    train.main([*line.split(), "first", "--max_epochs", "1"])
    train.main([*line.split(), "second", "--max_epochs", "2", "--resume", "first"])
    shutil.copytree("first/splits", "mine")
    train.main([*line.split(), "third", "--max_epochs", "1", "--splits_path", "mine"])
    photographs(photos, 100, 6)  # the collection grows
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    train.main([*line.split(), "../third", "--max_epochs", "2", "--resume", "auto"])
    assert {file.name for file in (tmp_path / "mine").iterdir()} == {
        file.name for file in (tmp_path / "first/splits").iterdir()
    }
    shutil.rmtree(tmp_path / "first")
    for options in ([], ["--splits_path", "nowhere"]):
        with pytest.raises(SystemExit, match="splits_path=.*: there are no lists of the splits of the resumed run"):
            train.main([*line.split(), "../second", "--max_epochs", "3", "--resume", "auto", *options])
        assert not list(tmp_path.glob("second/splits/*")) and not Path("nowhere").exists()
    train.main([*line.split(), "../second", "--max_epochs", "3", "--resume", "auto", "--splits_path", "../mine"])


def test_lists_of_a_start_without_a_checkpoint_are_drawn_again_with_new_images(tmp_path, small):
    params = small("simclr", dataset_name="folder", data_path=str(photographs(tmp_path / "photos")), data_seed=0)
    for grown in (False, False, True):
        if grown:
            photographs(tmp_path / "photos", 100, 6)
        found = earlier_run.with_lists(params, tmp_path / "run", "auto")
        lists = tmp_path / "run/splits"
        assert lists.is_dir() == (not grown and (tmp_path / "run/config.yaml").is_file())
        data_sets.get_dataset(found, found.dataset.pretraining_splits)  # draws them
        (tmp_path / "run/config.yaml").write_text("preset: simclr\n")
    (tmp_path / "run/pretrained.ckpt").touch()  # the run has trained on these
    photographs(tmp_path / "photos", 200, 6)
    earlier_run.with_lists(params, tmp_path / "run", "auto")
    assert lists.is_dir()


@pytest.mark.slow
def test_every_checkpoint_of_a_moved_run_finds_its_lists(tmp_path, monkeypatch):
    photos, old, new = photographs(tmp_path / "photos"), tmp_path / "old" / "run", tmp_path / "new" / "run"
    line = f"""simclr --dataset_name folder --data_path {photos} --encoder_arch shufflenet_v2_x0_5 --num_data_workers 0
        --transform_crop_size 32 --batch_size 8 --max_epochs 1 --evaluations knn
        --save_best valid_knn20_acc --linear_epochs 1 --save_every_n_epochs 1 --mlp_hidden_dim 8 --dim 8 --seed 0
        --logger csv --out {old}"""
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    train.main()
    lists = {file.name: file.read_text() for file in (old / "splits").glob("*.txt")}
    shutil.move(old.parent, new.parent)
    photographs(photos, 100, 6)  # the collection grows
    checkpoints = sorted((new / "pretraining" / "checkpoints").glob("*.ckpt"))
    assert {file.name.split("_")[0] for file in checkpoints} == {"best", "step", "epoch"}
    for file in (*checkpoints, new / "pretrained.ckpt"):
        encoder = load_encoder(file)
        assert encoder.params.splits_path == str(new / "splits") and encoder.params.data_path == str(photos)
        tested = data_sets.get_dataset(encoder.params, ("test",)).files
        assert {str(Path(path).relative_to(photos)) for path, _ in tested} == {
            line.split(",")[0] for line in lists["test.txt"].splitlines()
        }
        assert SelfSupervisedMethod.load_from_checkpoint(file).params.splits_path == str(new / "splits")
    linear = LinearClassifierMethod.load_from_checkpoint(new / "linear.ckpt")
    assert linear.params.splits_path == str(new / "splits")
    evaluate_checkpoint(checkpoints[0], ["knn"], baselines=False)
    assert not old.parent.exists() and json.loads((new / "splits" / "splits.json").read_text())["classes"] == ["a", "b"]
    assert {file.name: file.read_text() for file in (new / "splits").glob("*.txt")} == lists
