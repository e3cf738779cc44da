"""Dry run: two optimizer steps and one validation batch, and tables of parts, parameter groups and plan."""

import resource
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import attrs
import pytorch_lightning as pl
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised.data import data_sets
from self_supervised.networks import modules
from self_supervised.runs.effective import effective_settings
from self_supervised.runs.run_options import RunOptions
from self_supervised.runs.trainers import trainer_of_dry_run
from self_supervised.training.monitor import TrainingMonitor

STEPS = 2
HIDDEN = ("params", "param_names", "name", "lr")  # keys of groups; the table has an example and the initial_lr instead
PART_NAMES = {  # attribute -> name in the table
    "model": "encoder",
    "projection_model": "projector",
    "prediction_model": "predictor",
    "lagging_model": "lagging encoder",
    "lagging_projection_model": "lagging projector",
    "lagging_prototypes": "lagging prototypes",
    "online_classifier": "online classifier",
}


class Stop(pl.Callback):
    """Callback that ends the training after two optimizer steps. It times the second, without start-up costs."""

    def __init__(self) -> None:
        self.times: dict[int, float] = {}  # optimizer step -> time of its end

    def on_train_start(self, *_: Any) -> None:
        self.times[0] = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        self.times.setdefault(trainer.global_step, time.monotonic())
        trainer.should_stop = trainer.global_step >= STEPS

    @property
    def seconds_per_step(self) -> float:
        *_, before, last = self.times.values()
        return last - before


def run_two_steps(params: ModelParams, options: RunOptions) -> SelfSupervisedMethod:
    """Run two optimizer steps and one validation batch, print the tables, and return the model. No files are written,
    except for a data set that is downloaded."""
    stop = Stop()
    model, trainer = two_steps(params, options, stop)
    if trainer.is_global_zero:
        console = Console(highlight=False, markup=False)
        console.print(parts_table(model))
        console.print(groups_table(model, trainer))
        console.print(effective_table(model))
        console.print(plan_table(model, trainer, stop.seconds_per_step))
    return model


def two_steps(params: ModelParams, options: RunOptions, stop: Stop) -> tuple[SelfSupervisedMethod, pl.Trainer]:
    model = SelfSupervisedMethod(attrs.evolve(params, evaluate_every_n_epochs=1, pack_images=False))
    model.is_recorded = False  # after two steps
    watch = TrainingMonitor()
    watch.collapse_was_named = True  # two steps are too few to detect a collapse
    trainer = trainer_of_dry_run(model, options, [stop, watch])
    trainer.fit(model)
    return model, trainer


def empty_table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in ("parameters", "tensors") else "left", overflow="fold")
    return made


def parts_table(model: SelfSupervisedMethod) -> Table:
    """Return the table of encoder, heads, lagging models and queue: output shape, parameters, whether it is trained."""
    p = model.params
    made = empty_table("Parts", "part", "is", "output", "parameters", "trained")
    outputs = output_shapes(model)
    for name, part in model.named_children():
        if not modules.n_parameters(part) and name != "queue":
            continue
        kind = p.encoder_arch if name in ("model", "lagging_model") else widths(part)
        says = "yes" if modules.requires_gradient(part) else "no" if name == "queue" else "lags"
        shape = f"[{p.K}, {p.dim}]" if name == "queue" else outputs[name]
        made.add_row(PART_NAMES.get(name, name), kind, shape, f"{modules.n_parameters(part):,}", says)
    return made


def parts_text(model: nn.Module) -> str:
    """Return the number of parameters of each part in one line."""
    counts = []
    for name, part in model.named_children():
        if count := modules.n_parameters(part):
            frozen = "" if modules.requires_gradient(part) else " (not trained)"
            counts.append(f"{PART_NAMES.get(name, name)} {count:,}{frozen}")
    return f"Parameters: {', '.join(counts)}"


def widths(part: nn.Module) -> str:
    """Return the widths of the linear layers of a head as text: 512 -> 2048 -> 128."""
    linear = [layer for layer in part.modules() if isinstance(layer, nn.Linear)]
    sizes = [layer.in_features for layer in linear[:1]] + [layer.out_features for layer in linear]
    return " -> ".join(map(str, sizes)) or type(part).__name__


@torch.no_grad()
def output_shapes(model: SelfSupervisedMethod) -> dict[str, str]:
    p = model.params
    shapes = {}
    x = torch.zeros(2, *p.input_shape, device=model.device)
    with modules.in_eval_mode(model):
        for start, names in (
            (x, ("model", "projection_model", "prediction_model", "prototypes")),
            (x, ("lagging_model", "lagging_projection_model", "lagging_prototypes")),
            (x, ("model", "online_classifier")),
        ):
            for name in names:
                if (part := getattr(model, name)) is not None:
                    start = part(start)
                    shapes[name] = f"[N, {', '.join(map(str, start.shape[1:]))}]"
    return shapes


def groups_table(model: SelfSupervisedMethod, trainer: pl.Trainer) -> Table:
    """Return the table of the optimizer's parameter groups, with an example of each and the settings in which they
    differ."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    optimizer = trainer.optimizers[0]
    shown = [{key: value for key, value in group.items() if key not in HIDDEN} for group in optimizer.param_groups]
    for settings, (first, last) in zip(shown, trainer.lr_scheduler_configs[0].scheduler.decays, strict=True):
        settings["weight_decay"] = f"{first:.4g} to {last:.4g}" if first != last else first
    differing = [key for key in shown[0] if len({str(group.get(key)) for group in shown}) > 1]
    made = empty_table(f"Groups of {type(optimizer).__name__}", "tensors", "parameters", "for example", *differing)
    for group, settings in zip(optimizer.param_groups, shown, strict=True):
        members = group["params"]
        example = names[id(members[0])] if members else "none"
        count = sum(weight.numel() for weight in members)
        values = [settings.get(key) for key in differing]
        words = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        made.add_row(f"{len(members)}", f"{count:,}", example, *words)
    return made


def effective_table(model: SelfSupervisedMethod) -> Table:
    """Return the table of what the settings mean."""
    made = empty_table("Effective settings", "part", "is")
    for name, words in effective_settings(model.params, model.plan).items():
        made.add_row(name, words)
    return made


def plan_table(model: SelfSupervisedMethod, trainer: pl.Trainer, seconds_per_step: float) -> Table:
    """Return the table of data, memory and time."""
    p = model.params
    made = empty_table("Plan", "what", "value")
    epoch, whole = (
        timedelta(seconds=round(seconds_per_step * n)) for n in (model.plan.steps_per_epoch, model.plan.steps)
    )
    device = trainer.strategy.root_device
    where = "on the device" if device.type == "cuda" else "in the process"
    splits = {"training": p.dataset.pretraining_splits}
    splits |= {"evaluation": p.dataset.scored_splits} if p.is_evaluated else {}  # which may be missing otherwise
    sizes = [f"{len(data_sets.get_dataset(p, split)):,} for {name}" for name, split in splits.items()]
    scores = {name: float(value) for name, value in trainer.callback_metrics.items()}
    rows = {
        "images": f"{p.dataset_name}: {', '.join(sizes)}; {' x '.join(map(str, p.input_shape))}",
        **model.labels_result(),
        "precision": f"{trainer.precision} on {device}",
        "memory": f"{peak_memory(device) / 2**30:.2f} GiB {where} at most",
        "time": f"{seconds_per_step:.3g} s per step, {epoch} per epoch, {whole} in all, without evaluation (from the "
        "last step only)",
        "loss": f"{scores['step_train_loss']:.4g} at step {trainer.global_step}",
    }
    for name, value in rows.items():
        made.add_row(name, value)
    return made


def peak_memory(device: torch.device) -> int:
    """Return the largest memory in bytes that this process has used so far: of a GPU, or else of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if (status := Path("/proc/self/status")).exists():  # Linux, where ru_maxrss counts what the parent had
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
