"""A run made in Python is reported and compared like one of the command, and leaves files of others alone."""

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import yaml
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from moco import SelfSupervisedMethod
from self_supervised import train
from self_supervised.report import compare, curves, figures, report, tables
from self_supervised.safe_files import rows_of, to_json, without_nan
from self_supervised.training import run_folder

pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore:.*does not have many workers")
OPTIONS = {"evaluations": ["knn"], "lr": 0.05}
COMMAND = (
    "simclr --dataset_name digits --encoder_arch small_cnn --batch_size 16 --K 64 --dim 16 "
    "--mlp_hidden_dim 32 --warmup_epochs 0 --seed 0 --evaluations [knn] --lr 0.05 --max_epochs 2 "
    "--limit_train_batches 2 --limit_val_batches 1 --log_every_n_steps 1 --accelerator cpu --logger csv --out command"
)


@pytest.fixture
def fit(small, trainer):
    """fit(CSVLogger("logs")): the method and its Trainer after a training with this logger."""

    def make(logger, scored: bool = True, checkpoint: str | None = None, **options) -> tuple:
        model = SelfSupervisedMethod(small("simclr", **OPTIONS))
        fitted = trainer(logger=logger, **{"max_epochs": 2, "log_every_n_steps": 1, **options})
        if scored:
            fitted.validate(model, verbose=False)
        fitted.fit(model, ckpt_path=checkpoint)
        return model, fitted

    return make


@pytest.fixture
def command(monkeypatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["train", *COMMAND.split()])
    train.main(COMMAND.split())
    return Path("command")


def test_settings_may_have_numbers_of_numpy(small, trainer):
    constants = {"image_mean": [np.float64(0.3)], "image_std": list(np.array([0.4]))}
    trainer(logger=CSVLogger("logs", name="x", version="")).fit(SelfSupervisedMethod(small("simclr", **constants)))
    assert yaml.safe_load(Path("logs/x/config.yaml").read_text())["image_std"] == [0.4]


def figures_of(out: Path) -> dict[str, float]:
    return {name: value for name, value in compare.read_run(out).results.items() if "minutes" not in name}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_compare_report_and_curves_of_a_run_in_python_equal_those_of_the_command(kind, fit, command, capsys):
    _, fitted = fit(kind("logs", name="python", version=""))
    assert [type(logger) for logger in fitted.loggers] == [kind]
    out = Path("logs/python")
    assert figures_of(out) == pytest.approx(figures_of(command)) and figures_of(out)["epochs"] == 2
    settings = {row.name: row.values for row in compare.compare([out, command])[1] if row.kind == "setting"}
    assert settings == {"logger": ("-", "[csv]"), "accelerator": ("-", "cpu")}
    drawn = [curves.read_curves(folder) for folder in (out, command)]
    for name in ("step_train_loss", "step_pos_cos", "valid_knn20_acc"):
        for mine, its in zip(drawn[0][name], drawn[1][name], strict=True):  # the command scores the end once more
            assert np.array_equal(mine, its[: len(mine)]) and len(mine) >= 3
    assert drawn[0]["epoch"][1].tolist() == [1, 1, 2, 2]  # epoch 0 shares a step with 1
    assert figures.steps_per_epoch(out) == figures.steps_per_epoch(command) == {"pretraining": 2, "linear": None}
    page = report.write_report([out], images=0).read_text()
    assert tables.state(compare.read_run(out)) == "finished" and "4 steps, 2 an epoch" in page


@pytest.mark.parametrize(("given", "steps"), [(None, [0, 1, 2, 3]), (3, [2])])
def test_short_epochs_are_logged_like_those_of_the_command_unless_an_interval_is_passed(given, steps, fit):
    fit(CSVLogger("logs", name="python", version=""), scored=False, log_every_n_steps=given)
    assert curves.read_curves("logs/python")["step_train_loss"][0].tolist() == steps
    assert run_folder.settings_of_run(Path("logs/python"))["log_every_n_steps"] == given


def test_missing_scores_are_named(fit, small, trainer, capsys, monkeypatch):
    fit(CSVLogger("logs", name="python", version=""), scored=False, limit_val_batches=0)
    monkeypatch.setattr(sys, "argv", ["compare", "logs/python"])
    monkeypatch.setenv("COLUMNS", "200")
    compare.main()
    shown = " ".join(capsys.readouterr().out.split())
    assert "python: no scores of the encoder at the start: it was not evaluated" in shown
    after = "python: no scores of the trained encoder: it was not evaluated after the last step (limit_val_batches=0)."
    assert after in shown
    without = SelfSupervisedMethod(small("simclr", **{**OPTIONS, "evaluations": []}))
    trainer(logger=CSVLogger("logs", name="without", version=""), log_every_n_steps=1).fit(without)
    monkeypatch.setattr(sys, "argv", ["compare", "logs/python", "logs/without"])
    compare.main()
    assert "without: no scores of the trained encoder: evaluations=[]." in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="such as logs/without"):
        compare.read_run("logs")


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("scored", [False, True])
def test_epoch_0_is_logged_once(kind, scored, fit):
    fit(kind("logs", name="python", version=""), scored=scored)
    _, rows = rows_of(Path("logs/python/metrics.csv"))
    scores = {row["epoch"]: float(row["valid_knn20_acc"]) for row in rows if row["valid_knn20_acc"]}
    assert [row["epoch"] for row in rows if row["valid_knn20_acc"]] == ["0", "1", "2"]
    assert scores["0"] == run_folder.results_of(Path("logs/python"))["random encoder"]["valid_knn20_acc"]


def test_resumed_run_continues_its_record_and_another_replaces_it(fit, tmp_path):
    def logger() -> TensorBoardLogger:
        return TensorBoardLogger("logs", name="python", version="")

    out = Path("logs/python")
    _, fitted = fit(logger())
    before = run_folder.results_of(out)
    fitted.save_checkpoint("end.ckpt")
    fit(logger(), scored=False, checkpoint="end.ckpt", max_epochs=3)
    after = run_folder.results_of(out)
    assert after["random encoder"] == before["random encoder"] and after["epochs"] == 3
    assert after["pretraining minutes"] > before["pretraining minutes"] and len(run_folder.starts_of(out)) == 2
    _, rows = rows_of(out / "metrics.csv")
    assert [(row["step"], row["epoch"]) for row in rows if row["m"]] == [(str(i), str(i // 2 + 1)) for i in range(6)]
    fit(logger(), scored=False)
    again = run_folder.results_of(out)
    assert again["random encoder"] == before["random encoder"] and len(run_folder.starts_of(out)) == 1
    assert again["verdict"].startswith("valid_knn20_acc 12.5 (random encoder) -> ")
    results = {**again, "trained encoder": {"valid_knn20_acc": float("nan")}}
    (out / "results.json").write_text(to_json(without_nan(results)))
    assert np.isnan(run_folder.results_of(out)["trained encoder"]["valid_knn20_acc"])


def test_scores_of_an_earlier_training_are_forgotten(fit, trainer):
    model, _ = fit(False)
    trainer(logger=CSVLogger("logs", name="python", version=""), max_epochs=2, limit_val_batches=0).fit(model)
    assert run_folder.results_of(Path("logs/python"))["trained encoder"] == {}


@pytest.mark.parametrize("name", ["config.yaml", "run.json", "results.json", "metrics.csv"])
def test_files_of_others_are_left_alone(name, fit, capsys):
    out = Path("logs/python")
    out.mkdir(parents=True)
    (out / name).write_text("[]")
    fit(TensorBoardLogger("logs", name="python", version=""), scored=False)
    assert (out / name).read_text() == "[]"
    written = {path.name for path in out.iterdir() if not path.name.startswith(("events", "hparams"))}
    assert written == {name}


def test_nothing_is_written_without_a_folder_of_a_logger(fit, tmp_path):
    fit(False, scored=False)
    assert list(tmp_path.iterdir()) == []


def test_other_processes_write_nothing(fit, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    fit(CSVLogger("logs", name="python", version=""))
    assert not list(Path("logs/python").glob("*.json"))


def test_a_column_is_added_to_metrics_csv_completely_or_not_at_all(tmp_path, monkeypatch):
    """Killed while the file is written anew, it keeps its rows."""
    logger = run_folder.csv_logger(tmp_path, "pretraining", 0)
    for step in range(3):
        logger.log_metrics({"loss": 1.0}, step)
    logger.save()
    file = tmp_path / "pretraining" / "metrics.csv"
    before = file.read_text()
    logger.log_metrics({"test_acc": 50.0}, 3)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        logger.save()
    assert file.read_text() == before and len(before.splitlines()) == 4
    resumed = run_folder.csv_logger(tmp_path, "pretraining", 3)
    resumed.log_metrics({"test_acc": 50.0}, 3)
    resumed.save()
    columns, rows = rows_of(file)
    assert columns == ["loss", "step", "test_acc"] and [row["step"] for row in rows] == list("0123")
    assert [row["test_acc"] for row in rows] == ["", "", "", "50.0"]
