"""docs/coming_from.md: its programs run, what it names exists, and nothing that the other systems show is left out."""

import ast
import importlib
import inspect
import itertools
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import videos
from PIL import Image

import command_line
import data
import evaluate
import model_params
import packed_sources
import run_options
from checkpoints import Checkpoints
from linear_classifier import LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import ModelParams, SCEVideoParams
from protocols import PROTOCOLS
from run_options import RunOptions

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "coming_from.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
FIELDS = {
    attribute.name: attribute
    for kind in (LinearClassifierMethodParams, RunOptions, ModelParams)
    for attribute in attrs.fields(kind)
}
SOURCES = {path: path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")]}
LOGGED = (ROOT / "README.md").read_text().partition("## What is logged")[2]

# What each system's own introduction shows, by words that must stand in the first column of one row each.
CHECKLISTS = {
    "solo-learn": """
        solo/methods; solo/losses; solo/args; add_model_specific_args; solo/utils; main_pretrain.py;
        main_linear.py; BarlowTwins(**kwargs); Trainer; "backbone"; num_classes; "cifar"; zero_init_residual;
        backbone_args; max_epochs; "optimizer"; extra_optimizer_args; "lars"; eta_lars; grad_clip_lars;
        exclude_bias_n_norm_lars; "lr"; weight_decay; classifier_lr; accumulate_grad_batches; warmup_cosine;
        min_lr; warmup_start_lr; "warmup_epochs"; lr_decay_steps; num_crops_per_aug; num_large_crops;
        num_small_crops; dali_device; batch_size; num_workers; data_dir; train_dir; val_dir; "dataset"; "name";
        gpus; proj_hidden_dim; proj_output_dim; lamb; scale_loss; prepare_transform; brightness; contrast;
        saturation; "hue"; gaussian_prob; solarization_prob; prepare_n_crop_transform; list of pipelines;
        no_labels; prepare_dataloader; prepare_data_classification; prepare_datasets; online linear classifier;
        validation; WandbLogger; project; entity; offline; watch; LearningRateMonitor; Checkpointer; arguments
        beside; find_unused_parameters; terminate_on_nan; precision; --wandb; --save_checkpoint; asymmetric""",
    "quadra": """
        SSLDataModule; class folders; train.txt; val_size; test_size; split_validation; exclude_filter;
        include_filter; seed; class_to_idx; train_transform; val_transform; test_transform;
        augmentation_dataset; validation optional; test set; data_path; num_workers; batch_size;
        train_split_file; val_split_file; test_split_file; /datamodule; /backbone; /model; /optimizer;
        /scheduler; /transforms; /loss; /task; /trainer; resnet18; lars; warmup; init_lr; max_epochs;
        check_val_every_n_epoch; num_sanity_val_steps; KNeighborsClassifier; any other scikit-learn;
        ModelCheckpoint; end of training; lightning_gpu_fp16; lightning_gpu_bf16; devices; vit16_tiny; inherits;
        quadra experiment=; checkpoints; config_resolved.yaml; config_tree.txt; joblib; deployment_model;
        main.log; export.types; GaussianBlur; RandomResizedCrop; Solarize; albumentations; core.name""",
    "OpenSelfSup": """
        new_lr; dist_train.sh; --resume_from; --pretrained; --deterministic; work_dirs; ln -s; srun_train.sh;
        several machines; PORT; update_interval; use_fp16; prefetch; ToTensor; Pillow-SIMD; 0.23 s; NOT
        recommended; VOC07 linear SVM; low-shot SVM; dist_test_svm_epoch.sh; dist_test_svm_pretrain.sh; feat1;
        random; eval_svm.log; extract_backbone_weights.py; dist_train_linear.sh; Places205; r50_multihead.py;
        _sobel.py; dist_test.sh; dist_train_semi.sh; 1 % and 10 %; head lr; convert-pretrain-to-detectron2.py;
        COCO17; mean of 5 trials; count_parameters.py; publish_model.py; cudnn.benchmark; data source file;
        decoupled; self.backbone; neck; head; memory bank; config file; custom_hooks; augmentations in the
        config; Lighting; GaussianBlur; RandomAppliedTrans; paramwise_options; lr_mult; momentum_mult;
        weight_decay_mult; lars_exclude; Normalize""",
    "eztorch": """
        Hydra; Kinetics200DataModule; decoder: frame; pyav; fps; num_samples; time_difference_prob;
        num_threads_io; num_threads_decode; decode_float; train.csv; video_path_prefix; transforms on each clip;
        scale; aspect_ratio; interpolation; RandomMultiClipSampler; num_clips; clip_duration; speeds;
        jitter_factor; drop_last; num_workers; pin_memory; global_batch_size; trunk; projector; predictor;
        model_depth; activation_layer; activation_inplace; affine; bias; dropout; hidden_dims; norm_layer;
        num_layers; output_dim; last_bias; last_norm; last_affine; coeff; temp; temp_m; start_warmup_coeff;
        warmup_epoch_coeff; warmup_scheduler_coeff; scheduler_coeff; final_scheduler_coeff; warmup_epoch_temp_m;
        warmup_scheduler_temp_m; initial_momentum; scheduler_momentum; queue; feature_dim; use_keys; sym;
        num_global_crops; num_local_crops; num_splits; num_splits_per_combination; mutual_pass; shuffle_bn;
        simulate_n_devices; num_devices; normalize_outputs; optimizer_factory; exclude_wd_norm; exclude_wd_bias;
        momentum; trust_coefficient; weight_decay; initial_lr; scaler; layer_decay_lr; scheduler_factory;
        max_epochs; warmup_epochs; warmup_start_lr; eta_min; interval; train_transform; val_transform;
        same_on_frames; CTHW; Div255Input; BatchRandomColorJitter; BatchRandomGrayscale;
        BatchRandomGaussianBlur; kernel_size; BatchRandomSolarize; threshold; BatchRandomHorizontalFlip;
        Normalize; accelerator; devices; num_nodes; benchmark; precision; find_unused_parameters; static_graph;
        sync_batchnorm; every_n_epochs; save_top_k; dir.root; searchpath; seed_everything; srun""",
    "The original": """
        MoCo v2; SimCLR; BYOL; EqCo; VICReg; ImageNet; STL-10; CIFAR-10; DATA_PATH; top 5; half of the test set;
        train_blog.py; step_pos_cos; step_neg_cos; from moco import; from model_params import;
        SelfSupervisedMethod(batch_size=128); trainer.fit(model); save_checkpoint; from_moco_checkpoint; gpus=1;
        val_percent_check; 85 %; 65.6 %; batch size; same GPU; recipe by hand; recipe for CIFAR-10;
        encoder_arch; shuffle_batch_norm; embedding_dim; dataset_name; K; dim; m; T; eqco_alpha;
        use_eqco_margin; use_negative_examples_from_batch; lr; momentum; weight_decay; max_epochs;
        final_lr_schedule_value; transform_s; transform_apply_blur; transform_crop_size; use_momentum_schedule;
        loss_type; use_negative_examples_from_queue; use_both_augmentations_as_queries; optimizer_name;
        lars_warmup_epochs; lars_eta; exclude_matching_parameters_from_lars; loss_constant_factor;
        use_vicreg_loss; use_lagging_model; use_unit_sphere_projection; invariance_loss_weight;
        variance_loss_weight; covariance_loss_weight; variance_loss_epsilon; projection_mlp_layers;
        prediction_mlp_layers; mlp_hidden_dim; mlp_normalization; prediction_mlp_normalization;
        use_mlp_weight_standardization; num_data_workers; drop_last_batch; pin_data_memory;
        gather_keys_for_queue; four passes""",
}


def rows(section: str) -> list[list[str]]:
    """Cells of all tables, less their heads."""
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [row for row in cells if row[1] != "here"]


def commands(section: str) -> list[list[str]]:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", section, re.DOTALL)).replace("\\\n", " ")
    return [shlex.split(line) for line in blocks.splitlines()]


# ---- what is named exists ----


def program_of(words: list[str]) -> tuple[str, list[str]]:
    """A command -> (file of the program, its arguments)."""
    words = words[words.index("python") + 1 :]
    if words[0] == "-m":
        return f"{words[1].replace('.', '/')}.py", words[2:]
    return words[0], words[1:]


def options_of(program: str) -> set[str]:
    if program == "train.py":
        return {"config", *command_line.known_names()}
    module = importlib.import_module(program.removesuffix(".py").replace("/", "."))
    return {
        *re.findall(r'"--(\w+)"', SOURCES[ROOT / program]),
        *getattr(module, "FACTS", ()),
        *getattr(module, "READING", ()),
    }


def check_command(words: list[str], monkeypatch) -> None:
    program, arguments = program_of(words)
    assert (ROOT / program).is_file(), program
    for option in (word.removeprefix("--") for word in arguments if word.startswith("--")):
        assert option in options_of(program), (program, option)
    if program == "train.py" and "--config" not in arguments:
        command_line.parse(arguments)
    elif program == "evaluate.py":
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        evaluate.check_names(evaluate.arguments().protocols or ())
    elif program == "tools/export.py":
        from tools import export

        monkeypatch.setattr(sys, "argv", [program, *arguments])
        for name in export.arguments().format:
            export.check_format(name, normalize=False)


def check_settings(text: str) -> None:
    """`lr=0.4, lr_scaling="linear"`: fields, and values that a settings class takes together or alone."""
    values = {k.arg: ast.literal_eval(k.value) for k in ast.parse(f"f({text})", mode="eval").body.keywords}
    for name, value in values.items():
        assert name in FIELDS, name
        choices = FIELDS[name].metadata.get("choices")
        assert choices is None or value in choices, (name, value)
        validators = FIELDS[name].validator
        if validators is not None:
            validators(None, FIELDS[name], value)


def resolved(name: str):
    """moco.SelfSupervisedMethod.forward, pl.Trainer, BYOLParams, or what our programs write and log."""
    first, *rest = name.split(".")
    found = {"pl": pl}.get(first)
    if found is None and (ROOT / f"{first}.py").is_file() and rest:
        found = importlib.import_module(first)
    for module in () if found is not None else ("model_params", "linear_params", "moco", "linear_classifier"):
        found = getattr(importlib.import_module(module), first, found)
    for part in rest if found is not None else ():
        found = getattr(found, part)
    return found


def check_span(span: str, monkeypatch) -> None:
    path = span.replace("$DATA_PATH/", "").rstrip("/")
    if "python " in span:
        check_command(shlex.split(span), monkeypatch)
    elif span.startswith("--"):
        names = [word.removeprefix("--") for word in span.split() if word.startswith("--")]
        known = {*command_line.known_names(), "config", *options_of("evaluate.py")}
        assert set(names) <= known | {"master_port"}, span
    elif re.match(r"\w+=", span):
        check_settings(span)
    elif "(" in span:
        called = ast.parse(span, mode="eval").body
        function = resolved(ast.unparse(called.func))
        values = {k.arg: ast.literal_eval(k.value) for k in called.keywords if k.arg not in (None, "encoder")}
        if function in (pl.Trainer, SelfSupervisedMethod):  # not built: it takes a second
            known = FIELDS if function is SelfSupervisedMethod else inspect.signature(function).parameters
            assert values.keys() <= known.keys(), span
        else:
            function(**values)
    elif not (span in FIELDS or (ROOT / path).exists() or resolved(span) is not None):
        assert span in PROTOCOLS or any(path in text for text in (*SOURCES.values(), LOGGED)), span


@pytest.mark.parametrize("name", SECTIONS)
def test_what_the_second_column_names_exists(name, monkeypatch):
    table = rows(SECTIONS[name])
    assert all(len(row) == 3 for row in table)
    for theirs, ours, why in table:
        assert ours == "none" or "`" in ours, theirs
        assert ours != "none" or why, f"{theirs}: not here, and no reason"
        for span in re.findall(r"`([^`]+)`", ours):
            check_span(span, monkeypatch)


@pytest.mark.parametrize("name", SECTIONS)
def test_commands_are_understood(name, monkeypatch):
    monkeypatch.setitem(run_options.LOGGERS, "wandb", None)  # which need not be installed
    found = commands(SECTIONS[name])
    assert found
    for words in found:
        check_command(words, monkeypatch)


@pytest.mark.parametrize("name", CHECKLISTS)
def test_nothing_of_theirs_is_missing(name):
    theirs = [row[0] for row in rows(SECTIONS[name])]
    items = " ".join(CHECKLISTS[name].split()).split("; ")
    for item in items:
        ends = [r"(?<!\w)" if item[0].isalnum() else "", r"(?!\w)" if item[-1].isalnum() else ""]
        assert any(re.search(re.escape(item).join(ends), cell) for cell in theirs), f"{item!r} has no row"
    assert list(SECTIONS) == list(CHECKLISTS)


def test_every_field_of_the_original_has_its_default_in_its_row():
    ours = attrs.asdict(ModelParams())
    found = [re.match(r"`(\w+): [\w\[\]]+ = (.*)`", row[0]) for row in rows(SECTIONS["The original"])]
    defaults = {match[1]: ast.literal_eval(match[2]) for match in found if match}
    assert len(defaults) == 45
    differing = {name for name, value in defaults.items() if ours[name] != value}
    assert differing == {"embedding_dim", "gather_keys_for_queue"}


# ---- the programs ----


class ShortTrainer(pl.Trainer):
    def __init__(self, **options):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, **options}
        short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
        super().__init__(enable_model_summary=False, **{**quiet, **short, "accelerator": "cpu"})


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """The data sets of the page in small, batches of 4, and a folder `dataset` of 2 classes."""
    rng = np.random.default_rng(0)

    def read(size: int, splits: list[str]):
        arrays = {name: rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8) for name in splits}
        return lambda: {name: (images, np.arange(8) % 2) for name, images in arrays.items()}

    for name, size, splits in (("cifar10", 32, ["train", "test"]), ("stl10", 96, ["train", "unlabeled", "test"])):
        monkeypatch.setitem(packed_sources.READERS, name, read(size, splits))
    for i in range(24):
        file = tmp_path / "dataset" / f"class_{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file)
    for split, i in itertools.product(("train", "val"), range(4)):
        videos.write_frames(tmp_path / "datasets" / "kinetics" / split / f"class_{i % 2}" / f"video_{i}", n=12)
    few = {"global_batch_size": 4, "num_frames": 2, "transform_crop_size": 32, "K": 8, "evaluations": ["knn"]}
    monkeypatch.setattr(model_params, "SCEVideoParams", partial(SCEVideoParams, num_data_workers=0, **few))
    make = data.get_loader
    few = {"batch_size": 4, "num_data_workers": 0}
    monkeypatch.setattr(data, "get_loader", lambda p, *rest: make(attrs.evolve(p, **few), *rest))
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.filterwarnings("ignore:collapse", "ignore:the warm-up of", "ignore:There is a wandb")
@pytest.mark.parametrize("name", SECTIONS)
def test_python_blocks(name, small_data, tmp_path, monkeypatch):
    """Run in order, as a notebook would."""
    if name == "eztorch":
        monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # 400 MB
    blocks, names = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL), {}
    assert blocks
    for block in blocks:
        block = re.sub("2048|4096", "64", block)  # widths of heads, which would make checkpoints of 160 MB
        exec(compile(block, "coming_from.md", "exec"), names)
    if name == "solo-learn":
        assert (tmp_path / "checkpoints" / "barlow" / "epoch_0001.ckpt").is_file()
        assert names["model"].params.zero_init_residual and names["model"].params.lars_eta == 0.02
    if name == "eztorch":
        network = names["resnet3d_basic"]().eval()
        assert network(torch.zeros(1, 3, 8, 64, 64)).shape == (1, 512)
        assert network.layer4(network.layer3(torch.zeros(1, 128, 8, 4, 4))).shape[2] == 8  # frames
    if name == "The original":
        assert (tmp_path / "example.ckpt").is_file()
