"""All evaluation protocols in one table: name -> function of (evaluation data, seed) -> dict of scalars."""

import copy
import difflib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import attrs
import pytorch_lightning as pl
import torch
from attrs import frozen
from pytorch_lightning.callbacks import RichProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.utilities.exceptions import SIGTERMException
from rich.progress import track

from linear_classifier import LinearClassifierMethod
from model_params import EncoderAndDataParams
from self_supervised.data.class_labels import lacking
from self_supervised.data.data_sets import get_dataset
from self_supervised.data.facts import count_classes, n_classes
from self_supervised.evaluation import label_free, linear_models, probes, validation
from self_supervised.evaluation.features import LABEL_FREE_IMAGES, PATCHES, VIEWS, EvaluationData
from self_supervised.evaluation.inner_layers import LAST_BLOCKS, inner_layers
from self_supervised.linear_params import LINEAR_PRESETS, LinearClassifierMethodParams
from self_supervised.networks.frozen_encoder import Encoder
from self_supervised.numerics import Scores
from self_supervised.program import TERMINATED, end, in_one_line
from self_supervised.setting_groups import IMAGE_SETTINGS

# ---- protocols that are not one function of features ----


def score_stages(data: EvaluationData, seed: int, score: Callable[..., Scores]) -> Scores:
    """Return the scores of the output of each stage of a ResNet: acc1, or map for multi-label data."""
    train = data.train
    test = data.test
    scores_of_stages = {}
    for name in track(sorted(train.inner), "classifiers of the stages"):
        scores = score(data.on_device(train.inner[name], train.y, test.inner[name], test.y), seed)
        scores_of_stages |= {f"{name}_{key}": value for key, value in scores.items() if key in ("acc1", "map")}
    return scores_of_stages


def score_blocks(data: EvaluationData, seed: int) -> Scores:
    """Return the scores of `linear` on the outputs of the last blocks of a transformer, side by side."""
    train, test = (
        torch.cat([split.inner[name] for name in sorted(split.inner)], 1) for split in (data.train, data.test)
    )
    return probes.linear(*data.on_device(train, data.train.y, test, data.test.y), seed=seed)


def score_classes(data: EvaluationData, seed: int) -> Scores:
    """Return the accuracy of `linear` on each class, by the class's name, or by its number if it has no name of its
    own."""
    shown = [in_one_line(name) for name in count_classes(data.params)[1] or []]
    names = {number: name for number, name in enumerate(shown) if shown.count(name) == 1}
    accuracies = probes.linear_classes(*data.sets, seed=seed)
    return {f"{names.get(number, number)}_acc1": acc1 for number, acc1 in accuracies.items()}


def linear_settings_of(data: EvaluationData, seed: int, preset: str) -> LinearClassifierMethodParams:
    """Return the settings of a linear preset for the data's images, with the overrides of `data.training`.

    Raises:
        ValueError: the overrides are invalid.
    """
    settings = {name: getattr(data.params, name) for name in IMAGE_SETTINGS} | {"seed": seed, "split_seed": seed}
    params = LINEAR_PRESETS[preset](**settings | data.training)
    fraction = params.max_epochs / LINEAR_PRESETS[preset]().max_epochs  # the warm-up keeps its fraction of training
    defaults = {"warmup_epochs": params.warmup_epochs * fraction, "drop_last_batch": None}
    return attrs.evolve(params, **{**defaults, **data.training})


def train_and_score(data: EvaluationData, seed: int, preset: str) -> Scores:
    """Train LinearClassifierMethod with a preset's settings and score the test set once, after the last epoch.

    If the loss is not finite, the scores are nan.
    """
    params = linear_settings_of(data, seed, preset)
    method = LinearClassifierMethod(params, encoder=copy.deepcopy(data.encoder.model).train())
    device = data.encoder.device
    trainer = pl.Trainer(
        max_epochs=params.max_epochs,
        check_val_every_n_epoch=params.max_epochs,
        num_sanity_val_steps=0,
        accelerator={"cuda": "gpu"}.get(device.type, device.type),
        devices=[device.index or 0] if device.type == "cuda" else 1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[RichProgressBar()],
        # of one process; SLURM's would save and load checkpoints of its own, in the current directory
        plugins=[LightningEnvironment()],
        default_root_dir=data.cache,
    )
    try:
        trainer.fit(method)
    except SIGTERMException:  # with status 0, as after a training that was saved
        end("stopped by SIGTERM", TERMINATED)
    except FloatingPointError as error:
        print(f"{preset}: {error}")
        return {"acc1": float("nan"), "acc5": float("nan")}
    return {name: float(trainer.callback_metrics[f"valid_{name}"]) for name in ("acc1", "acc5")}


# ---- the table ----


@frozen
class Protocol:
    run: Callable[[EvaluationData, int], Scores]
    definition: str  # meaning of the scores, in one line; part of the key of stored results
    source: str  # paper
    seeded: bool = True  # whether the scores depend on the seed
    by_default: bool = True  # False: takes many times as long as others, or has a score for each class
    needs_labels: bool = True
    needs_classes: bool = True  # one class per image
    layers: str | None = None  # whose outputs it scores: a key of INNER_LAYERS
    preset: str | None = None  # name in LINEAR_PRESETS, if the protocol trains by SGD
    goodness: Callable[[str, float], float] = lambda score, value: value  # highest for the best value of a score

    def refusal(self, encoder: Encoder, params: EncoderAndDataParams, unlabeled: str) -> str | None:
        """Return why the protocol cannot be run, or None. `unlabeled` is what `why_not_scorable` has returned, once for
        all protocols, since it may list files."""
        if self.needs_labels and unlabeled:
            return unlabeled
        if self.needs_classes and params.dataset.multi_label:
            return f"needs one class per image, but {params.dataset_name} is multi-label"
        if self.layers and not any(name.startswith(self.layers) for name in inner_layers(encoder)):
            return f"needs {INNER_LAYERS[self.layers]}, but {params.encoder_arch} has none"
        return None


def seeded_probe(function: Callable[..., Scores]) -> Callable[[EvaluationData, int], Scores]:
    return lambda data, seed: function(*data.sets, seed=seed)


def label_free_row(run: Callable[[EvaluationData, int], Scores], definition: str, source: str, **more: Any) -> Protocol:
    return Protocol(run, definition, source, seeded=False, needs_labels=False, needs_classes=False, **more)


def training_row(preset: str, definition: str, source: str) -> Protocol:
    return Protocol(partial(train_and_score, preset=preset), definition, source, preset=preset)


INNER_LAYERS = {
    "layer": "an encoder with layer1 to layer4",
    "block": "a ViT of timm (VisionTransformer, Eva, Beit) or torchvision",
}  # beginning of the layers' names -> who has them
FROZEN = "frozen features of whole images"
OF_PATCHES = (
    f"on the mean of the features of {PATCHES.n_views} random patches of an image: the data set's augmentations, "
    f"with crops of {PATCHES.area:.0%} of its area"
)
PROTOCOLS = {
    "knn": Protocol(
        lambda data, _: probes.knn_protocol(*data.sets),
        f"{FROZEN}; k = 1, 5, 20, 200 nearest by cosine vote with weight exp(cosine / {validation.KNN_T})",
        "https://arxiv.org/abs/1805.01978, section 3.4",
        seeded=False,
    ),
    "retrieval": Protocol(
        lambda data, _: probes.retrieval(*data.sets),
        f"{FROZEN}; recall at k = 1, 5, 10, 20: percentage of test images with an image of their class among the k "
        "training images nearest by cosine",
        "https://arxiv.org/abs/2010.09709, section 4",
        seeded=False,
    ),
    "linear": Protocol(
        seeded_probe(probes.linear),
        f"{FROZEN}, standardized; logistic regression to the optimum (L-BFGS), also of separable classes; L2 chosen on "
        "a held-out fifth of the training set by accuracy, then cross entropy, and fitted to all of it; L2 is 100 if "
        "most images are of classes with fewer than 5",
        "https://arxiv.org/abs/1805.08974, appendix; https://arxiv.org/abs/2002.05709, B.8",
    ),
    "linear_stages": Protocol(
        partial(score_stages, score=lambda sets, seed: probes.linear(*sets, seed=seed)),
        "as linear, for the output of each of layer1 to layer4, averaged over the image",
        "after https://arxiv.org/abs/1905.01235, section 6.1",
        layers="layer",
    ),
    "linear_blocks": Protocol(
        score_blocks,
        f"as linear, for the outputs of the last {LAST_BLOCKS} blocks of a transformer, side by side: each as the "
        "encoder reads its last block, such as the class token after the last normalization",
        "https://arxiv.org/abs/2104.14294, appendix F.2",
        by_default=False,
        layers="block",
    ),
    "linear_classes": Protocol(
        score_classes,
        "as linear; accuracy on the test images of each class",
        "https://arxiv.org/abs/1805.08974, appendix; https://arxiv.org/abs/2002.05709, B.8",
        by_default=False,
    ),
    "few_labels": Protocol(
        seeded_probe(probes.few_labels),
        "as linear, within each draw of 1, 2, 5, 10, ... labels of each class, and with all; 3 draws, mean and sample "
        "standard deviation",
        "after https://arxiv.org/abs/2204.07141",
    ),
    "svm": Protocol(
        lambda data, _: linear_models.svm(*data.sets),
        f"{FROZEN}, of length 1; linear SVM of each class against the rest, to the optimum (squared hinge loss, "
        "positives have weight 2); cost chosen from 26 values by 3-fold cross-validation on the training set, or 0.5 "
        "with fewer than 3 images per class; accuracy, or mean average precision",
        "https://arxiv.org/abs/1905.01235, section 6.1",
        seeded=False,
        needs_classes=False,
    ),
    "svm_stages": Protocol(
        partial(score_stages, score=lambda sets, _: linear_models.svm(*sets)),
        "as svm, for the output of each of layer1 to layer4, averaged over the image",
        "after https://arxiv.org/abs/1905.01235, section 6.1",
        seeded=False,
        by_default=False,
        needs_classes=False,
        layers="layer",
    ),
    "low_shot_svm": Protocol(
        seeded_probe(probes.low_shot_svm),
        "as svm, on 1, 2, 4, 8, 16, 32, 64 and 96 images of each class; 5 draws, mean and sample standard deviation; "
        "cost by 3-fold cross-validation within the draw with at least 4 images per class, else 0.5",
        "https://arxiv.org/abs/1905.01235, section 6.2",
        needs_classes=False,
    ),
    "knn_patches": Protocol(
        lambda data, _: probes.knn_protocol(*data.patches),
        f"as knn, {OF_PATCHES}",
        "https://arxiv.org/abs/2304.03977, section 4.1",
        seeded=False,
        by_default=False,
    ),
    "linear_patches": Protocol(
        lambda data, seed: probes.linear(*data.patches, seed=seed),
        f"as linear, {OF_PATCHES}",
        "https://arxiv.org/abs/2304.03977, section 4.1",
        by_default=False,
    ),
    "rank_me": label_free_row(
        lambda data, _: {"rank_me": validation.effective_rank(data.label_free_features)},
        f"effective rank of the features of at most {LABEL_FREE_IMAGES:,} training images: exp of the entropy of the "
        "normalized singular values",
        "https://arxiv.org/abs/2210.02885, equation 1",
    ),
    "alpha_req": label_free_row(
        lambda data, _: label_free.alpha_req(data.label_free_features),
        "exponent of the decay of the covariance's eigenvalues 11 to 100, of the same images",
        "https://arxiv.org/abs/2202.05808",
        goodness=lambda _, alpha: -abs(alpha - 1),
    ),
    "uniformity": label_free_row(
        lambda data, _: label_free.uniformity(data.label_free_features),
        "log of the mean over pairs of exp(-2 distance^2) on the unit sphere, of the same images",
        "https://arxiv.org/abs/2005.10242, section 4.1",
        goodness=lambda _, value: -value,
    ),
    "alignment": label_free_row(
        lambda data, _: label_free.alignment(data.views),
        f"mean squared distance on the unit sphere of views of one image; {VIEWS.n_images:,} training images, "
        f"{VIEWS.n_views} views each, by the data set's augmentations",
        "https://arxiv.org/abs/2005.10242, section 4.1",
        goodness=lambda _, value: -value,
    ),
    "lidar": label_free_row(
        lambda data, _: label_free.lidar(data.views),
        "effective rank of W^-1/2 B W^-1/2 (B: covariance between images, W: covariance within the views of an image); "
        "the same views",
        "https://arxiv.org/abs/2312.04000, equations 1 to 4",
    ),
    "linear_moco": training_row(
        "linear_moco",
        "SGD on augmented images, encoder frozen; lr 30, divided by 10 after 60 % and after 80 % of 100 epochs",
        "https://arxiv.org/abs/1911.05722, section 4.1",
    ),
    "linear_sgd": training_row(
        "linear_sgd",
        "SGD on augmented images, encoder frozen; lr 0.1 x batch / 256, cosine, 90 epochs",
        "https://arxiv.org/abs/2002.05709, B.6",
    ),
    "semi_1": training_row(
        "semi_supervised_1",
        "fine-tuning on 1 % of each class's labels (at least one); Nesterov SGD, lr 0.05 x batch / 256, 60 epochs",
        "https://arxiv.org/abs/2002.05709, B.5",
    ),
    "semi_10": training_row(
        "semi_supervised_10",
        "the same on 10 %, 30 epochs",
        "https://arxiv.org/abs/2002.05709, B.5",
    ),
    "finetune": training_row(
        "fine_tune",
        "fine-tuning on all labels; AdamW, lr 1e-3 x batch / 256, each stage 0.75 of the one after it, 100 epochs",
        "https://arxiv.org/abs/2111.06377, table 9; https://arxiv.org/abs/2106.08254",
    ),
}


def check_names(protocols: Sequence[str]) -> None:
    for name in protocols:
        if name not in PROTOCOLS:
            near = difflib.get_close_matches(name, PROTOCOLS, n=3, cutoff=0.3) or list(PROTOCOLS)
            raise ValueError(f"protocol {name!r} is unknown. Nearest: {', '.join(near)}. --list shows all.")


def why_not_scorable(params: EncoderAndDataParams) -> str:
    """Return why no classifier of the training images can be scored on the test images, or ""."""
    info, name = params.dataset, params.dataset_name
    if not n_classes(params):
        way_out = (
            ": labels_from=None, by default as in the pretraining. If the folders of your images are classes, pass "
            "--data_path and --labels_from first_folder"
        )
        is_told = info.is_custom and params.labels_from is None
        return f"needs labels, but the images of {name} have none{way_out if is_told else ''}"
    if not (info.is_custom or info.of_videos):
        return ""
    train, test = (get_dataset(params, splits).labels for splits in (info.train_splits, info.test_splits))
    for labels, split in ((train, "training"), (test, "test")):
        if labels.min() < 0:
            has = "none" if labels.max() < 0 else "one only in part"
            way_out = ". To score others, exclude these with exclude_patterns, or save the data set without them"
            return f"needs labels, but the {split} images of {name} have {has}{way_out if split == 'test' else ''}"
    return f"needs two classes, but the training images of {name} have one" if lacking([train]) else ""


def runnable(protocols: Sequence[str] | None, encoder: Encoder, params: EncoderAndDataParams) -> list[str]:
    """Return the requested protocols, each once; by default (None) all that can be run, except those that
    train by SGD and those that are not `by_default`.

    Raises:
        ValueError: a requested protocol cannot be run with this encoder or data set.
    """
    unlabeled = why_not_scorable(params)
    refused = {name: why for name, row in PROTOCOLS.items() if (why := row.refusal(encoder, params, unlabeled))}
    if protocols is None:
        if unlabeled:
            print(f"protocols with labels are left out. Each {unlabeled}.", flush=True)
        return [name for name, row in PROTOCOLS.items() if not (row.preset or not row.by_default or name in refused)]
    for name in protocols:
        if name in refused:
            able = ", ".join(other for other in PROTOCOLS if other not in refused)
            raise ValueError(f"protocol {name!r} {refused[name]}. Choose one of {able}.")
    return list(dict.fromkeys(protocols))
