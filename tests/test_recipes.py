"""Recipes: every row can be built, is shown on its page, and is found by name in Python and on the command line."""

import statistics

import numpy as np
import PIL.Image
import pytest
import pytorch_lightning as pl
import recipes_page
import torch
from conftest import QUIET

import self_supervised as ssl
import train_blog
from benchmarks import harness
from benchmarks import recipes as benchmark
from model_params import PRESETS
from self_supervised import recipes
from self_supervised.demo import features
from self_supervised.evaluation import validation
from self_supervised.fields import changed
from self_supervised.runs import command_line

ROWS = [(preset, name) for name, kind in recipes.KINDS.items() for preset in kind.rows]


@pytest.mark.parametrize(("preset", "name"), ROWS)
def test_recipe_is_its_preset_with_the_settings_of_its_rows(preset, name):
    params = ssl.recipe(preset, name, seed=3)
    wanted = recipes.KINDS[name].settings | recipes.KINDS[name].rows[preset].settings | {"seed": 3}
    kept = {field: value for field, value in changed(PRESETS[preset]()).items() if field not in wanted}
    assert {field: getattr(params, field) for field in [*wanted, *kept]} == wanted | kept
    assert params.dataset_name in name


def test_stl10_is_the_configuration_of_the_blog_post():
    assert ssl.recipe("byol", "stl10", max_epochs=train_blog.BASE.max_epochs) == train_blog.BASE


def test_expected_results_are_above_the_random_encoder_by_more_than_their_deviations():
    for preset, name in ROWS:
        result = recipes.KINDS[name].rows[preset].result
        if result and result.random:
            (random, spread), (trained, spread_trained) = result.random, result.trained
            assert trained > random + (spread or 0) + (spread_trained or 0)


def test_results_on_digits_and_image_files_are_those_of_the_benchmark():
    runs = {}
    for row in harness.read(harness.RESULTS / "recipes.csv")[1]:
        runs.setdefault((row["recipe"], row["preset"]), []).append(row)
    assert {*runs} == {(name, preset) for preset, name in ROWS if name in ("digits", "folder")}
    for (name, preset), rows in runs.items():
        result = recipes.KINDS[name].rows[preset].result
        assert result.seeds == len(rows)
        for column, (mean, spread) in {"random": result.random, "trained": result.trained}.items():
            found = [float(row[column]) for row in rows]
            assert mean == pytest.approx(statistics.mean(found), abs=0.051)
            assert spread is None or spread == pytest.approx(statistics.stdev(found), abs=0.051)
        assert {float(row["pixels"]) for row in rows} == {recipes.KINDS[name].pixels}


@pytest.mark.parametrize("name", ["cifar10_laptop", "cifar10_quick", "cifar10_gpu"])
def test_results_on_cifar10_are_those_of_the_benchmark(name):
    scores = {}  # of a preset and learning rate: those of some presets are compared
    for row in harness.read(harness.RESULTS / f"{name}.csv")[1]:
        scores.setdefault((row["preset"], row["lr"]), []).append(float(row["linear %"]))
    for preset, row in recipes.KINDS[name].rows.items():
        found = scores.get((preset, str(ssl.recipe(preset, name).lr)))
        assert (row.result is None) == (found is None)
        if row.result:
            assert row.result.trained[0] == pytest.approx(statistics.mean(found), abs=0.051)
            assert row.result.random[0] == pytest.approx(statistics.mean(scores["random encoder", ""]), abs=0.051)
            assert row.result.seeds == len(found)


@pytest.mark.parametrize(
    ("preset", "name", "message"),
    [
        ("simclr", "digit", r"^recipe=digit: simclr has no such recipe. Did you mean digits\? Choose one of digits, "),
        (
            "moco_v3",
            "stl10",
            "^recipe=stl10: moco_v3 has no such recipe. Choose one of digits, cifar10_laptop, cifar10_gpu.$",
        ),
        ("sce_video", "digits", "^recipe=digits: sce_video has no such recipe. No recipe of sce_video was tried"),
    ],
)
def test_unknown_recipe_names_those_that_exist(preset, name, message, capsys):
    with pytest.raises(ValueError, match=message):
        ssl.recipe(preset, name)
    with pytest.raises(SystemExit):
        command_line.parse([preset, "--recipe", name])
    assert capsys.readouterr().err.startswith(f"error: recipe={name}: {preset} has no such recipe.")


def test_options_win_over_the_recipe_and_the_configuration_has_what_results(tmp_path, capsys):
    preset, options, params = command_line.parse(["simclr", "--recipe", "digits", "--lr", "0.5"])
    assert params == ssl.recipe("simclr", "digits", lr=0.5) and options.recipe == "digits"
    file = tmp_path / "config.yaml"
    file.write_text(command_line.to_yaml(preset, options, params))
    assert command_line.parse(["--config", str(file)]) == (preset, options, params)
    file.write_text("preset: simclr\nrecipe: digits\nlr: 0.5\n")
    assert command_line.parse(["--config", str(file)]) == (preset, options, params)
    bad = tmp_path / "bad.yaml"
    bad.write_text("preset: simclr\nrecipe: [digits]\n")
    with pytest.raises(SystemExit):
        command_line.parse(["--config", str(bad)])
    assert "recipe=['digits']: must be a name" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.parse(["--config", str(file), "--recipe", "digits"])
    assert "Pass --recipe or --config" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.parse(["simclr", "--help"])
    shown = capsys.readouterr().out
    assert "Recipes (--recipe NAME): digits, " in shown and "Defaults below" not in shown
    with pytest.raises(SystemExit):
        command_line.parse(["simclr", "--recipe", "digits", "--help"])
    assert "\nDefaults below: recipe digits\n" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_recipe_beats_its_random_encoder(digits_path, monkeypatch):
    """With few labels, after a part of its epochs."""
    monkeypatch.setenv("DATA_PATH", str(digits_path))
    params = ssl.recipe("vicreg", "digits", seed=0, evaluations=[], max_epochs=2)
    model = ssl.SelfSupervisedMethod(params)

    def accuracy() -> float:
        train_x, train_y, test_x, test_y = features(model.model, params)
        labeled = torch.cat([torch.nonzero(train_y == label)[:5, 0] for label in range(10)])
        return validation.knn(train_x[labeled], train_y[labeled], test_x, test_y)["valid_knn20_acc"]

    before = accuracy()
    pl.Trainer(accelerator="cpu", max_epochs=2, **QUIET).fit(model)
    assert accuracy() > before + 2


def test_benchmark_folder_holds_the_images_of_cifar10_by_class(tmp_path, monkeypatch):
    images, labels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8), np.array([6, 9, 9, 0])
    for split in ("train", "test"):
        folder = tmp_path / "cifar10" / split
        folder.mkdir(parents=True)
        np.save(folder / "images.npy", images)
        np.save(folder / "labels.npy", labels)
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    monkeypatch.setattr(benchmark, "IMAGES", {"train": 3, "test": 1})
    benchmark.write_folder(tmp_path / "folder")
    found = {path.relative_to(tmp_path / "folder").as_posix() for path in tmp_path.rglob("*.png")}
    assert found == {"train/frog/00000.png", "train/truck/00001.png", "train/truck/00002.png", "test/frog/00000.png"}
    assert np.array_equal(PIL.Image.open(tmp_path / "folder/train/truck/00002.png"), images[2])


def test_page_is_current():
    text = recipes_page.PAGE.read_text()
    assert recipes_page.updated(text, recipes_page.generated()) == text, "run: python docs/recipes_page.py"
