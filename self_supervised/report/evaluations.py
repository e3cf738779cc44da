"""Table of methods x protocols: what `self-supervised evaluate` stored next to runs and checkpoints.

A row is one checkpoint, or the runs that differ only in the seed, or a baseline of theirs.
"""

import json
import os
import shlex
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attrs import frozen

from model_params import DATASET_DEFAULTS
from self_supervised.data.foreign_paths import config_of, run_of
from self_supervised.evaluation import results
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.evaluation.results import DRAWN, RunRecord
from self_supervised.fields import as_path
from self_supervised.setting_groups import EARLIER_DEFAULTS, MEASUREMENT, SUBSET
from self_supervised.training import run_folder
from self_supervised.training.milestones import is_finite

NOT_SCORES = ("l2",)  # hyperparameters that are stored with the scores
DEVIATION = "±: sample standard deviation over runs; in a row of one run over evaluation seeds, or draws of one seed."


@frozen
class Evaluated:
    """A row of the table."""

    label: str
    checkpoints: tuple[str, ...]  # as they were passed
    records: tuple[list[RunRecord], ...]  # of each checkpoint


@frozen
class Cell:
    mean: float
    std: float | None
    n: int  # numbers of which this is the mean
    text: str


@frozen
class EvaluationTable:
    """Results on one data set: a row for each method, a column for each metric of each protocol."""

    dataset: str
    rows: list[Evaluated]
    columns: list[tuple[str, str]]  # protocol, metric
    cells: list[list[Cell | None]]
    best: set[tuple[int, int]]  # row, column
    notes: list[str]

    @property
    def header(self) -> list[str]:
        return ["", *(metric_name(*column) for column in self.columns)]

    def texts(self, mark: str) -> list[list[str]]:
        """Return the rows as text. `mark` is a format of the best values."""
        shown = [[cell.text if cell else "" for cell in cells] for cells in self.cells]
        for row, column in self.best:
            shown[row][column] = mark.format(shown[row][column])
        return [[row.label, *cells] for row, cells in zip(self.rows, shown, strict=True)]


def metric_name(protocol: str, metric: str) -> str:
    return metric if metric.startswith(protocol) else f"{protocol} {metric}"


# ---- rows ----


def refuse_repeated(folders: Sequence[str | Path]) -> None:
    for folder, times in Counter(as_path(folder).resolve() for folder in folders).items():
        if times > 1:
            raise ValueError(f"{folder} was passed {times} times. Pass it once.")


def names_of_runs(folders: Sequence[Path]) -> list[str]:
    """Return the directories' names; if two are the same, with as much of the paths as tells them apart."""
    refuse_repeated(folders)
    parts = [folder.resolve().parts for folder in folders]
    for n in range(1, max(map(len, parts))):
        names = ["/".join(path[-n:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"{folders[0]} is not the directory of a run")


def run_or_file(checkpoint: str | Path) -> Path:
    """Return the path or name; the directory of the run, if it is a run's pretrained.ckpt."""
    path = as_path(checkpoint)
    return path.parent if path.name == "pretrained.ckpt" and run_folder.settings_of_run(path.parent) else path


def without_seed(settings: dict[str, Any]) -> str:
    """Return the key of the group of runs that differ only in the seed, and in how trackers list them."""
    given = {k: v for k, v in settings.items() if v is not None}  # a setting of a later version is missing before
    computed = {k: v for k, v in given.items() if k != "seed" and not k.startswith("tracker_")}
    return json.dumps(computed, sort_keys=True)


def group_labels(groups: Iterable[list[str]]) -> list[str]:
    """Return a label for each group of names: ["a_0", "a_1"] -> "a_{0,1}"."""
    labels = []
    for names in groups:
        start = os.path.commonprefix(names)
        ends = ",".join(name.removeprefix(start) for name in names)
        labels.append(f"{start}{{{ends}}}" if start and ends else ", ".join(names))
    return labels


def shown_records(folder: Path) -> list[RunRecord]:
    """Return the runs in results.json that belong to the latest evaluation of each data set."""
    stored = results.Results(folder)
    return [run for dataset in stored.config for run in stored.shown(dataset)]


def evaluated_rows(checkpoints: Sequence[str | Path], out: Path | None = None) -> list[Evaluated]:
    """Return the rows of checkpoints, of their lagging encoders and of their baselines.

    Args:
        checkpoints: anything that `load_encoder` accepts; or directories of unfinished runs, whose rows are empty.
        out: directory of the results; default: next to each checkpoint.
    """
    paths = [run_or_file(checkpoint) for checkpoint in checkpoints]
    names = names_of_runs(paths)
    records = [shown_records(out or results.folder_of(path)) for path in paths]
    groups: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        settings = run_folder.settings_to_compare(path)
        groups.setdefault(without_seed(settings) if settings else str(i), []).append(i)
    labels = group_labels([[names[i] for i in group] for group in groups.values()])
    trained = [[run for run in runs if run["encoder"] == "trained"] for runs in records]
    rows = [
        Evaluated(label, tuple(str(checkpoints[i]) for i in group), tuple(trained[i] for i in group))
        for label, group in zip(labels, groups.values(), strict=True)
    ]
    others = sorted(results.ENCODERS.keys() - {"trained"})
    return rows + [row for encoder in others for row in other_rows(encoder, checkpoints, names, records)]


def other_rows(
    encoder: str, checkpoints: Sequence[str | Path], names: list[str], records: list[list[RunRecord]]
) -> list[Evaluated]:
    """Return a row for each different encoder of this name. Checkpoints share one if its weights and all keys of its
    runs agree."""
    rows: list[tuple[str, str, dict[tuple, RunRecord]]] = []
    for checkpoint, name, runs in zip(checkpoints, names, records, strict=True):
        own = {(run["dataset"], run["protocol"], run["seed"]): run for run in runs if run["encoder"] == encoder}
        for _, _, merged in rows:
            if all(is_equal(merged.get(place, run), run) for place, run in own.items()) and shares_weights(merged, own):
                merged |= own | merged
                break
        else:
            if own:
                rows.append((name, str(checkpoint), own))
    title = results.ENCODERS[encoder]
    return [
        Evaluated(title if len(rows) == 1 else f"{title} of {name}", (checkpoint,), (list(runs.values()),))
        for name, checkpoint, runs in rows
    ]


def is_equal(one: RunRecord, other: RunRecord) -> bool:
    return one["key"] == other["key"]


def shares_weights(*records: dict[tuple, RunRecord]) -> bool:
    return len({run["hash"] for runs in records for run in runs.values()}) == 1


# ---- tables ----


def evaluation_tables(
    rows: list[Evaluated], protocols: Sequence[str] | None = None, dataset: str | None = None
) -> list[EvaluationTable]:
    """Return a table for each data set on which at least one row was evaluated; with `protocols` or `dataset`, of these
    alone."""
    everything = [run for row in rows for runs in row.records for run in runs]
    wanted = [run for run in everything if dataset in (None, run["dataset"])]
    wanted = [run for run in wanted if protocols is None or run["protocol"] in protocols]
    of_datasets: dict[str, list[RunRecord]] = {}
    for run in wanted:
        of_datasets.setdefault(run["dataset"], []).append(run)
    return [table_of(name, rows, runs) for name, runs in of_datasets.items()]


def table_of(dataset: str, rows: list[Evaluated], runs: list[RunRecord]) -> EvaluationTable:
    columns = [
        (protocol, metric)
        for protocol in dict.fromkeys(run["protocol"] for run in runs)
        for metric in dict.fromkeys(name for run in runs if run["protocol"] == protocol for name in run["scores"])
        if metric not in NOT_SCORES and not metric.endswith(DRAWN)
    ]
    cells = [[cell_of(row, dataset, *column) for column in columns] for row in rows]
    unlike = differently_measured(runs)
    best = {
        (row, column)
        for column, (protocol, metric) in enumerate(columns)
        for row in indices_of_best([goodness(protocol, metric, row[column]) for row in cells])
        if protocol not in unlike
    }
    has_std = any(cell and cell.std is not None for row in cells for cell in row)
    notes = [DEVIATION] if has_std else []
    notes += [note for row in rows for note in same_seeds(row.checkpoints)]
    notes += [seeds_note(runs), *unlike.values(), *missing_notes(dataset, rows, runs)]
    return EvaluationTable(dataset, rows, columns, cells, best, notes)


def cell_of(row: Evaluated, dataset: str, protocol: str, metric: str) -> Cell | None:
    """Return a mean and its standard deviation over runs, of each the mean over its evaluation seeds. In a row of one
    run, they are those over its evaluation seeds, or with one seed over its draws."""
    place = (dataset, protocol)
    of_runs = [[run["scores"] for run in runs if (run["dataset"], run["protocol"]) == place] for runs in row.records]
    values = [numbers for scores in of_runs if (numbers := [one[metric] for one in scores if metric in one])]
    if not values:
        return None
    numbers = values[0] if len(row.records) == 1 else [statistics.fmean(one) for one in values]
    mean = statistics.fmean(numbers)
    std = results.deviation(numbers) if len(numbers) > 1 else None
    if len(row.records) == len(numbers) == 1:
        std = of_runs[0][0].get(f"{metric}{DRAWN}")
    missing = f" ({len(values)} of {len(row.records)})" if len(values) < len(row.records) else ""
    return Cell(mean, std, len(numbers), f"{results.mean_text(mean, std)}{missing}")


def indices_of_best(values: list[float | None]) -> list[int]:
    """Return the indices of the highest finite values, unless all are equal."""
    finite = {i: value for i, value in enumerate(values) if is_finite(value)}
    return [i for i, value in finite.items() if value == max(finite.values())] if len({*finite.values()}) > 1 else []


def goodness(protocol: str, metric: str, cell: Cell | None) -> float | None:
    """Return a number that is highest for the best value. `protocol` may be one of another version."""
    if cell is None:
        return None
    return PROTOCOLS[protocol].goodness(metric, cell.mean) if protocol in PROTOCOLS else cell.mean


def differently_measured(runs: list[RunRecord]) -> dict[str, str]:
    """Return protocol -> warning, for protocols whose values cannot be compared."""
    conditions: dict[str, set[str]] = {}
    for run in runs:
        told = [run.get("definition"), run.get("seen", {}), run.get("training", {})]
        conditions.setdefault(run["protocol"], set()).add(json.dumps(told, sort_keys=True))
    return {
        protocol: f"{protocol}: not comparable, because images, clips, training settings or version differ."
        for protocol, variants in conditions.items()
        if len(variants) > 1
    }


def seeds_of(runs: list[RunRecord]) -> dict[str, list[int]]:
    return {name: sorted({run["seed"] for run in runs if run["protocol"] == name}) for name in protocols_of(runs)}


def same_seeds(checkpoints: Iterable[str | Path]) -> list[str]:
    """Return a note on the runs of one row that have the same seed, as copies and repetitions of a run have."""
    of_seeds: dict[Any, list[str]] = {}
    for checkpoint in checkpoints:
        settings = run_folder.settings_of_run(run_or_file(checkpoint))
        of_seeds.setdefault(settings.get("seed"), []).append(str(checkpoint))
    return [
        f"{', '.join(names)}: runs with the same seed ({seed}), so ± is not the deviation over seeds."
        for seed, names in of_seeds.items()
        if seed is not None and len(names) > 1
    ]


def seeds_note(runs: list[RunRecord]) -> str:
    alike: dict[str, list[str]] = {}
    for name, seeds in seeds_of(runs).items():
        alike.setdefault(", ".join(map(str, seeds)), []).append(name)
    return "Evaluation seeds: " + "; ".join(f"{seeds} ({', '.join(names)})" for seeds, names in alike.items()) + "."


def missing_notes(dataset: str, rows: list[Evaluated], runs: list[RunRecord]) -> list[str]:
    """Return what is missing, with the command that adds it (it skips what is stored), and which encoders of other
    data sets were not evaluated on this one."""
    seeds = seeds_of(runs)
    missing: dict[str, dict[str, set[str]]] = {"": {}, "--lagging": {}}  # option -> checkpoint -> protocols
    lacking, others = [], []  # parts of the notes
    for row in rows:
        absent: set[str] = set()
        option = "--lagging" if any(run["encoder"] == "lagging" for records in row.records for run in records) else ""
        for checkpoint, records in zip(row.checkpoints, row.records, strict=True):
            done = protocols_of(run for run in records if run["dataset"] == dataset)
            trained_on = run_folder.settings_of_run(run_or_file(checkpoint)).get("dataset_name", dataset)
            if not done and trained_on != dataset:
                others.append(f"{row.label} (pretrained on {trained_on})")
                continue
            missing[option].setdefault(checkpoint, set()).update(seeds.keys() - done)
            absent |= seeds.keys() - done
        if absent:
            lacking.append(f"{row.label} ({', '.join(name for name in seeds if name in absent)})")
    notes = [f"Not evaluated on {dataset}: {', '.join(dict.fromkeys(others))}."] if others else []
    if not lacking:
        return notes
    commands = [evaluate_command(dataset, of, option, runs) for option, of in missing.items() if any(of.values())]
    return [*notes, f"Missing values: not evaluated yet are {', '.join(lacking)}: {'; '.join(commands)}"]


def evaluate_command(dataset: str, missing: dict[str, set[str]], option: str, runs: list[RunRecord]) -> str:
    """Return the command that evaluates checkpoints by the protocols that they lack, as the other rows were."""
    seeds = seeds_of(runs)
    names = [name for name in seeds if any(name in of for of in missing.values())]
    chosen: dict[str, Any] = {}
    for run in runs:
        if run["protocol"] in names:
            chosen |= run.get("training", {}) | run.get("seen", {})
    drawn = sorted({seed for name in names for seed in seeds[name]})
    options = ["--dataset_name", dataset, "--protocols", *names, "--seeds", *map(str, drawn)]
    options += [f"--{name}={chosen[name]}" for name in MEASUREMENT if name in chosen]
    checkpoints = [checkpoint for checkpoint, of in missing.items() if of]
    options += [f"--{name}={value}" for name, value in choice_of_images(chosen, dataset, checkpoints).items()]
    command = shlex.join(["self-supervised", "evaluate", *checkpoints, *options, *filter(None, [option])])
    places = " (and the --data_path, --splits_path or --video_path_prefix of the other rows, if they were passed)"
    return command + (places if {"test_size", "num_frames"} & set(chosen) else "")


def choice_of_images(seen: dict[str, Any], dataset: str, checkpoints: Iterable[str]) -> dict[str, Any]:
    """Return the settings that choose and read the images of the other rows, if a checkpoint's own are not the same."""
    chosen = {name: seen[name] for name in DATASET_DEFAULTS if name in seen and name not in (*SUBSET, *MEASUREMENT)}
    if "images" in seen:
        chosen["exif_orientation"] = seen.get("exif_orientation", True)
    own = []
    for checkpoint in checkpoints:
        settings = run_folder.settings_of_run(run_or_file(checkpoint)) or config_of(run_of(checkpoint))
        own.append(DATASET_DEFAULTS | EARLIER_DEFAULTS | (settings if settings.get("dataset_name") == dataset else {}))
    return {name: value for name, value in chosen.items() if any(one.get(name) != value for one in own)}


def protocols_of(runs: Iterable[RunRecord]) -> dict[str, None]:
    return dict.fromkeys(run["protocol"] for run in runs)


def notes_on(checkpoints: Sequence[str | Path], tables: list[EvaluationTable]) -> list[str]:
    """Return all notes of the tables; if there are no tables, the command that makes one."""
    if tables:
        return list(dict.fromkeys(note for table in tables for note in table.notes))
    command = shlex.join(["self-supervised", "evaluate", *map(str, checkpoints), "--protocols", "knn", "linear"])
    return [f"Not evaluated yet. For scores under the same protocols: {command}"]
