"""Mistakes that the settings, the data or the machine reveal are refused before any work is done."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import save_checkpoint
from PIL import Image

from moco import SelfSupervisedMethod
from self_supervised import evaluate, train
from self_supervised.data import data_sets, loading
from self_supervised.runs import preflight
from self_supervised.runs.preflight import check_run
from self_supervised.runs.run_options import RunOptions
from self_supervised.training.monitor import GradientNorms, LearningRate

SMALL = "--encoder_arch shufflenet_v2_x0_5 --transform_crop_size 16 --dim 8 --mlp_hidden_dim 8 --batch_size 8 --seed 0"


def images(folder: Path, n: int = 12) -> None:
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def refused(line: str, message: str, monkeypatch) -> None:
    """train.py ends with this message, and the run's folder holds nothing that it trained or drew."""
    monkeypatch.setattr(sys, "argv", ["train.py", "simclr", *SMALL.split(), "--out", "run", *line.split()])
    with pytest.raises(SystemExit, match=message):
        train.main()
    assert not list(Path("run").glob("**/*.*"))


@pytest.mark.parametrize(
    "line, message",
    [
        ("--linear_epochs 1", "labels"),
        ("--linear_epochs 1 --evaluations [] --dry_run", "labels"),
        ("--batch_size 64", "batch_size"),
        ("--val_size 0 --test_size 0", "val_size"),
    ],
)
def test_what_images_without_labels_cannot_do_is_refused_before_the_run(line, message, monkeypatch):
    images(Path("flat"))
    refused(f"--dataset_name folder --data_path flat --num_data_workers 0 {line}", message, monkeypatch)


@pytest.mark.parametrize(
    "line, message",
    [
        ("--linear_epochs 1 --evaluations []", "imagenet.val"),
        ("--evaluations [] --in_channels 1", "in_channels=1"),
        ("--evaluations [] --data_on_device true", "data_on_device=True"),
    ],
)
def test_a_missing_split_or_another_number_of_channels_is_refused_before_the_run(line, message, monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "data"))
    for name in ("cat", "dog"):
        images(tmp_path / "data" / "imagenet" / "train" / name)
    refused(f"--dataset_name imagenet --num_data_workers 0 {line}", message, monkeypatch)


@pytest.mark.parametrize("processes", [{"devices": 2}, {"devices": 1, "num_nodes": 2}])
def test_batches_are_those_of_all_processes_which_have_not_started_yet(processes, small):
    params = small("simclr", batch_size=1000)  # of 1,297 images
    check_run(RunOptions(), params)
    with pytest.raises(ValueError, match="batch_size=1000: the 1297 .*batch of 1000 on each of 2 processes. Choose"):
        check_run(RunOptions(**processes), params)
    params = small("simclr", batch_size=33, global_batch_size=33)
    check_run(RunOptions(), params)
    with pytest.raises(ValueError, match="global_batch_size=33 is not divisible by 2 = 2 processes x 1 accumulated"):
        check_run(RunOptions(**processes), params)


def test_a_linear_stage_of_fewer_images_than_its_batch_is_one_batch(monkeypatch, tmp_path, small):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    for folder in ("train/cat", "train/dog", "val/cat"):
        images(tmp_path / "imagenet" / folder, 6)
    params = small("simclr", dataset_name="imagenet", batch_size=4, evaluations=[])
    check_run(RunOptions(linear_epochs=1), params)


def test_a_linear_stage_on_many_processes_may_have_less_than_a_batch_on_each(small):
    params = small("simclr")  # 1,297 images for training
    assert "drop_last_batch" not in preflight.linear_settings(RunOptions(linear_epochs=1), params)
    assert preflight.linear_settings(RunOptions(linear_epochs=1, devices=8), params)["drop_last_batch"] is None


@pytest.mark.parametrize("name", ["limit_train_batches", "limit_val_batches"])
def test_a_fraction_of_less_than_one_batch_is_refused(name, small):
    with pytest.raises(ValueError, match=f"{name}=0.001: less than one of .* batches. Choose a larger fraction"):
        check_run(RunOptions(**{name: 0.001}), small("simclr"))
    check_run(RunOptions(**{name: 0.5}), small("simclr"))
    whole = small("simclr", global_batch_size=2000, batch_size=2000)  # in batches of 250: five an epoch
    check_run(RunOptions(**{name: 0.5}, accumulate_grad_batches=8), whole)


def test_multiple_labels_of_an_image_are_refused_by_a_linear_stage(monkeypatch, small):
    monkeypatch.setattr(data_sets, "get_dataset", lambda *_: range(300))
    monkeypatch.setattr(loading, "get_loader", lambda *_, **__: None)
    with pytest.raises(ValueError, match="voc07"):
        check_run(RunOptions(linear_epochs=1), small("simclr", dataset_name="voc07"))


def test_an_unknown_metric_of_save_best_is_refused_before_the_training(monkeypatch):
    line = "--dataset_name digits --evaluations knn --max_epochs 1000 --save_best accuracy"
    refused(line, "save_best='accuracy'", monkeypatch)
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore:collapse")
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "simclr", "evaluations": ["knn", "rank_me"], "online_classifier": True},
        {"preset": "sce", "sce_coefficient_schedule": "cosine", "evaluations": ["knn"], "probe_on_training_set": True},
        {"preset": "vicreg", "prediction_mlp_layers": 1},
    ],
)
def test_the_names_of_metrics_are_those_of_a_run(settings, small, trainer):
    params = small(dataset_name="digits", transform_crop_size=8, **settings)
    fit = trainer(max_epochs=1, limit_val_batches=8, callbacks=[LearningRate(), GradientNorms()])
    fit.fit(SelfSupervisedMethod(params))
    assert preflight.metric_names(RunOptions(log_gradient_norms=True), params) >= set(fit.callback_metrics)
    without = preflight.metric_names(RunOptions(limit_val_batches=0), params)
    assert without == {name for name in fit.callback_metrics if not re.search("valid|grad_norm|class_acc", name)}


def test_scores_of_unlabeled_images_are_no_metrics_that_need_labels(tmp_path, small):
    images(tmp_path / "photos", 20)
    params = small("simclr", dataset_name="folder", data_path=tmp_path / "photos", labels_from=None)
    with pytest.raises(ValueError, match="save_best='valid_knn20_acc' is not logged: choose one of .*valid_rank_me"):
        check_run(RunOptions(save_best=["valid_knn20_acc"]), params)


def test_probes_of_a_training_set_need_two_classes_there_alone(tmp_path, small):
    for folder in ("train/cat", "train/dog", "val/cat"):
        images(tmp_path / "photos" / folder, 8)
    settings = {"dataset_name": "folder", "data_path": tmp_path / "photos", "online_classifier": True}
    wanted = ["valid_knn20_acc_trainset", "valid_online_acc1"]
    check_run(RunOptions(save_best=wanted), small("simclr", **settings, probe_on_training_set=True))
    with pytest.raises(ValueError, match="save_best='valid_knn20_acc' is not logged"):
        check_run(RunOptions(save_best=["valid_knn20_acc"]), small("simclr", **settings))


def test_a_file_in_place_of_the_runs_folder_is_refused(monkeypatch):
    Path("file").touch()
    refused("--dataset_name digits --out file/run", "out=file/run", monkeypatch)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"device": "nonsense"}, "device='nonsense'"),
        ({"device": "meta"}, "device='meta'"),
        ({"out": "file"}, "out=file"),
        ({"protocols": ["knn", "linear_sgd"], "training": {"max_epochs": 0}}, "max_epochs"),
        ({"protocols": ["knn", "linear_sgd"], "seeds": [0, -1]}, "seed"),
    ],
)
def test_evaluate_refuses_before_the_first_protocol_runs(options, message, small, monkeypatch):
    Path("file").touch()
    save_checkpoint(SelfSupervisedMethod(small(transform_crop_size=16)), "a.ckpt")
    monkeypatch.setattr(evaluate, "run_protocols", lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=message):
        evaluate.evaluate_checkpoint("a.ckpt", **{"protocols": ["knn"], "baselines": False, **options})


def test_no_image_is_held_out_if_nothing_is_scored(small, capsys):
    for name in ("cat", "dog"):
        images(Path("photos") / name)
    line = "--dataset_name folder --data_path photos --num_data_workers 0 --evaluations [] --val_size 0 --test_size 0"
    train.main(["simclr", *SMALL.split(), *line.split(), "--dry_run", "--preview", "views.png"])
    assert "24 for training" in capsys.readouterr().out and Path("views.png").is_file()
    fields = {"dataset_name": "folder", "data_path": "photos", "transform_crop_size": 16, "num_data_workers": 0}
    save_checkpoint(SelfSupervisedMethod(small(**fields, evaluations=[], val_size=0, test_size=0)), "a.ckpt")
    (run,) = evaluate.evaluate_checkpoint("a.ckpt", ["rank_me"], baselines=False, device="cpu")["runs"]
    assert run["scores"]["rank_me"] > 1
    with pytest.raises(ValueError, match="photos has no images for test"):
        evaluate.evaluate_checkpoint("a.ckpt", ["rank_me", "knn"], baselines=False, device="cpu")


def test_a_dry_run_counts_the_images_that_a_validation_scores(small, monkeypatch, capsys):
    """Those of val, which a directory of images has, and not those of test, which are scored after the training."""
    monkeypatch.setenv("COLUMNS", "160")
    images(Path("photos"), 40)
    line = "--dataset_name folder --data_path photos --num_data_workers 0 --evaluations rank_me --dry_run"
    train.main(["simclr", *SMALL.split(), *line.split(), "--val_size", "0.2", "--test_size", "0.1"])
    assert "28 for training, 8 for evaluation" in capsys.readouterr().out


def test_a_dry_run_names_all_unreadable_images_at_once(monkeypatch, tmp_path, capsys):
    """The corrupt files are known beforehand; a run alone would stop at the first of them."""
    images(tmp_path / "photos", 40)
    broken = [tmp_path / "photos" / f"{i}.png" for i in range(0, 40, 4)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    line = f"--dataset_name folder --data_path {tmp_path / 'photos'} --num_data_workers 0 --evaluations [] --dry_run"
    monkeypatch.setattr(preflight, "MOST_SKIPPED", 4)
    with pytest.raises(SystemExit) as exit_:
        train.main(["simclr", *SMALL.split(), *line.split(), "--val_size", "0", "--test_size", "0"])
    message = str(exit_.value)
    assert "by the lists in" not in capsys.readouterr().err  # of a directory that no longer exists
    assert "10 of 40 images cannot be read" in message and "and 6 more" in message
    assert sum(f"{path} (OSError: image file is truncated" in message for path in broken) == 4
    monkeypatch.undo()
    for split in ("train", "val"):  # which also stands for test
        images(tmp_path / "split" / split, 20)
    (tmp_path / "split/val/1.png").write_bytes(b"")
    line = line.replace(str(tmp_path / "photos"), str(tmp_path / "split")).replace("[]", "rank_me")
    with pytest.raises(SystemExit, match=r"1 of 40 images cannot be read: [^,]* \(Unid[^,]*\). Fix"):
        train.main(["simclr", *SMALL.split(), *line.split()])
