"""Effective settings: a run in words and numbers, with all that its settings leave to the data set or to a rule.

They are the comment at the end of config.yaml and of --print_config, and a table of --dry_run and of the report: enough
for the implementation details of a paper.
"""

import inspect

import attrs
import torch
import yaml

from model_params import ALL_VIEW_LOSSES, COMPARE_NEGATIVES, LOSSES, ModelParams
from self_supervised.catalogue import BLUR_RADIUS, ViewSettings
from self_supervised.data.image_files import part_kept
from self_supervised.runs import command_line
from self_supervised.runs.run_options import RunOptions
from self_supervised.training.plan import Plan, epochs_text, lr_factor, resolved_warmup_epochs
from self_supervised.training.run_folder import EFFECTIVE

RESIZED = "pixels (bilinear, antialiased)"
NEGATIVES = {  # setting -> negatives of a loss of COMPARE_NEGATIVES
    "use_negative_examples_from_queue": "a queue of {K} keys",
    "use_negative_examples_from_batch": "keys of other images in the batch",
    "use_negative_examples_from_same_view": "queries of other images in the batch",
}
ADAMS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def config_text(preset: str, options: RunOptions, params: ModelParams, plan: Plan | None = None) -> str:
    """Return the settings as YAML that --config reads, with the effective settings as a comment at the end."""
    comment = yaml.safe_dump(effective_settings(params, plan), sort_keys=False, width=110, allow_unicode=True)
    lines = "".join(f"# {line}\n" for line in comment.splitlines())
    return f"{command_line.to_yaml(preset, options, params)}{EFFECTIVE}{lines}"


def effective_settings(params: ModelParams, plan: Plan | None = None) -> dict[str, str]:
    """Return the description of each part of a run.

    Args:
        plan: batch size, length and learning rate, as soon as a Trainer has determined them.
    """
    p = params
    size, kind = p.global_batch_size or p.batch_size, p.dataset.kind
    of = "of all processes in an optimizer step" if p.global_batch_size else "per process"
    batch, *length = str(plan).split("; ")[:2] if plan else [f"{size} {kind}s {of}"]
    return {
        "encoder": encoder_text(p),
        "projection head": head_text(p, "projection"),
        "prediction head": head_text(p, "prediction"),
        "lagging model": lagging_text(p),
        "loss": loss_text(p),
        **views_texts(p),
        "evaluation view": evaluation_text(p),
        "normalization": normalization_text(p),
        "batch": batch,
        "length": ", ".join([epochs_text(p.max_epochs), *length]),
        "optimizer": optimizer_text(p),
        "learning rate": rate_text(p, plan),
    }


# ---- Model and loss ----


def encoder_text(params: ModelParams) -> str:
    p = params
    stem = f", 3 x 3 stem ({p.stem_variant})" if p.low_resolution else ""
    if p.pooling_size > 1:
        stem += f", {p.pooling_size} x {p.pooling_size} cells of the last map"
    if p.drop_path_rate is not None:
        stem += f", stochastic depth up to {p.drop_path_rate:g}"
    start = f"starting from {p.encoder_weights}" if p.encoder_weights else "starting from random weights"
    return f"{p.encoder_arch}{stem}, {start}, input {' x '.join(map(str, p.input_shape))}"


def head_text(params: ModelParams, name: str) -> str:
    head = params.head(name)
    if not head["n_layers"]:
        return f"{head['last_normalization']} alone" if head["last_normalization"] else "none"
    start = "embedding" if name == "projection" else str(params.dim)
    activation = {"relu": "ReLU", "gelu": "GELU"}[head["activation"]]
    norm = f"{head['normalization']} and {activation}" if head["normalization"] else activation
    hidden = [f"{norm} after hidden layers"] if head["hidden_dim"] else []
    last = [f"{head['last_normalization']} at the end"] if head["last_normalization"] else []
    return ", ".join([" -> ".join(map(str, [start, *head["hidden_dim"], params.dim])), *hidden, *last])


def lagging_text(params: ModelParams) -> str:
    if not params.use_lagging_model:
        return "none"
    return f"momentum {params.m:g}" + (", raised to 1 along half a cosine" if params.use_momentum_schedule else "")


def loss_text(params: ModelParams) -> str:
    p = params
    values = attrs.asdict(p)
    parts = [LOSSES[p.loss_type].text.format_map(values)]
    if p.loss_type in COMPARE_NEGATIVES:
        negatives = [words.format_map(values) for name, words in NEGATIVES.items() if values[name]]
        parts += [f"against {' and '.join(negatives)}"] if negatives else []
    parts += [f"keys of the teacher {p.teacher}"] if p.teacher else []
    parts += [f"keys replaced by their nearest neighbors in a queue of {p.K} keys"] if p.use_nearest_keys else []
    if p.assigns_over_queue:
        parts.append(f"assignments together with a queue of {p.K} keys from epoch {p.queue_from_epoch:g}")
    parts += ["no gradient through the keys"] if p.stop_gradient_of_keys and not p.use_lagging_model else []
    if p.use_eqco_margin:
        parts.append(f"EqCo with alpha {p.eqco_alpha:g}")
    if p.use_unit_sphere_projection:
        parts.append("projections scaled to length 1")
    of_pairs = f"the mean over {len(p.pairs)} (query view, key view) {p.pairs}"
    views = f"the loss of all {p.n_views} views" if p.loss_type in ALL_VIEW_LOSSES else of_pairs
    return f"{', '.join(parts)}; {p.loss_factor:g} x {views}"


# ---- Views ----


def views_texts(params: ModelParams) -> dict[str, str]:
    """Return descriptions of the views, those with the same settings together: {"views 0, 1": ...}."""
    same: dict[str, list[str]] = {}
    for i, view in enumerate(params.views):
        same.setdefault(view_text(view, params), []).append(str(i))
    return {f"view{'s' if len(of) > 1 else ''} {', '.join(of)}": text for text, of in same.items()}


def view_text(view: ViewSettings, params: ModelParams) -> str:
    """Return the operations of a view in their order, with their probabilities. Those that never happen are named at
    the end."""
    colors = ("brightness", "contrast", "saturation", "hue")[: 4 if params.channels == 3 else 2]
    gray = view.grayscale_probability if params.channels == 3 else 0.0
    of_videos = params.dataset.of_videos
    operations = [
        ("difference of frames", view.time_difference_probability if of_videos else 0.0, ""),
        ("horizontal flip", view.flip_probability, ""),
        ("vertical flip", view.vertical_flip_probability, ""),
        ("rotation by 90 degrees", view.rotation_probability, ""),
        ("color jitter", view.jitter_probability, ", ".join(f"{name} {getattr(view, name):g}" for name in colors)),
        ("grayscale", gray, ""),
        ("blur", view.blur_probability, f"sigma {interval(view.blur_sigma)} pixels, kernel {2 * BLUR_RADIUS + 1}"),
        ("solarization", view.solarize_probability, f"from {view.solarize_threshold:g}"),
    ]
    crop = f"crop of {interval(view.crop_scale)} of the area, width / height {interval(view.crop_ratio)}"
    parts = [f"{crop}, resized to {view.crop_size} x {view.crop_size} {RESIZED}"]
    parts += [f"{name} {p:g}" + (f" ({how})" if how else "") for name, p, how in operations if p]
    rare = {"vertical flip", "rotation by 90 degrees"} | (set() if of_videos else {"difference of frames"})
    never = [name for name, p, _ in operations if not p and name not in rare]
    if of_videos:
        parts.insert(0, f"{params.num_frames} frames in {params.clip_duration:g} s, speeds {params.clip_speeds}")
    return "; ".join(parts) + (f"; no {', '.join(never)}" if never else "")


def interval(limits: tuple[float, float]) -> str:
    return f"{limits[0]:g} to {limits[1]:g}"


def evaluation_text(params: ModelParams) -> str:
    p = params
    part = part_kept(p)
    square = "full image" if part == 1 else f"central square of {part:g} of the shorter side"
    clips = f", {p.evaluation_clips} clips x {p.evaluation_crops} crops per video" if p.dataset.of_videos else ""
    return f"{square}, resized to {p.crop_size} x {p.crop_size} {RESIZED}{clips}"


def normalization_text(params: ModelParams) -> str:
    p = params
    if p.compute_statistics and None in (p.image_mean, p.image_std):
        return "mean and standard deviation of the training images, computed at the start"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (p.mean, p.std))
    return f"mean {mean}, standard deviation {std} of pixel values from 0 to 1"


# ---- Optimization ----


def optimizer_text(params: ModelParams) -> str:
    p = params
    parts = [p.optimizer_name]
    if p.optimizer_name in ADAMS:
        eps = inspect.signature(ADAMS[p.optimizer_name]).parameters["eps"].default
        parts += [f"betas {p.adam_betas}, eps {eps:g}"]
    else:
        parts += [f"momentum {p.momentum:g}"]
    if p.optimizer_name == "lars":
        clipped = ", clipped to the learning rate" if p.grad_clip_lars else ""
        parts += [f"trust coefficient {p.lars_eta:g}{clipped}"]
    end = f" to {p.final_weight_decay:g} along half a cosine" if p.final_weight_decay is not None else ""
    parts += [f"weight decay {p.weight_decay:g}{end}"]
    if excluded := p.exclude_matching_parameters_from_lars:
        adapted = " or adaptation" if p.optimizer_name == "lars" else ""
        parts += [f"no weight decay{adapted} of {', '.join(excluded)}"]
    return ", ".join(parts)


def rate_text(params: ModelParams, plan: Plan | None) -> str:
    """Return the learning rate after `lr_scaling`: its peak, its warm-up and its schedule."""
    p = params
    images = plan.global_batch_size if plan else p.global_batch_size
    ratio = f"{images or 'images per optimizer step'} / {p.lr_batch_size}"
    rule = {None: "", "linear": f"{p.lr:g} x {ratio}", "sqrt": f"{p.lr:g} x sqrt({ratio})"}[p.lr_scaling]
    factor = lr_factor(p, images) if images else 1.0
    if images:
        rule = f"{p.lr * factor:g}" + (f" = {rule}" if rule else "")
    warmup_epochs = resolved_warmup_epochs(p)
    length = epochs_text(warmup_epochs) + (f" ({plan.warmup_steps:g} steps)" if plan else "")
    warmup = f"linear warm-up from {p.warmup_start_lr * factor:g} in {length}, " if warmup_epochs else ""
    end = "" if p.lr_schedule == "constant" else f" to {p.final_lr_schedule_value * factor:g}"
    if p.lr_schedule == "steps":
        end = (
            f" (x {p.lr_decay_factor:g} at epochs {p.lr_decay_steps}, at least {p.final_lr_schedule_value * factor:g})"
        )
    return f"peak {rule or f'{p.lr:g}'}; {warmup}{p.lr_schedule}{end}"
