"""results.json and results.md of an evaluation: every run as it came, and the mean and deviation over seeds.

Both are written whole or not at all after every run. A run is known by a key, the hash of all that it depends on: one
that is there with the same key need not be repeated.
"""

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from self_supervised.folder_lock import locked
from self_supervised.safe_files import atomic_write, to_json, without_nan

RunRecord = dict[str, Any]  # protocol, dataset, encoder, seed, key, scores, seconds; seen, of videos and own data
RUN_KEYS = ("protocol", "encoder", "dataset", "seed", "seen", "training")
WAIT_FOR_RESULTS = 60  # to wait for another process that writes
ENCODERS = ("random", "starting", "trained")  # columns of the table
DRAWN = "_std"  # ends the name of a deviation over draws within one run


class Results:
    """The files of one folder, into which several processes may evaluate at the same time: what others have written
    meanwhile is read again, under a lock, before ours is added."""

    def __init__(self, folder: Path, fresh: bool = False):
        self.folder = folder
        self.path = folder / "results.json"
        if fresh:
            self.path.unlink(missing_ok=True)
        found = read_results(self.path)
        self.runs: list[RunRecord] = found["runs"]
        self.config: dict[str, Any] = found["config"]  # of the newest evaluation on each data set
        self.own: dict[str, Any] = {}  # of it, this evaluation's
        self.hashes: dict[str, str] = {}  # encoder -> hash of its weights, of this evaluation

    def find(self, key: str) -> RunRecord | None:
        return next((run for run in self.runs if run["key"] == key), None)

    def keep_encoders(self, hashes: dict[str, str]) -> None:
        """Forget runs of other encoders under the same name: the checkpoint was trained further."""
        self.hashes = hashes
        self.runs = list(filter(self.is_kept, self.runs))

    def is_kept(self, run: RunRecord) -> bool:
        return self.hashes.get(run["encoder"], run["hash"]) == run["hash"]

    def begin(self, dataset: str, config: dict[str, Any]) -> None:
        """What the newest evaluation on a data set depends on."""
        self.own[dataset] = config
        self.config = self.config | self.own

    def add(self, *runs: RunRecord) -> None:
        """In place of earlier runs of the same protocol, encoder, data set, seed, what is seen and training."""
        with locked(self.folder, wait=WAIT_FOR_RESULTS):
            there = read_results(self.path)
            kept = filter(self.is_kept, there["runs"])
            self.runs = [old for old in kept if not any(is_same(old, run) for run in runs)] + list(runs)
            self.config = there["config"] | self.own
            self.write()

    def shown(self, dataset: str) -> list[RunRecord]:
        """Runs that see and train what the newest evaluation of the data set does: others cannot be compared."""
        seen, training = (self.config[dataset].get(name, {}) for name in ("seen", "training"))
        alike = [run for run in self.runs if run.get("seen", {}) == seen and run.get("training", training) == training]
        return [run for run in alike if run["dataset"] == dataset]

    def content(self) -> dict[str, Any]:
        shown = [run for dataset in self.config for run in self.shown(dataset)]
        return without_nan({"config": self.config, "summary": summary(shown), "runs": self.runs})

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.path, to_json(self.content(), indent=2) + "\n")
        atomic_write(self.folder / "results.md", self.markdown())

    def markdown(self) -> str:
        parts = [f"# Evaluation: {self.folder.stem}"]
        for dataset, config in self.config.items():
            runs = self.shown(dataset)
            encoders = "\n".join(f"- {name}: {told}" for name, told in config["encoders"].items())
            used = ", ".join(f"{name} {value}" for name, value in config["versions"].items() if value)
            others = sum(run["dataset"] == dataset for run in self.runs) - len(runs)
            why = "with other clips, of other images, or trained with other settings"
            told = f"Runs {why}, are in results.json alone: {others}." if others else ""
            clips = of_each_video(config.get("seen", {}))
            parts += [f"## {dataset}", encoders, clips, results_markdown(runs), told, definitions(runs), used]
        return "\n\n".join(filter(None, parts)) + "\n"


def is_same(old: RunRecord, run: RunRecord) -> bool:
    """Whether a run takes the place of an old one, which an earlier version may have written without all parts."""
    return all(old.get(part, run.get(part)) == run.get(part) for part in RUN_KEYS)


def read_results(path: Path) -> dict[str, Any]:
    """runs and config of results.json; none if there is no such file."""
    if not path.is_file():
        return {"runs": [], "config": {}}
    try:
        found = json.loads(path.read_text())
        for run in found["runs"]:
            run["scores"] = {name: math.nan if value is None else value for name, value in run["scores"].items()}
        return {"runs": found["runs"], "config": found["config"]}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not what evaluate.py writes ({error}): move it away, or use --fresh") from error


# ---- over seeds ----


def summary(runs: Iterable[RunRecord]) -> dict[str, Any]:
    """data set -> protocol -> encoder -> metric -> mean, and deviation over seeds where there are several."""
    scores: dict[tuple, list[float]] = {}
    for run in runs:
        for metric, value in run["scores"].items():
            scores.setdefault((run["dataset"], run["protocol"], run["encoder"], metric), []).append(value)
    found: dict[str, Any] = {}
    for (dataset, protocol, encoder, metric), values in scores.items():
        place = found.setdefault(dataset, {}).setdefault(protocol, {}).setdefault(encoder, {})
        place[metric] = {"mean": statistics.fmean(values), "seeds": len(values)}
        if len(values) > 1:
            place[metric]["std"] = deviation(values)
    return found


def deviation(values: list[float]) -> float:
    """Sample standard deviation of at least two values; nan where one of them is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def results_markdown(runs: list[RunRecord]) -> str:
    """Rows: metrics. Columns: encoders. After +-: the deviation over seeds; with one seed, that over draws."""
    encoders = [name for name in ENCODERS if any(run["encoder"] == name for run in runs)]
    rows = [["protocol", "metric", *encoders], ["---", "---", *("---:" for _ in encoders)]]
    for protocol, of_encoders in next(iter(summary(runs).values()), {}).items():
        metrics = dict.fromkeys(metric for found in of_encoders.values() for metric in found)
        for metric in (name for name in metrics if not name.endswith(DRAWN)):
            cells = [score_cell(of_encoders.get(name, {}), metric) for name in encoders]
            rows.append([protocol, metric, *cells])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def score_cell(found: dict[str, dict], metric: str) -> str:
    if metric not in found:
        return ""
    mean = found[metric]["mean"]
    drawn = found.get(f"{metric}{DRAWN}", {}).get("mean")
    deviation = found[metric].get("std", drawn)
    if math.isnan(mean):
        return "not finite"
    return rounded(mean) + (f" ± {rounded(deviation)}" if deviation is not None else "")


def rounded(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def of_each_video(seen: dict[str, Any]) -> str:
    """Which clips are averaged; "" of images."""
    if "evaluation_clips" not in seen:
        return ""
    clips, crops, frames = (seen[name] for name in ("evaluation_clips", "evaluation_crops", "num_frames"))
    many = f"{clips} {'clips' if clips > 1 else 'clip'} x {crops} {'crops' if crops > 1 else 'crop'}"
    return f"{many} of each video, each {frames} frames in {seen['clip_duration']:g} seconds."


def definitions(runs: list[RunRecord]) -> str:
    """What the protocols of the table are, and how long they took."""
    lines = []
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        own = [run for run in runs if run["protocol"] == protocol]
        seeds = sorted({run["seed"] for run in own})
        seconds = statistics.fmean(run["seconds"] for run in own)
        told = f"seed {', '.join(map(str, seeds))}; {seconds:.1f} s a run"
        lines.append(f"- **{protocol}**: {own[0]['definition']} ({told}). {own[0]['source']}")
    return "\n".join(lines)
