"""Tables of a report: settings, results, and the commands and versions of runs."""

import math
from collections.abc import Sequence
from typing import Any

import attrs

from model_params import PRESETS, ModelParams
from self_supervised.catalogue import OWN_MODULE
from self_supervised.evaluation.results import ENCODERS
from self_supervised.report import compare, evaluations, figures
from self_supervised.report.compare import Run, score_text
from self_supervised.runs.command_line import field_comments
from self_supervised.runs.effective import effective_settings
from self_supervised.runs.run_options import RunOptions
from self_supervised.runs.values import text
from self_supervised.setting_groups import EARLIER_DEFAULTS
from self_supervised.training import run_folder
from self_supervised.training.milestones import lowest_is_best

SINGLE = {"best": "best epoch", "last": "last step"}  # first word of a result's name -> what was scored
START = ENCODERS["random"]  # with which `evaluate` compares
MARKED = ("trained encoder", "lagging encoder", "best epoch")
FITTED = ("train_class_acc", "train_class_acc_trainset")  # accuracies on the images to which a probe was fitted


# ---- facts ----


def facts_of_run(run: Run, name: str) -> dict[str, Any]:
    """Return what identifies a run and what is needed to repeat it."""
    commands = run.folder / "command.txt"
    arch = run.settings.get("encoder_arch")
    last = next(reversed(run_folder.starts_of(run.folder)), {})
    versions = {label.removesuffix(" version"): v for label, v in run.circumstances.items() if is_version(label)}
    facts = {label: v for label, v in run.circumstances.items() if v and not is_version(label)} | {"versions": versions}
    if labels := run_folder.results_of(run.folder).get("labels"):
        facts = {"labels": labels} | facts
    if plan := last.get("plan"):
        facts = {"plan": plan} | facts
    return {
        "name": name,
        "preset": run.settings.get("preset", ""),
        "method": f"{'a custom encoder' if arch == OWN_MODULE else arch} on {run.settings.get('dataset_name')}",
        "state": state(run),
        "began": last.get("time", ""),
        "commands": run_folder.text_of_file(commands).splitlines() if commands.is_file() else [],
        "facts": {label: value_text(value) for label, value in facts.items()},
    }


def is_version(label: str) -> bool:
    return label.endswith(" version")


def value_text(value: Any) -> str:
    """Return a value as text: {"cores": 2} -> "cores 2"."""
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else text(value)


def state(run: Run) -> str:
    trained = run.results.get("epochs")
    planned = run.settings.get("max_epochs", 0)
    if trained is not None and trained >= planned:
        return "finished"
    if trained is not None:
        return f"stopped{' by max_time' if run.settings.get('max_time') else ''} in epoch {trained} of {planned}"
    first = run_folder.first_epoch(run.folder)
    _, epochs = figures.read_metrics(run_folder.file_of(run.folder, figures.PRETRAINING)).get("epoch", ([], [first]))
    return f"not finished: in epoch {max(1, epochs[-1] + 1 - first):.0f} of {planned}"


def verdicts(runs: Sequence[Run], names: Sequence[str]) -> list[str]:
    """Return the verdict of each run that has one, with the name of the run if there are several."""
    texts = [run_folder.results_of(run.folder).get("verdict") for run in runs]
    return [text if len(runs) == 1 else f"{name}: {text}" for text, name in zip(texts, names, strict=True) if text]


# ---- settings ----


def default_settings(preset: str | None) -> dict[str, Any]:
    """Return the default settings of a run of this preset."""
    params = PRESETS[preset]() if preset in PRESETS else ModelParams()  # else: a preset of another version
    return attrs.asdict(RunOptions()) | attrs.asdict(params)


def setting_rows(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings in which a run differs from its preset, or runs differ from each other."""
    plain = [default_settings(run.settings.get("preset")) for run in runs]
    differing = {row.name for row in compare.differing("setting", [[run.settings] for run in runs])}
    comments = field_comments(RunOptions) | field_comments(ModelParams)
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        cells = [option_cell(run.settings, standard, name) for run, standard in zip(runs, plain, strict=True)]
        if name in differing or any(one["changed"] for one in cells):
            presets = [run.settings.get("preset", "") for run in runs]
            standard = {of: text(values[name]) for of, values in zip(presets, plain, strict=True) if name in values}
            comment = comments.get(name, ("", ""))[1]
            rows.append({"name": name, "comment": comment, "preset": preset_heading(standard), "values": cells})
    return {"rows": rows, "differ": bool(differing)}


def preset_heading(values: dict[str, str]) -> str:
    """Return the values of presets as text: {"simclr": "0", "byol": "2"} -> "simclr 0, byol 2"; just the value if all
    are equal."""
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{preset} {value}".strip() for preset, value in values.items())


def option_cell(values: dict[str, Any], standard: dict[str, Any], name: str) -> dict[str, Any]:
    if name not in values:  # a run of another version
        return {"text": "", "changed": False}
    changed = name in standard and text(values[name]) != text(standard[name])
    return {"text": text(values[name]), "changed": changed}


def effective_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each effective setting: those in config.yaml, else, of an earlier version, those that follow
    from the settings."""
    settings = [run_folder.effective_of(run.folder) or effective_of_settings(run.settings) for run in runs]
    names = dict.fromkeys(name for one in settings for name in one)
    return [{"name": name, "values": [text(one.get(name, "")) for one in settings]} for name in names]


def effective_of_settings(settings: dict[str, Any]) -> dict[str, str]:
    """Return the effective settings of a run; {} if these are not settings of this version."""
    known = {attribute.name for attribute in attrs.fields(ModelParams)}
    try:
        return effective_settings(ModelParams(**EARLIER_DEFAULTS | {k: v for k, v in settings.items() if k in known}))
    except (ValueError, TypeError):
        return {}


# ---- results ----


def result_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each result, grouped by what was scored: "trained encoder", "best epoch", ... Accuracies on what
    the probe was fitted to are the last."""
    rows = evaluation_rows(runs)
    for name in dict.fromkeys(name for run in runs for name in run.results):
        scored, _, metric = name.rpartition(": ")
        if not scored:
            word, _, metric = name.partition(" ")
            scored, metric = (SINGLE[word], metric) if word in SINGLE else ("the whole run", name)
        values = [score_text([run.results[name]]) if name in run.results else "" for run in runs]
        about = {"of": scored, "name": metric, "start": scored in {run.start for run in runs}}
        rows.append({**about, "values": values, "marks": marks(runs, name, scored, metric)})
    order = list(dict.fromkeys(row["of"] for row in rows))
    return sorted(rows, key=lambda row: (row["name"] in FITTED, row["of"] == "the whole run", order.index(row["of"])))


def marks(runs: Sequence[Run], name: str, scored: str, metric: str) -> list[str]:
    """Return "better" or "worse" for each run whose result differs from the start's on the same images, else ""."""
    signs = []
    for run in runs:
        now, before = run.results.get(name, math.nan), run.results.get(f"{run.start}: {metric}", math.nan)
        compared = scored in MARKED and ("acc" in metric or "loss" in metric) and metric not in FITTED
        change = (now - before) * (-1 if lowest_is_best(metric) else 1) if compared else 0
        signs.append(mark(change))
    return signs


def mark(change: float) -> str:
    return "better" if change > 0 else "worse" if change < 0 else ""


def evaluation_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row for each value that `self-supervised evaluate` stored: baselines, then the trained encoders."""
    texts: dict[tuple[str, str], dict[int, str]] = {}  # what was scored, metric -> index of the run -> value
    signs: dict[tuple[str, str], list[str]] = {}  # the same -> mark of each run
    for i, run in enumerate(runs):
        for table in evaluations.evaluation_tables(evaluations.evaluated_rows([run.folder])):
            titles = [ENCODERS["trained"], *(row.label for row in table.rows[1:])]
            before = table.cells[titles.index(START)] if START in titles else [None] * len(table.columns)
            for title, cells in reversed(list(zip(titles, table.cells, strict=True))):
                for metric, cell, start in zip(table.header[1:], cells, before, strict=True):
                    place = (title, f"{metric} on {table.dataset}")
                    texts.setdefault(place, {})[i] = cell.text if cell else ""
                    if cell and start and title in MARKED and "acc" in metric:
                        signs.setdefault(place, [""] * len(runs))[i] = mark(cell.mean - start.mean)
    every = range(len(runs))
    return [
        {"of": title, "name": name, "start": title == START, "values": [values.get(i, "") for i in every]}
        | {"marks": signs.get((title, name), [""] * len(runs))}
        for (title, name), values in texts.items()
    ]


def notes_on_results(runs: Sequence[Run]) -> str:
    folders = [run.folder for run in runs]
    tables = evaluations.evaluation_tables(evaluations.evaluated_rows(folders))
    return " ".join(
        filter(None, [*compare.missing_scores(runs), compare.caution(runs), *evaluations.notes_on(folders, tables)])
    )
