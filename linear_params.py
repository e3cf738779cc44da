"""Settings of the linear stage and of fine-tuning; the published protocols are rows of them."""

from functools import partial

from attrs import field, frozen

from fields import choice, fraction, non_negative, number, positive
from lars import NORMS_AND_BIASES
from shared_params import EncoderAndDataParams


@frozen(kw_only=True)
class LinearClassifierMethodParams(EncoderAndDataParams):
    """Settings of LinearClassifierMethod; the defaults are MoCo's."""

    n_classes: int | None = positive(None)  # None: the data set's

    # what is trained beside the classifier, and how
    encoder_lr: float | None = positive(None)  # of its last stage; None: frozen, in eval mode (lr=30 is only for that)
    layer_decay: float = fraction(1.0)  # each stage of the encoder has the rate of the next one times this
    normalize_features: bool = False  # batch norm without parameters before the classifier: one lr fits all encoders

    transform_flip_probability: float | None = fraction(None)  # of mirroring training images; None: the data set's

    # labels
    label_fraction: float | None = number(None, above=0, at_most=1)  # of every class, at least one image
    labels_per_class: int | None = positive(None)  # instead: so many of every class
    validate_on: str = choice("test", ("test", "held_out"))  # held_out: part of the training set, to choose settings by
    held_out_fraction: float = number(0.1, above=0, at_most=0.9)  # of every class; training does without it
    split_seed: int = non_negative(0, at_most=2**63 - 1)  # draws both, whatever `seed` is

    # optimization parameters
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw"))
    lr: float = positive(30.0)  # of the classifier
    momentum: float = fraction(0.9)
    nesterov: bool = False
    weight_decay: float = non_negative(0.0)
    max_epochs: int = positive(100)  # for the programs that make the Trainer; the schedule follows the Trainer
    lr_schedule: str = choice("steps", ("steps", "cosine"))  # steps: a tenth from 60 %, again from 80 % of the training
    warmup_epochs: float = non_negative(0.0)
    lars_eta: float = positive(1e-3, at_most=1000)
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)  # and from weight decay, as in ModelParams

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        for message in (message for is_wrong, message in self._contradictions() if is_wrong):
            raise ValueError(message)

    def _contradictions(self) -> list[tuple[bool, str]]:
        """(whether the settings contradict each other, how, and the way out)"""
        p = self
        # fmt: off
        return [
            (p.label_fraction is not None and p.labels_per_class is not None,
             f"label_fraction={p.label_fraction} and labels_per_class={p.labels_per_class} are two ways to say how "
             "many labels are used: set one of them"),
            (p.layer_decay != 1 and p.encoder_lr is None,
             f"layer_decay={p.layer_decay} is for an encoder that is trained: set encoder_lr, or leave it out"),
            (p.layer_decay == 0, "layer_decay=0 would train the encoder's last stage alone: choose more than 0"),
            (p.nesterov and (p.optimizer_name != "sgd" or p.momentum == 0),
             f"nesterov=True is a kind of SGD with momentum: set optimizer_name='sgd' (is {p.optimizer_name!r}) and "
             f"momentum above 0 (is {p.momentum})"),
        ]
        # fmt: on


# ---- the presets: rows of settings. LINEAR_PRESETS["linear_sgd"](dataset_name="cifar10") ----
# fmt: off

# The linear classifier of MoCo (https://arxiv.org/abs/1911.05722, section 4.1). Its rate of 30 is for embeddings like
# MoCo's; set normalize_features=True where it diverges.
LinearMoCoParams = LinearClassifierMethodParams
# SimCLR's (https://arxiv.org/abs/2002.05709, B.6) without Nesterov's momentum, as most libraries have it. MAE's
# (https://arxiv.org/abs/2111.06377, table 10) is this one with normalize_features=True, warmup_epochs=10 and
# optimizer_name="lars", for global_batch_size=16384: with 256 images LARS would hardly move.
LinearSGDParams = partial(
    LinearClassifierMethodParams, lr=0.1, lr_scaling="linear", lr_schedule="cosine", max_epochs=90,
)
# SimCLR's fine-tuning with few labels (B.5): no weight decay, no warm-up. VICReg's (README of its code) differs by
# lr_scaling=None, nesterov=False, max_epochs=20 and the rates: lr=0.08, encoder_lr=0.03 for 1 %, 0.1, 0.01 for 10 %.
SemiSupervised1Params = partial(
    LinearClassifierMethodParams, label_fraction=0.01, drop_last_batch=None, lr=0.05, encoder_lr=0.05,
    lr_scaling="linear", lr_schedule="cosine", nesterov=True, max_epochs=60,
)
SemiSupervised10Params = partial(SemiSupervised1Params, label_fraction=0.1, max_epochs=30)
# MAE's end-to-end fine-tuning (table 9) without its stronger augmentations; layer-wise rates as in BEiT
# (https://arxiv.org/abs/2106.08254), where the encoder's last stage has layer_decay times the classifier's rate.
FineTuneParams = partial(
    LinearClassifierMethodParams, optimizer_name="adamw", lr=1e-3, encoder_lr=0.75e-3, layer_decay=0.75,
    lr_scaling="linear", lr_schedule="cosine", warmup_epochs=5, weight_decay=0.05, max_epochs=100,
    exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)

LINEAR_PRESETS = {
    "linear_moco": LinearMoCoParams, "linear_sgd": LinearSGDParams,
    "semi_supervised_1": SemiSupervised1Params, "semi_supervised_10": SemiSupervised10Params,
    "fine_tune": FineTuneParams,
}
