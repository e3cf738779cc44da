"""The programs people run, from their arguments to the files they leave."""

import argparse
import csv
import json
import os
import re
import signal
import sys
from functools import partial
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only
from torch import nn

import train_blog
from linear_classifier import LinearClassifierMethod
from model_params import SimCLRParams
from self_supervised import __main__ as entry
from self_supervised import demo, train
from self_supervised.runs import command_line, earlier_run
from self_supervised.runs.run_options import RunOptions
from self_supervised.training import checkpoints

# Lightning resets its progress bar's file handles late; collapse is what some of the blog's configurations show.
pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore::ResourceWarning")


def run(program, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, arguments)])
    program.main()


def is_picture(path):
    import matplotlib.image

    pixels = matplotlib.image.imread(path)
    return pixels.shape[0] > 200 and len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20


def blog_rows(out: Path) -> list[dict[str, str]]:
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_train_blog_writes_rows_table_and_figure_and_skips_what_is_finished(monkeypatch, tmp_path, capsys):
    options = ["--quick", "--epochs", 1, "--configs", "untrained", "base", "--out", tmp_path / "blog"]
    options += ["--precision", "32-true", "--seeds", 0, 1, "--batch_size", 32, "--set", "data_fraction=0.5"]
    run(train_blog, monkeypatch, *options)
    assert "base, seed 1: steps 20, m 0.18, lr 0.1" in capsys.readouterr().out
    rows = blog_rows(tmp_path / "blog")
    assert [(row["config"], row["seed"]) for row in rows] == [(c, s) for s in "01" for c in ("untrained", "base")]
    assert all(0 < float(row["accuracy"]) <= 100 for row in rows)
    folder = tmp_path / "blog" / "quick_1epochs_batch_size=32_data_fraction=0.5_32-true" / "base_1"
    steps = np.genfromtxt(folder / "metrics.csv", delimiter=",", names=True)
    logged = steps["step_pos_cos"][~np.isnan(steps["step_pos_cos"])]
    assert len(logged) == 20 and float(rows[3]["pos_cos"]) == pytest.approx(logged[-1], abs=1e-3)
    assert not list(folder.rglob("*.ckpt"))
    start = json.loads((folder / "results.json").read_text())["random encoder"]["valid_class_acc"]
    assert float(rows[2]["accuracy"]) == pytest.approx(start, abs=1e-3)  # seed 1
    table = (tmp_path / "blog" / "results.md").read_text()
    mean = np.mean([float(rows[1]["accuracy"]), float(rows[3]["accuracy"])])
    assert f"| base | {mean:.1f} ± " in table and "57.7" in table and "no_norm" not in table
    assert is_picture(tmp_path / "blog" / "cosines.png")

    run(train_blog, monkeypatch, *options)
    assert capsys.readouterr().out.count("finished before") == 4
    assert len(blog_rows(tmp_path / "blog")) == 4


@pytest.mark.slow
def test_an_interrupted_run_of_the_blog_is_resumed_and_stops_before_its_schedule(monkeypatch, tmp_path):
    options = ["--quick", "--epochs", 2, "--configs", "xent", "--precision", "32-true", "--batch_size", 32]
    options += ["--set", "data_fraction=0.25", "max_epochs=3", "evaluations=linear_probe", "dim=16"]
    run(train_blog, monkeypatch, *options, "--out", tmp_path / "whole")
    save = checkpoints.Checkpoints.save
    for epoch in (1, 2):  # in the middle, and between the training and its row

        def save_and_fail(self, trainer, module, epoch=epoch):
            save(self, trainer, module)
            if trainer.global_step == 10 * epoch:
                raise OSError("interrupted")

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="interrupted"):
            patch.setattr(checkpoints.Checkpoints, "save", save_and_fail)
            run(train_blog, monkeypatch, *options, "--out", tmp_path / "resumed")
    run(train_blog, monkeypatch, *options, "--out", tmp_path / "resumed")
    (expected,), (found,) = blog_rows(tmp_path / "whole"), blog_rows(tmp_path / "resumed")
    assert found["steps"] == "20" and (found["m"], found["K"]) == ("0.996", "32")
    assert {**found, "minutes": ""} == {**expected, "minutes": ""}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sead", "1"], "unknown option --sead. Did you mean --seeds?"),
        (["--set", "learning_rate=1"], "'learning_rate=1' is not FIELD=VALUE with a field of ModelParams. Did you"),
    ],
)
def test_options_of_the_blog_that_are_misspelled_end_it_in_one_line(options, message, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run(train_blog, monkeypatch, *options)
    error = capsys.readouterr().err
    assert end.value.code == 2 and message in error and error.endswith("?\n") and error.count("\n") == 1


def test_the_blog_leaves_results_of_other_programs_alone(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("experiment,score\nmine,1.5\n")
    with pytest.raises(ValueError, match="was not written by train_blog.py. Move it away, or choose another --out"):
        train_blog.finished_runs(file)


def test_the_blog_draws_no_cosines_of_encoders_that_were_not_trained(tmp_path):
    assert not train_blog.draw_cosines([{"config": "untrained", "seed": "1"}], None, tmp_path / "cosines.png")
    assert not list(tmp_path.iterdir())


def test_one_seed_of_the_blog_has_no_deviation():
    row = {"config": "base", "accuracy": "34.8", "pos_cos": "0.226", "neg_cos": "0.225"}
    assert "| base | 34.8 | 57.7 | 0.226 | 0.225 | 1 |" in train_blog.results_table([row])
    assert "34.8 ± 0.0" in train_blog.results_table([row, row])


def test_the_page_shows_the_blogs_rows():
    docs = Path(train_blog.__file__).parent / "docs"
    page = " ".join((docs / "results.md").read_text().split())
    earlier = [row["accuracy"] for row in train_blog.finished_runs(docs / "results" / "blog_quick_earlier_draws.csv")]
    assert f"the rows were {', '.join(earlier[:-1])} and {earlier[-1]}, so" in page
    for size in ("quick", "laptop"):
        rows = train_blog.finished_runs(docs / "results" / f"blog_{size}.csv")
        assert {row["size"] for row in rows} == {size} and {row["config"] for row in rows} == set(train_blog.POST)
        assert train_blog.results_table(rows) in (docs / "results.md").read_text()


@pytest.mark.parametrize(
    ("steps", "batch_size", "m", "K", "lr"),
    [(4100, 256, 0.996, 65536, 0.8), (3900, 128, 0.9958, 16384, 0.4), (400, 64, 0.959, 1024, 0.2), (5, 64, 0, 16, 0.2)],
)
def test_the_blog_at_another_length(steps, batch_size, m, K, lr):
    """The first is the post's; K is a power of two below the number of images / 16."""
    base, xent = (train_blog.at_length(train_blog.CONFIGS[name], steps, batch_size) for name in ("base", "xent"))
    assert (base.m, base.lr) == (pytest.approx(m, abs=5e-5), pytest.approx(lr))
    assert (xent.m, xent.K, xent.lr) == (0.996, K, pytest.approx(lr / 40))


def test_the_blogs_configurations_differ_as_its_table_says():
    found = {
        name: (
            p.mlp_normalization,
            p.prediction_mlp_normalization,
            p.loss_type,
            p.use_negative_examples_from_queue,
            p.lr,
        )
        for name, p in train_blog.CONFIGS.items()
    }
    assert found == {
        "base": ("bn", "same", "ip", False, 0.8),
        "proj_only": ("bn", None, "ip", False, 0.8),
        "pred_only": (None, "bn", "ip", False, 0.8),
        "no_norm": (None, "same", "ip", False, 0.8),
        "layer_norm": ("ln", "same", "ip", False, 0.8),
        "xent": (None, "same", "ce", True, 0.02),
    }


@pytest.mark.slow
def test_demo_ends_with_a_table_and_a_report(monkeypatch, capsys):
    earlier = demo.OUT / "pretraining" / "checkpoints" / "step_000009999.ckpt"
    earlier.parent.mkdir(parents=True, exist_ok=True)
    earlier.touch()
    run(demo, monkeypatch, "--epochs", 2, "--linear_epochs", 1)
    table, shown = (demo.OUT / "results.md").read_text(), capsys.readouterr().out
    assert table in shown and shown.splitlines()[-1].endswith(str(demo.OUT / "report.html"))
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")][2:]
    assert rows == ["linear, 50 labels (%)", "linear, all labels (%)", "kNN, k = 20 (%)", "RankMe"]
    page = (demo.OUT / "report.html").read_text()
    assert "Cosine of two views" in page and '"missing": "' not in page and (demo.OUT / "pretrained.ckpt").exists()
    assert not earlier.exists() and {"linear.ckpt", "parameters.txt"} <= {path.name for path in demo.OUT.iterdir()}
    scores = json.loads((demo.OUT / "results.json").read_text())["trained encoder"]
    assert {"RankMe", "valid_class_acc"} <= set(scores)


@pytest.mark.parametrize(
    ("commands", "is_refused"),
    [
        ("self-supervised train byol --out runs/demo\n", True),
        (None, True),  # made in Python
        ("self-supervised demo --epochs 3\n", False),
        ("python -m self_supervised demo\n", False),
        ("self-supervised demo\nself-supervised train vicreg --resume auto --out runs/demo\n", True),
    ],
)
def test_demo_overwrites_only_a_demo(commands, is_refused, monkeypatch):
    demo.OUT.mkdir(parents=True)
    (demo.OUT / "config.yaml").touch()
    if commands:
        (demo.OUT / "command.txt").write_text(commands)
    monkeypatch.setattr(demo, "encoder_scores", lambda *_: sys.exit("begins"))
    with pytest.raises(SystemExit, match="holds a run that is not a demo" if is_refused else "begins"):
        run(demo, monkeypatch)
    assert (demo.OUT / "config.yaml").exists()


def test_train_takes_any_field_and_evaluates_what_it_saved(monkeypatch, tmp_path):
    fields = {"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "max_epochs": 1, "batch_size": 64}
    fields |= {"transform_crop_scale_min": "[0.5, 0.4]", "lars_warmup_epochs": 0, "mlp_normalization": "bn"}
    options = [part for name, value in fields.items() for part in (f"--{name}", value)]
    run(train, monkeypatch, "byol", *options, "--linear_epochs", 1, "--linear_lr", 0.1, "--out", tmp_path / "run")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {"random encoder", "trained encoder", "linear classifier"} <= set(results)
    linear = LinearClassifierMethod.from_moco_checkpoint(tmp_path / "run" / "pretrained.ckpt")
    assert linear.params.encoder_arch == "shufflenet_v2_x0_5"
    settings = torch.load(tmp_path / "run" / "pretrained.ckpt", weights_only=True)["hyper_parameters"]
    assert settings["transform_crop_scale_min"] == [0.5, 0.4] and settings["lars_warmup_epochs"] == 0


def test_a_run_trains_an_encoder_of_the_user_in_place_and_a_classifier_on_it(tmp_path):
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    start = encoder[1].weight.detach().clone()
    params = SimCLRParams(dataset_name="digits", batch_size=64, max_epochs=1, dim=4, seed=0, evaluations=[])
    options = RunOptions(linear_epochs=1, limit_train_batches=2, limit_val_batches=1, accelerator="cpu")
    results = train.run_or_resume(tmp_path / "run", "simclr", options, params, encoder, batch_size=16)
    assert 0 <= results["linear classifier"]["valid_acc1"] <= 100
    saved = torch.load(tmp_path / "run/pretrained.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(saved["model.1.weight"], encoder[1].weight) and not torch.equal(start, encoder[1].weight)
    linear = LinearClassifierMethod.load_from_checkpoint(tmp_path / "run/linear.ckpt", encoder=encoder)
    assert linear.params.batch_size == 16 and json.loads((tmp_path / "run/results.json").read_text()) == results


@pytest.mark.parametrize("arguments", [["byoll"], ["byol", "--learning_rate", "1"]])
def test_train_refuses_typos(arguments, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(train, monkeypatch, *arguments)
    assert arguments[-2 if len(arguments) > 1 else 0] in capsys.readouterr().err


def train_to_the_end(rank: int, folder: str, resume: bool, kill_at: int | None) -> None:
    """train.py; killed when its n-th checkpoint was written."""
    written = []
    replace = os.replace

    def replace_or_die(*paths):
        replace(*paths)
        written.extend([paths] * str(paths[1]).endswith(".ckpt"))
        if len(written) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoints.os.replace = replace_or_die
    sys.argv = ["train.py", "simclr", *OPTIONS, "--out", folder, *(["--resume", "auto"] if resume else [])]
    train.main()


OPTIONS = ["--dataset_name", "digits", "--encoder_arch", "shufflenet_v2_x0_5", "--data_fraction", "0.25",
           "--batch_size", "32", "--max_epochs", "2", "--mlp_hidden_dim", "32", "--dim", "16", "--seed", "0",
           "--checkpoint_every_n_steps", "3", "--linear_epochs", "2", "--linear_lr", "0.1",
           "--evaluations", "['knn', 'rank_me']"]  # fmt: skip


@pytest.mark.slow
def test_train_goes_on_where_it_was_killed(tmp_path):
    """In the pretraining, and in the linear stage: the same results, the same rows in metrics.csv."""
    processes.run(train_to_the_end, 1, tmp_path / "whole", str(tmp_path / "whole"), False, None)
    for kill_at in (4, 10):
        out = tmp_path / f"killed_{kill_at}"
        assert processes.join(processes.launch(train_to_the_end, 1, out, str(out), True, kill_at)) == [-signal.SIGKILL]
        processes.run(train_to_the_end, 1, out, str(out), True, None)
        for name in ("pretraining", "linear"):
            rows = [(folder / name / "metrics.csv").read_text() for folder in (out, tmp_path / "whole")]
            assert rows[0] == rows[1] and len(rows[0].splitlines()) > 1
        found, expected = (json.loads((folder / "results.json").read_text()) for folder in (out, tmp_path / "whole"))
        for name in ("random encoder", "trained encoder", "linear classifier"):
            assert found[name] == expected[name]


def test_every_process_forgets_outdated_scores(monkeypatch, tmp_path):
    """Else one would validate at the end, which the others do not join."""
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    train.delete_outdated(tmp_path, results := {"preset": "byol", "trained encoder": {}})
    assert results == {"preset": "byol"} and not list(tmp_path.iterdir())


def test_files_of_the_encoder_before_are_named(tmp_path, capsys):
    for name in ("pretrained.ckpt", "pretrained.onnx", "report.html", "linear.ckpt"):
        (tmp_path / name).touch()
    train.delete_outdated(tmp_path, {})
    assert capsys.readouterr().out.startswith("pretrained.onnx, report.html: of the encoder before this training.")
    assert {path.name for path in tmp_path.iterdir()} == {"pretrained.ckpt", "pretrained.onnx", "report.html"}


def test_starting_weights_are_found_from_another_directory(tmp_path, monkeypatch):
    (tmp_path / "w.pth").touch()
    assert earlier_run.absolute("w.pth") == str(tmp_path / "w.pth")
    assert [earlier_run.absolute(name) for name in ("DEFAULT", "x" * 300, None)] == ["DEFAULT", "x" * 300, None]


# ---- alike in every program ----

COMMANDS = [*entry.COMMANDS, "train_blog"]
NEIGHBORS = r"likewise|as above|as before|see above|ditto|the other|so many|^of |^default: |^\W*\w+\W*$"


def help_of(command: str, monkeypatch) -> list[argparse.Action]:
    """Return the options of a program, as its parser has them when it parses."""
    parsers = []

    def parse(self, *_, **__):
        parsers.append(self)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    if command == "train":
        return command_line.train_parser("byol")._actions
    run = train_blog.main if command == "train_blog" else partial(entry.main, [command])
    with pytest.raises(SystemExit):
        run()
    return parsers[0]._actions


@pytest.mark.parametrize("command", COMMANDS)
def test_the_text_of_each_option_can_be_read_without_its_neighbors(command, monkeypatch):
    for action in help_of(command, monkeypatch):
        if action.help != argparse.SUPPRESS:
            text = (action.help or "").split(" (default")[0]
            assert text and not re.search(NEIGHBORS, text), f"{command} {action.option_strings}: {text!r}"


@pytest.mark.parametrize(
    ("command", "option", "words", "read"),
    [
        ("evaluate", "--protocols", ["knn", "linear"], ["knn", "linear"]),
        ("evaluate", "--seeds", ["0", "1"], [0, 1]),
        ("evaluate", "--include_patterns", ["*.png", "*.jpg"], ["*.png", "*.jpg"]),
        ("embed", "--image_mean", ["0.5", "0.4", "0.3"], [0.5, 0.4, 0.3]),
        ("export", "--format", ["onnx", "timm"], ["onnx", "timm"]),
        ("map", "--out", ["a,b.png", "c.html"], [Path("a,b.png"), Path("c.html")]),
        ("train_blog", "--configs", ["base", "no_norm"], ["base", "no_norm"]),
        ("train", "--evaluations", ["knn", "rank_me"], ["knn", "rank_me"]),
        ("train", "--transform_blur_probability", ["1.0", "0.1"], [1.0, 0.1]),
        ("train", "--lr_decay_steps", ["6", "8"], [6, 8]),
    ],
)
def test_lists_have_blanks_or_commas_between_their_items(command, option, words, read, monkeypatch):
    joined = ",".join(words)
    in_brackets = [] if command == "map" or "*" in joined else [[option, f"[{joined}]"]]  # of YAML, not of file names
    for given in ([option, *words], [option, joined], [f"{option}={joined}"], *in_brackets):
        if command == "train":
            found = command_line.parse(["byol", "--lr_schedule", "steps" if "steps" in option else "cosine", *given])[2]
        else:
            with monkeypatch.context() as patch:
                (action,) = (one for one in help_of(command, patch) if option in one.option_strings)
            parser = argparse.ArgumentParser()
            parser._add_action(action)
            found = parser.parse_args(given)
        assert getattr(found, option[2:]) == read
