"""Settings of the linear stage: each once, the checks for contradictions, and the presets."""

from attrs import field, frozen

from model_params import Contradictions, EncoderAndDataParams, refuse
from self_supervised.catalogue import NORMS_AND_BIASES
from self_supervised.fields import Preset, Presets, betas, choice, fraction, non_negative, number, positive, readable


@readable
@frozen(kw_only=True)
class LinearClassifierMethodParams(EncoderAndDataParams):
    """Settings of LinearClassifierMethod. The defaults are MoCo's."""

    # classifier and encoder
    n_classes: int | None = positive(None)  # number of classes; None: the data set's
    class_names: list[str] | None = None  # names of the classes, by number; None: the data set's, if n_classes is None
    # peak learning rate of the encoder's last stage; None: frozen, in eval mode (for which lr=30 is meant)
    encoder_lr: float | None = positive(None)
    layer_decay: float = positive(1.0, at_most=1)  # learning rate of each encoder stage, relative to the next stage's
    normalize_features: bool = False  # batch norm without parameters before the classifier: one lr fits all encoders
    # probability of a horizontal flip of training images; None: the data set's
    transform_flip_probability: float | None = fraction(None)

    # labels
    label_fraction: float | None = number(None, above=0, at_most=1)  # fraction of labels per class (at least one label)
    labels_per_class: int | None = positive(None)  # number of labels per class, instead of label_fraction
    # validation set: the test set, or a held-out part of the training set, by which settings may be chosen
    validate_on: str = choice("test", ("test", "held_out"))
    held_out_fraction: float = number(0.1, above=0, at_most=0.9)  # fraction of every class to hold out from training
    split_seed: int = non_negative(0, at_most=2**63 - 1)  # seed of label subset and held-out part, whatever `seed` is

    # optimizer
    optimizer_name: str = choice("sgd", ("sgd", "lars", "adamw"))  # optimizer; lars: for large batches
    lr: float = positive(30.0)  # peak learning rate of the classifier
    momentum: float = fraction(0.9)  # momentum of sgd and lars
    adam_betas: list[float] = betas()  # decay rates of the means of gradients and of their squares, of adamw
    nesterov: bool = False  # use Nesterov's momentum, with sgd
    weight_decay: float = non_negative(0.0)  # weight decay; not applied to excluded parameters
    max_epochs: int = positive(100)  # number of epochs (in Python, pass it to the Trainer, which schedules follow)
    # shape of the learning rate after the warm-up; steps: divided by 10 after 60 % and after 80 % of the training
    lr_schedule: str = choice("steps", ("steps", "cosine"))
    warmup_epochs: float = non_negative(0.0)  # epochs of the warm-up
    lars_eta: float = positive(1e-3, at_most=1000)  # trust coefficient of lars
    # parts of the names of parameters without weight decay and adaptation by lars; [".bias", ".bn"]: biases and norms
    exclude_matching_parameters_from_lars: list[str] = field(factory=list)

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        refuse(contradictions_of_classifier(self))


def contradictions_of_classifier(params: LinearClassifierMethodParams) -> Contradictions:
    """Contradictions of labels, encoder and optimizer of the linear stage."""
    p = params
    names = p.class_names or []
    # fmt: off
    return [
        (len(names) not in (0, p.n_classes or len(names)),
         f"n_classes={p.n_classes}, but class_names has {len(names)}. Pass one name for each class."),
        (p.label_fraction is not None and p.labels_per_class is not None,
         f"label_fraction={p.label_fraction} and labels_per_class={p.labels_per_class} are mutually exclusive. Set "
         "one of them."),
        (p.layer_decay != 1 and p.encoder_lr is None,
         f"layer_decay={p.layer_decay} needs an encoder that is trained. Set encoder_lr, or remove layer_decay."),
        (p.nesterov and (p.optimizer_name != "sgd" or p.momentum == 0),
         f"nesterov=True needs SGD with momentum. Set optimizer_name='sgd' (is {p.optimizer_name!r}) and "
         f"momentum above 0 (is {p.momentum})."),
    ]
    # fmt: on


# ---- Presets: rows of settings. LINEAR_PRESETS["linear_sgd"](dataset_name="cifar10") ----
# fmt: off

# The linear classifier of MoCo (https://arxiv.org/abs/1911.05722, section 4.1). Its learning rate of 30 is meant for
# embeddings like MoCo's. If it diverges, set normalize_features=True and lr=0.1.
LinearMoCoParams = LinearClassifierMethodParams
# As most libraries have it. For that of MAE (https://arxiv.org/abs/2111.06377, table 10), add normalize_features=True,
# warmup_epochs=10, optimizer_name="lars" and global_batch_size=16384 (with 256, LARS would hardly change the weights).
LinearSGDParams = Preset(
    LinearClassifierMethodParams,
    "LinearSGDParams",
    "SimCLR's linear classifier (https://arxiv.org/abs/2002.05709, B.6) without Nesterov's momentum.",
    lr=0.1,
    lr_scaling="linear",
    lr_schedule="cosine",
    max_epochs=90,
)
# Without weight decay and warm-up. VICReg's (README of its code) has lr_scaling=None, nesterov=False, max_epochs=20;
# lr=0.08, encoder_lr=0.03 for 1 %; lr=0.1, encoder_lr=0.01 for 10 %.
SemiSupervised1Params = Preset(
    LinearClassifierMethodParams,
    "SemiSupervised1Params",
    "SimCLR's fine-tuning with 1 % of the labels (https://arxiv.org/abs/2002.05709, B.5).",
    label_fraction=0.01,
    drop_last_batch=None,
    lr=0.05,
    encoder_lr=0.05,
    lr_scaling="linear",
    lr_schedule="cosine",
    nesterov=True,
    max_epochs=60,
)
SemiSupervised10Params = Preset(
    SemiSupervised1Params,
    "SemiSupervised10Params",
    "SimCLR's fine-tuning with 10 % of the labels.",
    label_fraction=0.1,
    max_epochs=30,
)
# Without MAE's stronger augmentations. Learning rates are as in BEiT (https://arxiv.org/abs/2106.08254): that of the
# encoder's last stage is layer_decay times the classifier's.
FineTuneParams = Preset(
    LinearClassifierMethodParams,
    "FineTuneParams",
    "MAE's fine-tuning (https://arxiv.org/abs/2111.06377, table 9).",
    optimizer_name="adamw",
    lr=1e-3,
    encoder_lr=0.75e-3,
    layer_decay=0.75,
    lr_scaling="linear",
    lr_schedule="cosine",
    warmup_epochs=5,
    weight_decay=0.05,
    max_epochs=100,
    exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)

LINEAR_PRESETS = Presets(
    LinearClassifierMethodParams,
    {
        "linear_moco": LinearMoCoParams,
        "linear_sgd": LinearSGDParams,
        "semi_supervised_1": SemiSupervised1Params,
        "semi_supervised_10": SemiSupervised10Params,
        "fine_tune": FineTuneParams,
    },
)
# fmt: on
