"""Reports on runs: their content compared with the files of the runs, and the page in a browser."""

import base64
import csv
import io
import json
import math
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from browser import CHROMIUM, Browser
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from model_params import PRESETS
from self_supervised.data import data_sets
from self_supervised.networks.pretrained import load_encoder
from self_supervised.report import evaluations, pictures, report, tables
from self_supervised.report import figures as report_figures

pytestmark = pytest.mark.filterwarnings("ignore:collapse", "ignore::ResourceWarning")
RUN = (
    "moco_v2 --dataset_name digits --encoder_arch small_cnn --batch_size 64 --dim 16 --mlp_hidden_dim 32 "
    "--K 64 --lr 0.1 --max_epochs 2 --limit_train_batches 3 --log_every_n_steps 1 --seed 3 --use_momentum_schedule "
    "true --linear_epochs 1 --linear_lr 0.1 --out {out}"
)
EPOCHS, STEPS = 2, 6


@pytest.fixture(scope="module")
def run(finished_run) -> Path:
    return finished_run(RUN)


@pytest.fixture(scope="module")
def other(run, tmp_path_factory) -> Path:
    """A second run: other settings, a term of the loss, many steps, and a command that tries to inject a script."""
    out = shutil.copytree(run, tmp_path_factory.mktemp("runs") / "second", ignore=shutil.ignore_patterns("*.ckpt"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "lr": 0.25, "use_lagging_model": False}))
    rng, names = np.random.default_rng(0), ["step", "epoch", "step_train_loss", "loss_variance", "new_figure", "m"]
    rows = [[i, i // 100, rng.normal(), 1000 + rng.normal(), i % 7, 0.5] for i in range(5000)]
    with (out / "pretraining" / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    (out / "command.txt").write_text("self-supervised train --out </script><script>document.title='bad'</script>\n")
    return out


@pytest.fixture(scope="module")
def page(run, digits_path, tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DATA_PATH", str(digits_path))
        return report.write_report([run], tmp_path_factory.mktemp("page") / "report.html")


def data_of(page: Path) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.S)[1])


def data_of_map(page: Path) -> dict:
    (run,) = data_of(page)["runs"]
    return json.loads(re.search(r'id="data">(.*?)</script>', run["map"]["page"], re.S)[1])


def column(file: Path, name: str) -> tuple[list[int], list[float]]:
    with file.open(newline="") as rows:
        found = {int(row["step"]): float(row[name]) for row in csv.DictReader(rows) if row.get(name)}
    return list(found), list(found.values())


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split("base64,")[1]))).convert("L"))


# ---- content of the page ----


@pytest.mark.slow
def test_every_logged_column_is_drawn_with_its_numbers(run, page):
    drawn = set()
    for figure in data_of(page)["figures"]:
        for line in figure["lines"]:
            steps, values = column(run / figure["file"], line["name"])
            assert line["x"] == steps and np.allclose(line["y"], values, rtol=1e-5, atol=0), figure["title"]
            drawn.add((figure["file"], line["name"]))
    with (run / "pretraining" / "metrics.csv").open(newline="") as file:
        logged = set(next(csv.reader(file)))
    left_out = {"step", "epoch", "T"}  # T is constant
    assert {name for file, name in drawn if file == report_figures.PRETRAINING} == logged - left_out
    assert {"m", "lr", "valid_rank_me", "step_neg_cos", "valid_class_acc", "valid_knn20_acc"} <= logged
    assert {(report_figures.LINEAR, "valid_acc1"), ("pretraining/throughput.csv", "images_per_second")} <= drawn


def test_the_logged_learning_rate_is_the_schedule_and_every_epoch_has_a_speed(run):
    steps, rates = column(run / "pretraining" / "metrics.csv", "lr")
    assert steps == list(range(STEPS))
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * step / STEPS)) for step in steps], abs=1e-6)
    ends, speeds = column(run / "pretraining" / "throughput.csv", "images_per_second")
    assert ends == [3, 6] and all(1 < speed < 1e6 for speed in speeds)
    with open(run / "linear" / "throughput.csv", newline="") as file:
        last = [*csv.DictReader(file)][-1]
    of_linear = int(last["step"]) / int(last["epoch"])
    assert report_figures.steps_per_epoch(run) == {"pretraining": 3, "linear": of_linear}


def test_an_epoch_that_max_time_ended_does_not_count(tmp_path):
    (tmp_path / "pretraining").mkdir()
    rows = "step,epoch,images_per_second\n100,1,1\n200,2,1\n210,3,1\n"
    (tmp_path / "pretraining" / "throughput.csv").write_text(rows)
    assert report_figures.steps_per_epoch(tmp_path)["pretraining"] == 100


def test_views_are_of_the_lists_of_the_run(run, monkeypatch, tmp_path):
    (tmp_path / "run" / "splits").mkdir(parents=True)
    (tmp_path / "run" / "splits" / "train.txt").touch()
    seen = []
    monkeypatch.setattr(pictures, "views", seen.append)
    for folder in (tmp_path / "run", run):
        next(pictures.picture_parts(folder, {"splits_path": "nowhere"}, 0, 0, None))
    assert [settings["splits_path"] for settings in seen] == [str(tmp_path / "run" / "splits"), None]


def test_a_full_device_leaves_out_a_part():
    def fill():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    assert "out of memory on this device" in pictures.content_or_reason(fill)["missing"]


def test_settings_are_those_that_differ_from_the_preset_and_results_are_the_files(run, page):
    content, config = data_of(page), yaml.safe_load((run / "config.yaml").read_text())
    plain = PRESETS["moco_v2"]()
    shown = {row["name"]: row["values"][0]["text"] for row in content["settings"]["rows"]}
    expected = {
        name: str(v).lower() for name, v in config.items() if hasattr(plain, name) and v != getattr(plain, name)
    }
    options = {
        "precision": "32-true",
        "limit_train_batches": "3",
        "log_every_n_steps": "1",
        "linear_epochs": "1",
        "linear_lr": "0.1",
    }
    assert shown == expected | options and shown["lr"] == "0.1"
    effective = {row["name"]: row["values"] for row in content["effective"]}
    written = (run / "config.yaml").read_text().partition("# Effective settings")[2].replace("\n#  ", "")
    assert all(f"{name}: {words}" in written.replace("'", "") for name, (words,) in effective.items())
    assert "6 steps" in effective["length"][0] and tables.effective_of_settings(config).keys() == effective.keys()
    results = json.loads((run / "results.json").read_text())
    for row in content["results"]:
        if row["of"] in results:
            assert float(row["values"][0]) == pytest.approx(results[row["of"]][row["name"]], rel=1e-3)
        last = row["name"]
        if row["of"] == "trained encoder":
            change = results[row["of"]][row["name"]] - results["random encoder"][row["name"]]
            is_marked = row["name"].startswith("valid_") and row["name"].endswith("_acc") and change != 0
            assert row["marks"] == [("better" if change > 0 else "worse") if is_marked else ""], row
    assert last == "train_class_acc"  # of the images to which the probe was fitted
    assert {"random encoder", "trained encoder", "linear classifier", "best epoch"} <= {
        r["of"] for r in content["results"]
    }
    (about,) = content["runs"]
    assert about["commands"] == [f"self-supervised train {RUN.format(out=run)}"] and about["state"] == "finished"
    assert torch.__version__.split("+")[0] in about["facts"]["versions"]


def test_views_neighbors_and_map_are_of_the_runs_images_and_encoder(run, page):
    (about,) = data_of(page)["runs"]
    params = load_encoder(run / "pretrained.ckpt").params
    images, _ = data_sets.get_dataset(params, ("train",)).__getitems__(range(1297))
    known = {image.numpy().tobytes() for image in images}
    original, *views = about["views"]["columns"]
    assert len(views) == 2 and about["views"]["abreast"] == len(original["pictures"]) == 6
    assert all(pixels(uri).tobytes() in known for uri in original["pictures"])
    assert all(pixels(uri).shape == (8, 8) for view in views for uri in view["pictures"])

    images, labels = data_sets.get_dataset(params, ("test",)).__getitems__(range(500))
    x = load_encoder(run / "pretrained.ckpt").embed(images).numpy().astype(np.float64)
    near = NearestNeighbors(n_neighbors=pictures.NEIGHBORS + 1, metric="cosine").fit(x)
    rows = about["neighbors"]["rows"]
    assert len({row["query"]["label"] for row in rows}) == len(rows) == pictures.QUERIES
    for row in rows:
        i = int(row["query"]["path"].removeprefix("test/"))
        distances, _ = near.kneighbors(x[[i]])
        found = [int(one["path"].removeprefix("test/")) for one in row["found"]]
        assert [one["cosine"] for one in row["found"]] == pytest.approx(1 - distances[0, 1:], abs=2e-3)
        assert i not in found and [one["label"] for one in row["found"]] == [str(int(labels[j])) for j in found]
        assert all(
            (pixels(one["picture"]) == images[j, 0].numpy()).all() for one, j in zip(row["found"], found, strict=True)
        )
    inner = data_of_map(page)
    assert [inner["names"][kind] for kind in inner["kind"]] == [str(int(label)) for label in labels]


def test_multiple_runs_are_overlaid_and_distinguishable(run, other, tmp_path):
    content = data_of(report.write_report([run, other], tmp_path / "both.html", images=0))
    assert [one["name"] for one in content["runs"]] == ["first", "second"]
    lines = {f["title"]: {(line["run"], line["name"]) for line in f["lines"]} for f in content["figures"]}
    assert lines["Loss"] == {(0, "step_train_loss"), (1, "step_train_loss")}
    assert lines["Loss: variance"] == {(1, "loss_variance")} and lines["new_figure"] == {(1, "new_figure")}
    assert lines["Momentum of the lagging model"] == {(0, "m")}  # the other run has no lagging model
    rates = next(row for row in content["settings"]["rows"] if row["name"] == "lr")
    assert [cell["text"] for cell in rates["values"]] == ["0.1", "0.25"]
    assert {(about["map"]["missing"]) for about in content["runs"]} == {"--images 0: no images were embedded"}


def test_defaults_of_different_presets_are_named(run, other, tmp_path):
    shutil.copytree(other, tmp_path / "third")
    config = yaml.safe_load((other / "config.yaml").read_text())
    changed = {"preset": "byol", "prediction_mlp_layers": 3, "dim": 32}
    (tmp_path / "third" / "config.yaml").write_text(yaml.safe_dump(config | changed))
    content = data_of(report.write_report([run, other, tmp_path / "third"], tmp_path / "three.html", images=0))
    standard = {row["name"]: row["preset"] for row in content["settings"]["rows"]}
    assert standard["prediction_mlp_layers"] == "moco_v2 0, byol 2" and standard["dim"] == "128"


def test_long_lines_are_thinned_without_losing_a_peak():
    steps, values = np.arange(100_000), np.zeros(100_000)
    values[[777, 50_001]] = 9, -3
    x, y = report_figures.thinned(steps, values)
    assert len(x) <= report_figures.MOST_POINTS and (np.diff(x) > 0).all()
    assert {777, 50_001} <= set(x.tolist()) and y.max() == 9 and y.min() == -3
    assert report_figures.thinned(steps[:9], values[:9])[0].tolist() == list(range(9))


def test_missing_parts_are_left_out_with_the_reason(run, other, tmp_path, monkeypatch):
    (about,) = data_of(report.write_report([other], tmp_path / "r.html"))["runs"]
    assert about["map"] == about["neighbors"] == {"missing": "second has no checkpoint"} and "columns" in about["views"]
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "nothing"))
    (about,) = data_of(report.write_report([run], tmp_path / "r.html"))["runs"]
    for part in ("views", "neighbors", "map"):
        assert "digits is not in" in about[part]["missing"] and "Set DATA_PATH" in about[part]["missing"]
    assert not (tmp_path / "nothing").exists()  # nothing was downloaded or packed
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    content = data_of(report.write_report([tmp_path / "begun"]))
    assert content["figures"] == content["results"] == [] and content["runs"][0]["state"].startswith("not finished")
    (tmp_path / "begun/results.json").write_text('{"epochs": 300, "random encoder": {}}')  # earlier versions
    (about,) = data_of(report.write_report([tmp_path / "begun"]))["runs"]
    assert about["state"].startswith("not finished")


def test_another_training_than_ours_is_drawn_by_curves():
    Path("linear").mkdir()
    Path("linear/metrics.csv").write_text("step,valid_acc1\n1,50\n")
    with pytest.raises(ValueError, match="linear is not a run: .* `self-supervised curves` draws other"):
        report.write_report(["linear"])


@pytest.mark.parametrize(
    ("runs", "more", "message"),
    [
        (["nowhere"], {}, "nowhere is not a run"),
        (["a"] * 9, {}, "9 runs: a report shows 1 to 8"),
        (["a"], {"images": -1}, "images=-1"),
        (["a"], {"out": "."}, "out=."),
    ],
)
def test_invalid_arguments_are_refused(runs, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        report.write_report(runs, **more)


def test_runs_with_the_same_name_are_named_by_their_paths(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert evaluations.names_of_runs(folders) == ["a/run", "b/run"]
    with pytest.raises(ValueError, match="was passed 2 times"):
        evaluations.names_of_runs([folders[0], folders[0]])


@pytest.mark.slow
def test_the_command_writes_into_the_runs_folder(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report", str(run), "--images", "0"])
    report.main()
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    assert "://" not in re.sub(r"http://www.w3.org/2000/svg", "", (run / "report.html").read_text())


# ---- in a browser ----

CONTRAST = """(() => {
  const light = text => {
    const linear = v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[0-9.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = light(getComputedStyle(document.body).backgroundColor), found = {lines: Infinity};
  const ratio = front => (Math.max(front, back) + 0.05) / (Math.min(front, back) + 0.05);
  for (const chosen of ["body", ".about", ".chart p", "td.plain", "nav a"])
    found[chosen] = ratio(light(getComputedStyle(document.querySelector(chosen)).color));
  for (const path of document.querySelectorAll(".plot path.line"))
    found.lines = Math.min(found.lines, ratio(light(getComputedStyle(path).stroke)));
  return found;
})()"""  # https://www.w3.org/TR/WCAG21/#dfn-contrast-ratio


def eventually_shows(browser: Browser, file: Path, colors: list[str], seconds: float = 20) -> bool:
    """Return whether all of the colors (of the legend) are on the screen within that time."""
    wanted, until = {bytes.fromhex(color[1:]) for color in colors}, time.monotonic() + seconds
    while time.monotonic() < until:
        browser.screenshot(file)
        pixels = np.asarray(Image.open(file).convert("RGB")).reshape(-1, 3)
        if wanted <= {pixel.tobytes() for pixel in pixels}:
            return True
    return False


CUT = """(boxes => [boxes.map(box => box.scrollWidth > box.clientWidth + 1),
  boxes.map(box => !box.previousElementSibling.hidden)])([...document.querySelectorAll(".table")])"""
LINES = """[...document.querySelectorAll(".chart")].map(chart => [chart.dataset.title,
  [...chart.querySelectorAll("path.line")].map(one => one.getTotalLength() > 10 || !!chart.querySelector("circle"))])"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_the_page_is_drawn_and_readable(page, tmp_path, width, dark):
    figures, inner = data_of(page)["figures"], data_of_map(page)
    with Browser(page, tmp_path / "profile", width=width, dark=dark) as browser:
        assert browser.run("document.scrollingElement.scrollWidth") <= browser.run("innerWidth") == width
        drawn = browser.run(LINES)
        assert [(title, len(lines)) for title, lines in drawn] == [(f["title"], len(f["lines"])) for f in figures]
        assert all(all(lines) for _, lines in drawn)
        ratios = browser.run(CONTRAST)
        assert ratios.pop("lines") > 3 and all(ratio > 4.5 for ratio in ratios.values()), ratios
        assert browser.run("document.querySelectorAll('.missing').length") == 0
        cut, shown = browser.run(CUT)
        assert cut == shown and (width > 400 or any(cut))
        views, section = browser.run("['.views', '#views'].map(one => document.querySelector(one).clientWidth)")
        assert views == section and not browser.run("document.querySelector('#settings details').open")
        names = browser.run("[...document.querySelectorAll('.near figure')].map(one => one.innerText)")
        first = data_of(page)["runs"][0]["neighbors"]["rows"][0]["found"][0]
        number = first["path"].removeprefix("test/")
        assert names[0].split() == [first["label"], number, "cosine", f"{first['cosine']:.2f}"]
        assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth === 8)")
        browser.run("document.querySelector('iframe').scrollIntoView({behavior: 'instant'})")
        assert eventually_shows(browser, tmp_path / "map.png", inner["colors"])
        assert browser.errors == [] and all(url.startswith(("file:", "data:", "about:")) for url in browser.requests)


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_curves_respond_to_input(run, other, tmp_path):
    """Values at the pointer, smoothing, epochs, hiding a run; a malicious command is shown as text."""
    page = report.write_report([run, other], tmp_path / "both.html", images=0)
    with Browser(page, tmp_path / "profile") as browser:
        assert browser.run("document.title") == "first, second: report"
        assert "document.title='bad'" in browser.run("document.querySelector('#provenance').innerText")
        before = json.loads((run / "results.json").read_text())["random encoder"]["valid_knn20_acc"]
        row = "[...document.querySelectorAll('#results tr')].find(one => one.innerText.includes('valid_knn20_acc'))"
        assert f"{before:.4g} → " in browser.run(f"{row}.innerText")
        browser.run("document.querySelector('#provenance').scrollIntoView({behavior: 'instant'})")
        names = "(box => [box.innerText, box.getBoundingClientRect().top])(document.querySelector('nav .names'))"
        shown, top = browser.run(names)
        assert shown.split() == ["first", "second"] and 0 <= top < 80  # in sight while scrolling
        browser.run("document.querySelector('#figure-0').scrollIntoView({behavior: 'instant', block: 'center'})")
        middle = "(b => [b.x + b.width / 2, b.y + b.height / 2])(document.querySelector('#figure-0 .plot')"
        browser.mouse("mouseMoved", *browser.run(f"{middle}.getBoundingClientRect())"))
        shown = browser.run("document.querySelector('#figure-0 .tip').innerText")
        assert shown.startswith("step ") and "first" in shown and "second" in shown
        browser.run("$('smoothing').value = 0; $('controls').dispatchEvent(new Event('input'))")
        assert browser.run("document.querySelectorAll('path.raw').length") == 0
        browser.run("$('smoothing').value = 0.9; $('controls').dispatchEvent(new Event('input'))")
        assert browser.run("document.querySelectorAll('#figure-0 path.raw').length") == 1  # of the long run
        values = np.random.default_rng(1).normal(size=50).tolist()
        mean, expected = 0.0, []
        for i, value in enumerate(values):
            mean = 0.9 * mean + 0.1 * value
            expected.append(mean / (1 - 0.9 ** (i + 1)))
        assert browser.run(f"smooth({values})") == pytest.approx(expected)
        browser.run("document.querySelectorAll('button.run')[1].click()")
        assert browser.run("document.querySelectorAll('#figure-0 path.line').length") == 1
        assert browser.errors == []
