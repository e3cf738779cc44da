"""results.json and results.md of an evaluation: every run, and the mean and standard deviation over seeds.

Both are written atomically after every run. The key of a run is the hash of everything that it depends on; a run whose
key already exists need not be repeated.
"""

import json
import math
import statistics
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from self_supervised.data.files import OnDisk
from self_supervised.fields import as_path
from self_supervised.folder_lock import locked
from self_supervised.networks.layouts import checkpoint_of
from self_supervised.safe_files import atomic_write, to_json, without_nan
from self_supervised.setting_groups import SET_BY_EVALUATION

RunRecord = dict[str, Any]  # protocol, dataset, encoder, seed, key, scores, seconds; videos, custom data: seen
RUN_KEYS = ("protocol", "encoder", "dataset", "seed", "seen", "training")
WAIT_FOR_RESULTS = 60  # seconds to wait for another process that writes
ENCODERS = {  # name -> title; in the order of the columns of the table
    "random": "random encoder",
    "starting": "starting weights",
    "trained": "trained encoder",
    "lagging": "lagging encoder",
}
DRAWN = "_std"  # suffix of the name of a standard deviation over draws within one run


class Results:
    """Results in one directory, to which multiple processes may write at the same time: before a run is added, the
    file is locked and read again.

    Args:
        fresh: do not read earlier results, which `clear` deletes.
        checkpoint: file that is not read yet; if it is replaced later, `add` refuses the scores of its encoder.
    """

    def __init__(self, folder: Path, fresh: bool = False, checkpoint: str | Path | None = None):
        self.folder = folder
        self.fresh = fresh
        self.path = folder / "results.json"
        stored = {"runs": [], "config": {}} if fresh else read_results(self.path)
        self.runs: list[RunRecord] = stored["runs"]
        self.config: dict[str, Any] = stored["config"]  # data set -> settings of its latest evaluation
        self.own_config: dict[str, Any] = {}  # the part of config that this evaluation wrote
        self.hashes: dict[str, str] = {}  # encoder -> hash of its weights in this evaluation
        self.encoder_settings: dict[str, Any] = {}  # settings of SET_BY_EVALUATION that this one changes
        self.checkpoint_hashes: dict[str, str] = {}  # encoder -> SHA-256 of the checkpoint, if it is in this one
        self.earlier_config = stored["config"]
        self.refuse_others = False  # whether results of another checkpoint are an error
        self.checkpoint = checkpoint
        self.stamp = checkpoint and stamp_of(checkpoint)

    def clear(self) -> None:
        """Delete earlier results."""
        with locked(self.folder, wait=WAIT_FOR_RESULTS):
            for file in (self.path, self.folder / "results.md"):
                file.unlink(missing_ok=True)

    def find(self, key: str) -> RunRecord | None:
        return next((run for run in self.runs if run["key"] == key), None)

    def drop_other_weights(
        self,
        hashes: dict[str, str],
        seen: dict[str, Any],
        checkpoint_hashes: dict[str, str],
        refuse_others: bool = False,
    ) -> None:
        """Drop runs whose encoder has the same name but other weights: the checkpoint was trained further. Hashes may
        depend on SET_BY_EVALUATION; where these differ, the SHA-256 of the checkpoints are compared.

        Raises:
            ValueError: with `refuse_others`, if runs of another checkpoint would be dropped, now or by `add`.
        """
        self.hashes, self.encoder_settings = hashes, encoder_settings_in(seen)
        self.checkpoint_hashes = checkpoint_hashes
        self.refuse_others = refuse_others
        self.runs = self.kept_of(self.runs, self.earlier_config)

    def kept_of(self, runs: list[RunRecord], config: dict[str, Any]) -> list[RunRecord]:
        """Return the stored runs without those of other weights. `config` is stored next to them."""
        kept = list(filter(self.is_kept, runs))
        if not self.refuse_others or len(kept) == len(runs):
            return kept
        own = {as_path(settings["checkpoint"]).absolute().parts for settings in self.own_config.values()}
        names = {settings["checkpoint"] for settings in config.values() if "checkpoint" in settings}
        ends = {name: Path(name).parts[-2:] for name in names}  # it may be relative to another directory
        others = [name for name, end in ends.items() if all(parts[-len(end) :] != end for parts in own)]
        if others:
            replace = "" if self.fresh else ", or pass --fresh (fresh=True) to replace them"  # written since it began
            raise ValueError(
                f"out={self.folder}: has the results of {', '.join(sorted(others))}, which would be deleted. Choose "
                f"another --out{replace}."
            )
        return kept

    def is_kept(self, run: RunRecord) -> bool:
        if encoder_settings_in(run.get("seen", {})) == self.encoder_settings:
            return self.hashes.get(run["encoder"], run["hash"]) == run["hash"]
        file = run.get("file")  # which earlier versions did not store
        return self.checkpoint_hashes.get(run["encoder"], file) == file or file is None

    def begin(self, dataset: str, config: dict[str, Any]) -> None:
        """Set what the latest evaluation on a data set depends on."""
        self.own_config[dataset] = config
        self.config = self.config | self.own_config

    def add(self, *runs: RunRecord) -> None:
        """Write runs to the files. They replace earlier runs with the same RUN_KEYS.

        Raises:
            ValueError: the checkpoint was replaced, so that the runs would be taken for those of its new encoder.
        """
        if self.checkpoint and stamp_of(self.checkpoint) not in (self.stamp, None):
            raise ValueError(
                f"{self.checkpoint} was replaced while it was evaluated. Repeat the command; of a file that a training "
                "replaces, evaluate a copy."
            )
        with locked(self.folder, wait=WAIT_FOR_RESULTS):
            stored = read_results(self.path)
            kept = self.kept_of(stored["runs"], stored["config"])
            self.runs = [old for old in kept if not any(is_same(old, run) for run in runs)] + list(runs)
            self.config = stored["config"] | self.own_config
            self.write()

    def refresh(self) -> None:
        """Write the settings of this evaluation to the files, and drop runs of earlier encoders from them."""
        self.add()

    def shown(self, dataset: str) -> list[RunRecord]:
        """Return the runs with the images and training settings of the data set's latest evaluation: only these can be
        compared."""
        seen = self.config[dataset].get("seen", {})
        training = self.config[dataset].get("training", {})
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
            encoders = "\n".join(f"- {name}: {report}" for name, report in config["encoders"].items())
            used = ", ".join(f"{name} {value}" for name, value in config["versions"].items() if value)
            others = sum(run["dataset"] == dataset for run in self.runs) - len(runs)
            why = "with other clips, images, sizes or cells, or other training settings"
            note = f"Runs {why} are only in results.json: {others}." if others else ""
            clips = clips_note(config.get("seen", {}))
            trained = next((run["training"] for run in runs if run.get("training")), {})
            training = "Protocols that train: " + ", ".join(f"{name}={value}" for name, value in trained.items()) + "."
            about = [encoders, clips, training if trained else ""]
            parts += [f"## {dataset}", *about, results_markdown(runs), note, definitions(runs), used]
        return "\n\n".join(filter(None, parts)) + "\n"


def stamp_of(file: str | Path) -> tuple[int, ...] | None:
    """Return numbers that change if a file is replaced; None if there is no such file."""
    path = as_path(file)
    return OnDisk().signature(str(path)) if path.is_file() else None


def encoder_settings_in(seen: dict[str, Any]) -> dict[str, Any]:
    return {name: seen[name] for name in SET_BY_EVALUATION if name in seen}


def folder_of(checkpoint: str | Path) -> Path:
    """Return the default directory of the results. `checkpoint` is anything that `load_encoder` accepts.

    The directory of a file is named without the file's extension, unless it has the results of another file.
    """
    try:
        path = as_path(checkpoint_of(checkpoint))
        if not path.is_file():
            return Path("runs") / f"{str(checkpoint).replace('/', '_').replace(':', '_')}.evaluation"
    except FileNotFoundError:  # of a run that is not complete yet
        path = as_path(checkpoint) / "pretrained.ckpt"
    folder = path.with_name(f"{path.stem}.evaluation")
    if path.suffix != ".ckpt" and path.with_suffix(".ckpt").is_file():
        return path.with_name(f"{path.name}.evaluation")
    with suppress(ValueError):  # results.json is corrupt
        configs = read_results(folder / "results.json")["config"].values()
        evaluated = {Path(config.get("checkpoint", "")).name for config in configs}
        has_another = any(Path(name).stem == path.stem for name in evaluated)  # else the file was renamed
        if has_another and path.name not in evaluated:
            return path.with_name(f"{path.name}.evaluation")
    return folder


def is_same(old: RunRecord, run: RunRecord) -> bool:
    """Return whether a run replaces an old one. A key that the old run lacks (earlier versions) counts as equal. Runs
    by an earlier definition of the protocol are replaced whatever their seed and encoder."""
    keys = RUN_KEYS if old["definition"] == run["definition"] else set(RUN_KEYS) - {"seed", "encoder"}
    return all(old.get(key, run.get(key)) == run.get(key) for key in keys)


def read_results(path: Path) -> dict[str, Any]:
    """Return runs and config of results.json; both are empty if there is no such file."""
    if not path.is_file():
        return {"runs": [], "config": {}}
    try:
        stored = json.loads(path.read_text())
        for run in stored["runs"]:
            run["scores"] = {name: math.nan if value is None else value for name, value in run["scores"].items()}
        return {"runs": stored["runs"], "config": stored["config"]}
    except ValueError as error:
        raise ValueError(f"{path} is corrupt ({error}). Move it away, or pass --fresh.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} was not written by `self-supervised evaluate` ({error}). Move it away.") from error


# ---- mean and standard deviation over seeds ----


def summary(runs: Iterable[RunRecord]) -> dict[str, Any]:
    """Return data set -> protocol -> encoder -> metric -> mean, number of seeds and, if there is more than one, the
    standard deviation over seeds."""
    scores: dict[tuple, list[float]] = {}
    for run in runs:
        for metric, value in run["scores"].items():
            scores.setdefault((run["dataset"], run["protocol"], run["encoder"], metric), []).append(value)
    summaries: dict[str, Any] = {}
    for (dataset, protocol, encoder, metric), values in scores.items():
        place = summaries.setdefault(dataset, {}).setdefault(protocol, {}).setdefault(encoder, {})
        place[metric] = {"mean": statistics.fmean(values), "seeds": len(values)}
        if len(values) > 1:
            place[metric]["std"] = deviation(values)
    return summaries


def deviation(values: list[float]) -> float:
    """Return the sample standard deviation of at least two values; nan if one of them is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


# ---- results.md ----


def results_markdown(runs: list[RunRecord]) -> str:
    """Return a table with a row per metric and a column per encoder.

    The value after ± is the standard deviation over seeds, or with one seed that over draws.
    """
    encoders = [name for name in ENCODERS if any(run["encoder"] == name for run in runs)]
    rows = []
    for protocol, by_encoder in next(iter(summary(runs).values()), {}).items():
        metrics = dict.fromkeys(metric for scores in by_encoder.values() for metric in scores)
        for metric in (name for name in metrics if not name.endswith(DRAWN)):
            cells = [score_cell(by_encoder.get(name, {}), metric) for name in encoders]
            rows.append([protocol, metric, *cells])
    return markdown_table(["protocol", "metric", *encoders], rows, texts=2)


def markdown_table(header: list[str], rows: list[list[str]], texts: int = 1) -> str:
    """Return a table whose first `texts` columns are text, and all others numbers."""
    lines = ["---" if i < texts else "---:" for i in range(len(header))]
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in [header, lines, *rows])
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)


def score_cell(scores: dict[str, dict], metric: str) -> str:
    if metric not in scores:
        return ""
    over_draws = scores.get(f"{metric}{DRAWN}", {}).get("mean")
    return mean_text(scores[metric]["mean"], scores[metric].get("std", over_draws))


def mean_text(mean: float, std: float | None) -> str:
    if math.isnan(mean):
        return "not finite"
    return rounded(mean) if std is None else f"{rounded(mean)} ± {rounded(std)}"


def rounded(value: float) -> str:
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def clips_note(seen: dict[str, Any]) -> str:
    """Return a sentence on the clips whose embeddings are averaged, or on the size and the pooling if chosen."""
    if "evaluation_clips" not in seen:
        texts = {
            "transform_crop_size": "Images are embedded in the size {0} x {0}.",
            "pooling_size": "Embeddings have {0} x {0} cells of the last map.",
            "image_mean": "Pixels are normalized with the means {0}.",
            "image_std": "Pixels are normalized with the standard deviations {0}.",
        }
        return " ".join(texts[name].format(value) for name, value in encoder_settings_in(seen).items())
    clips = seen["evaluation_clips"]
    crops = seen["evaluation_crops"]
    number = f"{clips} {'clips' if clips > 1 else 'clip'} x {crops} {'crops' if crops > 1 else 'crop'}"
    return f"{number} of each video, each {seen['num_frames']} frames in {seen['clip_duration']:g} seconds."


def definitions(runs: list[RunRecord]) -> str:
    """Return a list of the protocols in the table: definition, seeds, seconds per run, source."""
    lines = []
    for protocol in dict.fromkeys(run["protocol"] for run in runs):
        own = [run for run in runs if run["protocol"] == protocol]
        seeds = sorted({run["seed"] for run in own})
        seconds = statistics.fmean(run["seconds"] for run in own)
        timing = f"seed {', '.join(map(str, seeds))}; {seconds:.1f} s per run"
        lines.append(f"- **{protocol}**: {own[0]['definition']} ({timing}). {own[0]['source']}")
    return "\n".join(lines)
