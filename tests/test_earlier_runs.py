"""Run folder and checkpoints of an earlier commit: read, resumed, evaluated, exported and reported by this one.

tests/earlier/make.sh says how the files were made. Where modules live is said by COMMANDS and two imports alone.
"""

import csv
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from earlier.tiny import NAMED, fixed_images, write_images

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised import evaluate, train
from self_supervised.embeddings import embed
from self_supervised.exports import export
from self_supervised.report import compare, figures, report

COMMANDS = {
    "train": train.main,
    "evaluate": evaluate.main,
    "embed": embed.main,
    "export": export.main,
    "compare": compare.main,
    "report": report.main,
}
EARLIER = Path(__file__).parent / "earlier"
EXPECTED = json.loads((EARLIER / "expected.json").read_text())
KINDS = {
    "run/pretrained.ckpt": SelfSupervisedMethod,
    "moco_v2.ckpt": SelfSupervisedMethod,
    "run/linear.ckpt": LinearClassifierMethod,
}
STEPS_PER_EPOCH = 5

pytestmark = pytest.mark.filterwarnings(
    "ignore:collapse",
    "ignore:save_best",
    "ignore::ResourceWarning",
    "ignore:`torch.jit:FutureWarning",
    "ignore:The loaded checkpoint was produced with Lightning",  # a newer one than the oldest that is supported
)


@pytest.fixture
def run(tmp_path) -> Path:
    """A copy of the run, which programs may change, in the current directory."""
    return shutil.copytree(EARLIER / "run", tmp_path / "run")


@pytest.fixture
def call(monkeypatch):
    """call("train", "byol --lr 0.1"): run a command in this process."""

    def run_command(name: str, arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments.split()])
        COMMANDS[name]()

    return run_command


def content_of(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def results_of(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The rows of metrics.csv, without empty cells."""
    with (run / "pretraining" / "metrics.csv").open(newline="") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


# ---- checkpoints ----


@pytest.mark.parametrize("path", KINDS)
def test_checkpoint_loads_with_its_tensors_settings_and_outputs(path):
    content, method = content_of(EARLIER / path), KINDS[path].load_from_checkpoint(EARLIER / path).cpu().eval()
    state = method.state_dict()
    assert state.keys() == content["state_dict"].keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in content["state_dict"].items())
    settings = content["hyper_parameters"]
    assert {name: method.hparams[name] for name in settings} == settings
    with torch.no_grad():
        outputs = method(fixed_images())
    assert torch.allclose(outputs, torch.tensor(EXPECTED[path]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", ["run/pretrained.ckpt", "moco_v2.ckpt"])
def test_linear_classifier_takes_the_encoder_of_a_checkpoint(path):
    linear = LinearClassifierMethod.from_moco_checkpoint(EARLIER / path).cpu().eval()
    with torch.no_grad():
        embeddings = linear.model(fixed_images())
    assert torch.allclose(embeddings, torch.tensor(EXPECTED[path]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_tensors_keep_their_names_and_shapes(name):
    state = SelfSupervisedMethod(**NAMED[name]).state_dict()
    assert {key: list(tensor.shape) for key, tensor in state.items()} == EXPECTED[name]


# ---- resuming ----


@pytest.mark.slow
def test_finished_run_is_resumed_for_more_epochs(run, call):
    before, rows = results_of(run), metrics_of(run)
    call("train", "--config run/config.yaml --out run --resume auto --max_epochs 3 --linear_epochs 0")
    old = [row for row in rows if row["step"] < 2 * STEPS_PER_EPOCH]
    kept, new = metrics_of(run)[: len(old)], metrics_of(run)[len(old) :]
    assert kept == old and len(old) == len(rows) - 1  # the last row scored the finished run
    steps = [row for row in new if "lr" in row]
    assert [row["step"] for row in steps] == [10, 11, 12, 13, 14] and {row["epoch"] for row in steps} == {2}
    assert [row["step"] for row in new if "valid_rank_me" in row] == [14]  # of the epoch, which is the end
    rates = [0.05 * (1 + math.cos(math.pi * step / 10)) for step in range(5, 10)]  # 15 steps, 5 of warm-up
    assert [row["lr"] for row in steps] == pytest.approx(rates, abs=1e-6)
    assert content_of(run / "pretrained.ckpt")["global_step"] == 15
    after = results_of(run)
    assert after["epochs"] == 3 and after["random encoder"] == before["random encoder"]
    assert "linear classifier" not in after  # it was of the encoder before
    commands = (run / "command.txt").read_text().splitlines()
    assert commands[0] == (EARLIER / "run" / "command.txt").read_text().strip() and len(commands) == 2
    assert [start.get("first epoch") for start in json.loads((run / "run.json").read_text())] == [None, 0]
    assert figures.steps_per_epoch(run) == {"pretraining": STEPS_PER_EPOCH, "linear": None}
    assert yaml.safe_load((run / "config.yaml").read_text())["max_epochs"] == 3


def test_run_interrupted_within_an_epoch_ends_near_the_weights_of_the_whole_run(run, call):
    """As if killed after step 8: nothing later is there. The two steps after it have the draws of this version."""
    shutil.rmtree(run / "linear")
    for name in ("pretrained.ckpt", "linear.ckpt", "pretraining/checkpoints/step_000000010.ckpt"):
        (run / name).unlink()
    call("train", "--config run/config.yaml --out run --resume auto")
    for name in ("pretrained.ckpt", "linear.ckpt"):
        found, expected = (content_of(folder / name) for folder in (run, EARLIER / "run"))
        assert found["global_step"] == expected["global_step"]
        for key, tensor in expected["state_dict"].items():
            assert torch.allclose(found["state_dict"][key], tensor, rtol=0, atol=0.02), key
    whole = metrics_of(EARLIER / "run")[:-1]  # earlier versions scored the end once more
    for found, expected in zip(metrics_of(run), whole, strict=True):
        assert found.keys() == expected.keys()
        if found["step"] < 8:
            assert all(found[name] == pytest.approx(expected[name], abs=0.5) for name in found)
            assert "lr" not in found or found["step_train_loss"] == pytest.approx(expected["step_train_loss"], abs=1e-3)


def test_finished_run_is_not_trained_again(run, call):
    call("train", "--config run/config.yaml --out run --resume auto")
    before, after = results_of(EARLIER / "run"), results_of(run)
    for results in (before, after):
        del results["pretraining minutes"], results["linear minutes"]
    assert after.pop("linear epochs") == 1 and after.pop("verdict").startswith(
        "valid_knn20_acc 42.8 (random encoder) -> "
    )
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name] == (pytest.approx(value, abs=0.5) if isinstance(value, dict) else value)
    for name in ("pretrained.ckpt", "linear.ckpt"):
        found, expected = (content_of(folder / name)["state_dict"] for folder in (run, EARLIER / "run"))
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_checkpoint_with_a_queue_is_resumed(call, tmp_path):
    shutil.copy(EARLIER / "moco_v2.ckpt", tmp_path)
    content = content_of(EARLIER / "moco_v2.ckpt")
    settings = {"preset": "moco_v2", **content["hyper_parameters"], "embedding_dim": None, "max_epochs": 3}
    (tmp_path / "moco.yaml").write_text(yaml.safe_dump(settings))
    call("train", "--config moco.yaml --limit_train_batches 5 --logger csv --resume moco_v2.ckpt --out moco")
    after = content_of(tmp_path / "moco" / "pretrained.ckpt")
    assert after["global_step"] == 15 and after["state_dict"].keys() == content["state_dict"].keys()
    assert not torch.equal(after["state_dict"]["queue.keys"], content["state_dict"]["queue.keys"])


def test_run_on_custom_images_keeps_its_splits_where_images_were_added(call, tmp_path):
    """The run was moved: config.yaml and checkpoint name a directory of lists that is gone."""
    run = shutil.copytree(EARLIER / "custom", tmp_path / "custom")
    write_images(tmp_path / "images", 0, 50)
    call("train", "--config custom/config.yaml --out custom --resume auto --max_epochs 2")
    splits = run / "splits"
    assert {path.name: path.read_bytes() for path in splits.iterdir()} == {
        path.name: path.read_bytes() for path in (EARLIER / "custom" / "splits").iterdir()
    }
    assert content_of(run / "pretrained.ckpt")["global_step"] == 8  # 4 batches of the 32 listed images an epoch
    assert yaml.safe_load((run / "config.yaml").read_text())["splits_path"] == str(splits)
    assert {"random encoder", "trained encoder", "test set"} <= results_of(run).keys()


# ---- evaluating, embedding, exporting ----


def test_earlier_evaluation_is_found_and_not_repeated(run, call, capsys):
    """The key of a run hashes the definition of its protocol, too: with other words, it would be evaluated again."""
    file = run / "pretrained.evaluation" / "results.json"
    before = json.loads(file.read_text())
    call("evaluate", "run/pretrained.ckpt --protocols knn --device cpu")
    after = json.loads(file.read_text())
    assert after["runs"] == before["runs"] and after["summary"] == before["summary"]
    assert capsys.readouterr().out.count("(from results.json)") == 2


def test_checkpoint_is_evaluated_under_the_same_keys_features_and_scores(run, call, tmp_path):
    call("evaluate", "run/pretrained.ckpt --protocols knn --device cpu --out again")
    before = json.loads((run / "pretrained.evaluation" / "results.json").read_text())["runs"]
    after = json.loads((tmp_path / "again" / "results.json").read_text())["runs"]
    for old, new in zip(before, after, strict=True):
        assert {name: new[name] for name in ("protocol", "dataset", "encoder", "seed", "key", "hash", "seen")} == {
            name: old[name] for name in ("protocol", "dataset", "encoder", "seed", "key", "hash", "seen")
        }
        assert new["scores"] == pytest.approx(old["scores"], abs=0.5)
    assert sorted(path.name for path in (tmp_path / "again" / "features").iterdir()) == EXPECTED["features"]


def test_features_are_complete_and_those_of_the_checkpoint(run, call, capsys, tmp_path):
    file = shutil.copy(EARLIER / "features.parquet", tmp_path)
    call("embed", "run/pretrained.ckpt digits/test --out features.parquet --num_workers 0 --device cpu")
    assert "500 embeddings, complete" in capsys.readouterr().out
    call("embed", "run/pretrained.ckpt digits/test --out again.parquet --num_workers 0 --device cpu")
    old, new = (pq.read_table(path) for path in (file, tmp_path / "again.parquet"))
    assert old.schema.equals(new.schema) and all(old[name].equals(new[name]) for name in ("path", "label"))
    embeddings = [torch.tensor(table["embedding"].to_pylist()) for table in (old, new)]
    assert torch.allclose(*embeddings, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_is_exported_with_its_embeddings(run, call):
    call("export", "run/pretrained.ckpt --format torchscript")
    with torch.no_grad():
        embeddings = torch.jit.load(run / "pretrained.torchscript.pt")(fixed_images())
    assert torch.allclose(embeddings, torch.tensor(EXPECTED["run/pretrained.ckpt"]), rtol=0, atol=1e-5)


# ---- reporting ----


def test_report_shows_the_settings_results_and_curves_of_the_run(run, call):
    call("report", "run --images 50")
    text = (run / "report.html").read_text()
    page = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])
    (about,) = page["runs"]
    assert about["state"] == "finished" and about["preset"] == "byol" and about["map"] and about["views"]
    assert about["commands"] == (run / "command.txt").read_text().splitlines()
    shown = {row["name"]: row["values"][0]["text"] for row in page["settings"]["rows"]}
    assert {"lr": "0.1", "encoder_arch": "timm:earlier_tiny", "linear_epochs": "1"}.items() <= shown.items()
    results = {(row["of"], row["name"]): row["values"][0] for row in page["results"]}
    assert results["trained encoder", "valid_knn20_acc"] == "46" and results["linear classifier", "valid_acc1"] == "10"
    figures = [figure for figure in page["figures"] if figure["file"] == "pretraining/metrics.csv"]
    (losses,) = [line for figure in figures for line in figure["lines"] if line["name"] == "step_train_loss"]
    logged = [row["step_train_loss"] for row in metrics_of(run) if "lr" in row]
    assert losses["x"] == list(range(10)) and losses["y"] == pytest.approx(logged, rel=1e-5)


def test_compare_shows_what_differs_from_a_newer_run(run, call, capsys, monkeypatch, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump({**settings, "lr": 0.25}))
    monkeypatch.setenv("COLUMNS", "120")
    call("compare", "run other")
    rows = [[cell.strip() for cell in row.split("│")[1:-1]] for row in capsys.readouterr().out.splitlines()]
    assert ["lr", "0.1", "0.25"] in rows and ["valid_knn20_acc", "46", "46"] in rows
