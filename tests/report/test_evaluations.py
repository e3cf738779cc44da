"""The table of methods x protocols, compared with means and deviations computed by hand from stored results."""

import csv
import json
import re
import shlex
import shutil
import sys

import pytest
import yaml

from self_supervised import evaluate
from self_supervised.evaluation.protocols import PROTOCOLS, Protocol
from self_supervised.evaluation.results import Results
from self_supervised.report import compare, evaluations, report


def record(protocol, scores, seed=0, encoder="trained", weights="w", **more):
    place = {"protocol": protocol, "dataset": "digits", "encoder": encoder, "seed": seed}
    key = f"{encoder} {weights} {protocol} {seed}"
    return place | {"key": key, "hash": weights, "scores": scores, "seconds": 1, "definition": "d", "source": ""} | more


def written(out, records, **settings):
    """Write a run with stored results."""
    out.mkdir(parents=True)
    config = {"preset": "simclr", "dataset_name": "digits", "lr": 0.1, "seed": 0}
    (out / "config.yaml").write_text(yaml.safe_dump(config | settings))
    (out / "results.json").write_text('{"trained encoder": {"valid_knn20_acc": 61.5}}')
    (out / "pretrained.ckpt").touch()
    stored = Results(out / "pretrained.evaluation")
    stored.begin("digits", {"encoders": {}, "versions": {}})
    stored.add(*records)
    return out


@pytest.fixture
def runs(tmp_path):
    """SimCLR of two seeds, each evaluated with two seeds, and BYOL, which lacks knn."""
    random = [record("linear", {"acc1": 75.0, "l2": 1.0}, encoder="random", weights="r")]
    first = [record("linear", {"acc1": 80.0, "l2": 1.0}), record("linear", {"acc1": 82.0, "l2": 9.0}, 1)]
    second = [record("linear", {"acc1": 84.0, "l2": 1.0}), record("linear", {"acc1": 88.0, "l2": 1.0}, 1)]
    byol = [record("linear", {"acc1": 90.0, "l2": 1.0}, seed) for seed in (0, 1)]
    return [
        written(tmp_path / "simclr_0", [*first, record("knn", {"knn20_acc1": 50.0}), *random], seed=0),
        written(tmp_path / "simclr_1", [*second, record("knn", {"knn20_acc1": 53.0}), *random], seed=1),
        written(tmp_path / "byol", [*byol, *random], preset="byol"),
    ]


def test_seeds_of_one_method_give_mean_and_sample_deviation_of_the_runs(runs):
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows(runs))
    assert table.header == ["", "linear acc1", "knn20_acc1"]
    # runs: (80 + 82) / 2 = 81 and (84 + 88) / 2 = 86; mean 83.5, deviation (86 - 81) / sqrt(2) = 3.54
    assert table.texts("[{}]") == [
        ["simclr_{0,1}", "83.50 ± 3.54", "51.50 ± 2.12"],
        ["byol", "[90.00 ± 0.00]", ""],
        ["random encoder", "75.00", ""],
    ]
    assert "Evaluation seeds: 0, 1 (linear); 0 (knn)." in table.notes
    missing = (
        "Missing values: not evaluated yet are byol (knn), random encoder (knn): self-supervised evaluate "
        f"{runs[0]} {runs[2]} --dataset_name digits --protocols knn --seeds 0"
    )
    assert missing in table.notes  # the random encoder's value is stored with the first run


def test_one_run_has_the_deviation_over_evaluation_seeds_or_draws(runs, tmp_path):
    drawn = written(tmp_path / "drawn", [record("few_labels", {"labels1_acc1": 40.0, "labels1_acc1_std": 2.5})])
    first, second = (evaluations.evaluation_tables(evaluations.evaluated_rows([run]))[0] for run in (runs[0], drawn))
    assert first.texts("{}")[0] == ["simclr_0", "81.00 ± 1.41", "50.00"]  # (82 - 80) / sqrt(2)
    assert second.texts("{}") == [["drawn", "40.00 ± 2.50"]]
    assert first.best == {(0, 0)} and second.best == set()  # no other value


def test_a_run_of_a_group_that_is_not_evaluated_is_named(runs, tmp_path):
    new = written(tmp_path / "simclr_2", [], seed=2)
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([*runs[:2], new]))
    assert table.texts("{}")[0] == ["simclr_{0,1,2}", "83.50 ± 3.54 (2 of 3)", "51.50 ± 2.12 (2 of 3)"]
    assert any(str(new) in note and "--protocols linear knn --seeds 0 1" in note for note in table.notes)
    found = [record("linear", {"acc1": 1.0}), record("knn", {"knn20_acc1": 1.0})]
    first = written(tmp_path / "byol_0", [*found, record("linear", {"acc1": 1.0}, encoder="lagging")], seed=0, lr=1)
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([first]))
    assert any(note.endswith("--protocols knn --seeds 0 --lagging") for note in table.notes)
    assert [row.label for row in table.rows] == ["byol_0", "lagging encoder"]
    more = {"training": {"max_epochs": 10}, "seen": {"evaluation_clips": 4, "labels_from": "file"}}
    measured = [record("knn", {}), record("linear_sgd", {}, **more)]
    command = evaluations.evaluate_command("digits", {"a": {"knn", "linear_sgd"}, "b": set()}, "", measured)
    assert command.endswith("evaluate a --dataset_name digits --protocols knn linear_sgd --seeds 0 --evaluation_clips=4"
                            " --max_epochs=10 --labels_from=file")  # fmt: skip


def test_the_command_for_missing_values_reads_the_same_custom_images(tmp_path):
    new = written(tmp_path / "new", [], dataset_name="folder", test_size=0.5)
    seen = {"labels_from": None, "include_patterns": ["*.png", "b"], "pixel_range": [0, 9], "val_size": 0.0}
    seen |= {"test_size": 0.5, "image_key": None, "data_fraction": 0.5, "images": "hash"}
    command = evaluations.evaluate_command("folder", {str(new): {"knn"}}, "", [record("knn", {}, seen=seen)])
    command, _, places = command.partition(" (and ")
    args = evaluate.evaluate_options(shlex.split(command)[2:])
    assert {name: getattr(args, name) for name in seen if hasattr(args, name)} == {
        name: seen[name] for name in ("labels_from", "include_patterns", "pixel_range", "val_size")
    }  # the others are the run's own
    assert "--data_path" in places
    step = tmp_path / "new/pretraining/checkpoints/step_1.ckpt"
    found = evaluations.choice_of_images(seen, "folder", [str(step)])
    assert found.keys() == {"labels_from", "include_patterns", "pixel_range", "val_size", "exif_orientation"}
    earlier = written(tmp_path / "earlier", [], dataset_name="folder", exif_orientation=False, num_frames=4)
    for n, expected in ((4, {"exif_orientation": True}), (8, {"exif_orientation": True, "num_frames": 8})):
        found = evaluations.choice_of_images({"images": "hash", "num_frames": n}, "folder", [str(earlier)])
        assert found == expected


@pytest.mark.parametrize(("metric", "best"), [("uniformity", 0), ("alpha_req", 1), ("rank_me", 2)])
def test_the_best_value_is_the_lowest_the_nearest_to_1_or_the_highest(metric, best, tmp_path):
    values = {"a": -3.0, "b": 1.2, "c": 2.4, "d": float("nan")}
    made = [written(tmp_path / n, [record(metric, {metric: v})], preset=n) for n, v in values.items()]
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows(made))
    assert table.best == {(best, 0)} and table.texts("{}")[3] == ["d", "not finite"]


def test_a_new_protocol_says_which_of_its_values_are_best(tmp_path, monkeypatch):
    def goodness(score, value):
        return -value if score == "ece" else value

    row = Protocol(lambda data, seed: {}, "calibration", "", goodness=goodness)
    monkeypatch.setitem(PROTOCOLS, "calibration", row)
    values = {"a": (1.0, 60.0, 2.0), "b": (30.0, 90.0, 1.0)}
    for name, (ece, acc1, other) in values.items():
        found = [record("calibration", {"ece": ece, "acc1": acc1}), record("of_another_version", {"x": other})]
        written(tmp_path / name, found, preset=name)
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([tmp_path / name for name in values]))
    assert table.header == ["", "calibration ece", "calibration acc1", "of_another_version x"]
    assert table.best == {(0, 0), (1, 1), (0, 2)}


def test_a_run_on_another_data_set_is_named_and_not_to_be_evaluated_on_this_one(runs, tmp_path):
    other = written(tmp_path / "other", [], dataset_name="cifar10")
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([*runs, other]))
    assert "Not evaluated on digits: other (pretrained on cifar10)." in table.notes
    assert not any(str(other) in note for note in table.notes)


def test_values_that_cannot_be_compared_are_not_ranked(runs, tmp_path):
    other = written(tmp_path / "other", [record("linear", {"acc1": 99.0}, definition="of another version")], lr=1)
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([*runs, other]))
    assert not any(column == 0 for _, column in table.best)
    assert any(note.startswith("linear: not comparable") for note in table.notes)


def test_baselines_with_other_weights_have_their_own_rows(runs, tmp_path):
    wide = record("linear", {"acc1": 77.0}, encoder="random", weights="wide")
    other = written(tmp_path / "wide", [record("linear", {"acc1": 91.0}), wide], encoder_arch="resnet50")
    (table,) = evaluations.evaluation_tables(evaluations.evaluated_rows([*runs, other]), ["linear"])
    assert table.texts("{}")[-2:] == [["random encoder of simclr_0", "75.00"], ["random encoder of wide", "77.00"]]
    assert table.header == ["", "linear acc1"]


def test_runs_with_the_same_seed_are_no_further_seeds(runs, tmp_path, capsys):
    copied = shutil.copytree(runs[0], tmp_path / "copied")
    rows = evaluations.evaluated_rows([*runs, copied])
    (table,) = evaluations.evaluation_tables(rows)
    note = f"{runs[0]}, {copied}: runs with the same seed (0), so ± is not the deviation over seeds."
    assert [line for line in table.notes if "same seed" in line] == [note]
    compare.main([str(runs[0]), str(copied)])
    assert "runs with the same seed (0)" in " ".join(capsys.readouterr().out.split())
    compare.main([*map(str, runs)])
    assert "same seed" not in capsys.readouterr().out


def test_compare_shows_the_table_before_results_and_settings(runs, monkeypatch, capsys, tmp_path):
    command = ["compare", *map(str, runs), "--csv", str(tmp_path / "c.csv")]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setenv("COLUMNS", "80")
    compare.main()
    shown = capsys.readouterr().out
    assert re.search(r"simclr_\{0,1\} +│ +83.50 ± 3.54 │.*\n│ byol +│ +\*90.00 ± 0.00", shown)
    assert shown.index("Evaluated on digits") < shown.index("trained encoder") < shown.index("preset")
    assert max(map(len, shown.split("Missing values")[0].splitlines()[:8])) <= 80
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    linear = next(row for row in rows if row["kind"] == "evaluation" and row["run"] == "simclr_{0,1}")
    assert (linear["protocol"], linear["metric"], linear["n"], linear["best"]) == ("linear", "acc1", "2", "False")
    assert float(linear["value"]) == 83.5 and float(linear["std"]) == pytest.approx(12.5**0.5)
    assert {row["kind"] for row in rows} == {"evaluation", "result", "setting"}
    monkeypatch.setattr(sys, "argv", [*command[:-2], "--markdown"])
    compare.main()
    table = capsys.readouterr().out
    assert "| byol | **90.00 ± 0.00** |  |" in table and "| preset | simclr | byol |" in table


def test_a_comparison_of_five_runs_fits_into_80_columns(tmp_path, monkeypatch, capsys):
    presets = ("barlow_twins", "byol", "moco_v2", "simclr", "vicreg")
    made = [written(tmp_path / f"{name}_digits_small", [], preset=name) for name in presets]
    monkeypatch.setenv("COLUMNS", "80")
    compare.main([*map(str, made)])
    table = capsys.readouterr().out.partition("Not evaluated yet")[0]
    assert max(map(len, table.splitlines())) <= 80 and table.count("━┓") == 1  # in one part
    cells = [[cell.strip() for cell in row.split("│")[1:-1]] for row in table.splitlines()]
    assert ["preset", "barlow_", *presets[1:]] in cells and ["", "twins", "", "", "", ""] in cells
    assert ["valid_knn20_acc", *["61.5"] * 5] in cells


def test_compare_and_report_name_the_command_if_nothing_was_evaluated(runs, tmp_path, monkeypatch, capsys):
    new = written(tmp_path / "new", [])
    monkeypatch.setattr(sys, "argv", ["compare", str(new)])
    compare.main()
    assert f"self-supervised evaluate {new} --protocols knn linear" in capsys.readouterr().out


def test_the_report_has_the_values_of_evaluate_next_to_those_of_the_run(runs, tmp_path):
    page = report.write_report(runs, tmp_path / "r.html", images=0).read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)[1])
    shown = {(row["of"], row["name"]): row["values"] for row in data["results"]}
    assert shown["trained encoder", "linear acc1 on digits"] == ["81.00 ± 1.41", "86.00 ± 2.83", "90.00 ± 0.00"]
    assert shown["random encoder", "linear acc1 on digits"] == ["75.00"] * 3
    assert shown["trained encoder", "knn20_acc1 on digits"] == ["50.00", "53.00", ""]
    assert shown["trained encoder", "valid_knn20_acc"] == ["61.5"] * 3
    marks = {(row["of"], row["name"]): row["marks"] for row in data["results"]}
    assert marks["trained encoder", "linear acc1 on digits"] == ["better"] * 3
    assert marks["random encoder", "linear acc1 on digits"] == [""] * 3
    assert "Evaluation seeds: 0, 1 (linear); 0 (knn)." in data["caution"]


@pytest.mark.parametrize("arguments", ["{0} {0}/pretrained.ckpt", "{0} {1} --out x", "{0} nothing.ckpt"])
def test_checkpoints_are_refused_before_the_first_evaluation(arguments, runs, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_checkpoint", None)  # would raise another error
    with pytest.raises(SystemExit, match="2 times|out=x|nothing.ckpt"):
        evaluate.main(arguments.format(*runs).split())


@pytest.mark.parametrize(
    "name",
    ["dataset_name", "data_seed", "splits_path", "label_key", "pixel_range", "evaluation_clips", "exif_orientation"],
)
def test_results_on_different_data_are_not_ranked(name):
    result = compare.MetricRow("result", "trained encoder: valid_knn20_acc", ((80.0,), (91.0, 93.0), ()))
    other = compare.MetricRow("setting", "lr", ("0.1", "0.3", "0.1"))
    data = compare.MetricRow("setting", name, ("digits", "folder", "digits"))
    assert compare.best_columns(result, [result, other]) == [1]
    assert compare.best_columns(result, [result, other, data]) == []
