"""Every setting once, validated; and the presets. A method is a row of settings, not a class."""

from functools import partial

from attrs import field, frozen

import head_params
import optimizer_params
import sce_params
import view_params
from evaluation import EVALUATIONS, PROBE_SOLVERS
from fields import choice, fraction, non_negative, positive
from head_params import LARGEST_WIDTH, HeadParams, normalized_layers
from heads import GROUPS
from lars import NORMS_AND_BIASES
from optimizer_params import OptimizerParams
from sce_params import SCELossParams
from shared_params import EncoderAndDataParams
from video_params import refusal
from view_params import ViewParams

LOSSES = ("ce", "bce", "ip", "sce", "vic", "barlow")
NEED_NEGATIVES = ("ce", "sce")
LARGEST_QUEUE = 2**34  # numbers, 64 GiB


@frozen(kw_only=True)
class ModelParams(EncoderAndDataParams, ViewParams, HeadParams, SCELossParams, OptimizerParams):
    """Settings of SelfSupervisedMethod. The defaults are MoCo v2."""

    # batch statistics of the keys
    shuffle_batch_norm: bool = False  # keys share batch statistics with other images than their queries do
    n_virtual_devices: int = positive(8)  # for shuffle_batch_norm on one process: parts of the shuffled keys' batch

    # MoCo parameters
    K: int = non_negative(65536)  # number of examples in queue
    dim: int = positive(128, at_most=LARGEST_WIDTH)  # width of the projections
    m: float = fraction(0.996)  # share of itself that the lagging model keeps in a step
    T: float = positive(0.2, by=1e-4)  # temperature

    # eqco parameters
    eqco_alpha: float = positive(65536)  # as many negatives as the loss behaves like
    use_eqco_margin: bool = False  # the margin that eqco_alpha makes
    use_negative_examples_from_batch: bool = False  # the other images' keys
    use_negative_examples_from_same_view: bool = False  # the other images' queries, as in SimCLR

    # Change these to make more like BYOL
    use_momentum_schedule: bool = False  # m rises to 1 along half a cosine
    loss_constant_factor: float = positive(1, at_most=1e6)  # the loss is multiplied by it
    loss_type: str = choice("ce", LOSSES)  # ce: InfoNCE, ip: BYOL, vic: VICReg; losses.py
    use_negative_examples_from_queue: bool = True  # keys of earlier batches
    use_both_augmentations_as_queries: bool = False  # the loss in both directions
    stop_gradient_of_keys: bool = False  # for SimSiam; keys of a lagging model have no gradient anyway

    # Change these to make more like VICReg
    use_vicreg_loss: bool = False  # another way to say loss_type="vic"
    use_lagging_model: bool = True  # keys come from a slow copy of the network
    use_unit_sphere_projection: bool = True  # projections have length 1
    invariance_loss_weight: float = non_negative(25.0, at_most=1e6)  # VICReg's lambda
    variance_loss_weight: float = non_negative(25.0, at_most=1e6)  # VICReg's mu
    covariance_loss_weight: float = non_negative(1.0, at_most=1e6)  # VICReg's nu
    variance_loss_epsilon: float = positive(1e-4)  # within the root of the variance
    redundancy_loss_weight: float = non_negative(0.0051, at_most=1e6)  # Barlow Twins' lambda

    # several processes
    gather_keys_for_queue: bool | None = None  # into every queue; None: where there are several

    # evaluation during training
    evaluations: list[str] = field(factory=lambda: list(EVALUATIONS))  # [] for none
    evaluate_every_n_epochs: int = positive(1)  # the other epochs are not evaluated
    probe_solver: str = choice("sklearn", PROBE_SOLVERS)  # of linear_probe; torch: on the features' device
    online_classifier: bool = False  # a linear one, trained beside the method on the batches' labels (-1: none)
    n_classes: int | None = positive(None)  # of the online classifier; None: the data set's
    online_classifier_lr: float = positive(0.1, at_most=1000)  # follows lr_schedule; momentum as all, no decay
    probe_on_training_set: bool = False  # fit on the labelled training set instead of half of the validation set

    def __attrs_post_init__(self):
        super().__attrs_post_init__()
        if self.use_vicreg_loss and self.loss_type == "ce":  # the default, hence nobody's wish
            object.__setattr__(self, "loss_type", "vic")
        wrong = self._contradictions() + head_params.contradictions(self) + self._misfits()
        wrong += optimizer_params.contradictions(self) + sce_params.contradictions(self)
        wrong += view_params.contradictions(self)
        for message in (message for is_wrong, message in wrong if is_wrong):
            raise ValueError(message)
        _ = self.views  # refuses lists of the wrong length

    def _contradictions(self) -> list[tuple[bool, str]]:
        """(whether the settings contradict each other, how, and the way out)"""
        p = self
        negatives = p.use_negative_examples_from_batch or p.use_negative_examples_from_queue
        one_network = not p.use_lagging_model and p.prediction_mlp_layers == 0
        unknown = sorted(set(p.evaluations) - set(EVALUATIONS))
        time_difference = "transform_time_difference_probability"
        of_preset = SCEVideoParams.keywords[time_difference]  # which may be tried on images
        # fmt: off
        return [
            (p.use_vicreg_loss and p.loss_type != "vic",
             f"use_vicreg_loss=True contradicts loss_type={p.loss_type!r}: set only one of them"),
            (p.loss_type in NEED_NEGATIVES and not negatives,
             f"loss_type={p.loss_type!r} compares an image with negatives and has none: set "
             "use_negative_examples_from_queue=True or use_negative_examples_from_batch=True"),
            (p.use_negative_examples_from_same_view and not one_network,
             "use_negative_examples_from_same_view=True needs queries and keys of one network: set "
             f"use_lagging_model=False (is {p.use_lagging_model}), "
             f"prediction_mlp_layers=0 (is {p.prediction_mlp_layers})"),
            (p.shuffle_batch_norm and not p.use_lagging_model,
             "shuffle_batch_norm=True shuffles the images of the lagging model: set use_lagging_model=True"),
            (p.use_eqco_margin and p.loss_type != "ce",
             f"use_eqco_margin=True is a part of loss_type='ce', not of {p.loss_type!r}: set one or the other"),
            (not p.dataset.of_videos and p.transform_time_difference_probability not in (None, 0, of_preset),
             refusal(time_difference, p.transform_time_difference_probability, p.dataset_name)),
            (bool(unknown), f"evaluations={unknown} unknown: choose from {', '.join(EVALUATIONS)}"),
        ]
        # fmt: on

    def _misfits(self) -> list[tuple[bool, str]]:
        """The same of numbers that do not fit together."""
        p, which = self, "batch_size" if self.global_batch_size is None else "global_batch_size"
        one_image, size = getattr(p, which) == 1, f"{which}={getattr(p, which)}"
        in_batch = p.use_negative_examples_from_batch and not p.use_negative_examples_from_queue
        layers = normalized_layers(p)
        ungrouped = [f"{field}={width}" for kind, width, field in layers if kind == "gn" and width % GROUPS]
        of_one = any(kind == "bn" or (kind == "gn" and width == GROUPS) for kind, width, _ in layers)
        # fmt: off
        return [
            (p.use_negative_examples_from_queue and p.K == 0,
             "K=0 is no queue: choose K above 0, or use_negative_examples_from_queue=False"),
            (p.use_negative_examples_from_queue and p.K * p.dim > LARGEST_QUEUE,
             f"K={p.K} keys of dim={p.dim} are a queue of more than {LARGEST_QUEUE} numbers: choose fewer"),
            (bool(ungrouped),
             f"{', '.join(ungrouped[:1])} does not fit group norm: choose a multiple of {GROUPS}"),
            (one_image and (in_batch or p.loss_type in ("vic", "barlow")),
             f"{size} leaves loss_type={p.loss_type!r} nothing to compare with: choose a larger one, or a queue"),
            (one_image and of_one,
             f"{size} leaves mlp_normalization={p.mlp_normalization!r}, "
             f"prediction_mlp_normalization={p.prediction_mlp_normalization!r} no mean to take: choose a larger one"),
        ]
        # fmt: on

    @property
    def is_evaluated(self) -> bool:
        return bool(self.evaluations) or self.online_classifier

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(query view, key view) of every term of the loss.

        Of large views every ordered pair with use_both_augmentations_as_queries, else the first view with each other.
        A small view is a query for the key of every large view, and never a key itself (SwAV's multi-crop,
        https://arxiv.org/abs/2006.09882, section 3.2). `vic` and `barlow` compare the batches of z of the same pairs,
        as VICRegL does (https://arxiv.org/abs/2210.01571).
        """
        large, small = range(self.n_large_views), range(self.n_large_views, self.n_views)
        queries = large if self.use_both_augmentations_as_queries else large[:1]
        return [(i, j) for i in [*queries, *small] for j in large if i != j]

    @property
    def loss_factor(self) -> float:
        """Of the mean over pairs. With two views the loss is the sum over pairs times loss_constant_factor, as in BYOL
        and SimCLR; more views do not change its size (as in SwAV and DINO), so that the same lr fits."""
        return (2 if self.use_both_augmentations_as_queries else 1) * self.loss_constant_factor


# ---- the presets: rows of settings, and what differs from another row. PRESETS["byol"](lr=0.3) ----
# fmt: off

MoCoV2Params = ModelParams
# Few negatives that count as many, and no queue: SiMo, the paper's own method.
EqCoParams = partial(
    ModelParams, use_eqco_margin=True, use_negative_examples_from_batch=True, use_negative_examples_from_queue=False,
)
SCEParams = partial(
    ModelParams, loss_type="sce", T=0.1, mlp_normalization="bn", use_negative_examples_from_batch=True,
    use_both_augmentations_as_queries=True, use_momentum_schedule=True,
)
BYOLParams = partial(
    ModelParams, loss_type="ip", loss_constant_factor=2, prediction_mlp_layers=2, mlp_normalization="bn",
    use_negative_examples_from_queue=False, use_both_augmentations_as_queries=True, use_momentum_schedule=True,
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimCLRParams = partial(
    ModelParams, use_lagging_model=False, use_both_augmentations_as_queries=True,
    use_negative_examples_from_queue=False, use_negative_examples_from_batch=True,
    use_negative_examples_from_same_view=True,
)
# The paper, on ImageNet: max_epochs=1000, lr=1.6, batch_size=2048, weight_decay=1e-6, mlp_hidden_dim=8192, dim=8192.
VICRegParams = partial(
    ModelParams, loss_type="vic", use_lagging_model=False, use_unit_sphere_projection=False,
    use_negative_examples_from_queue=False, projection_mlp_layers=3, mlp_normalization="bn",
    optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    lars_warmup_epochs=10, final_lr_schedule_value=0.002,
)
BarlowTwinsParams = partial(
    VICRegParams, loss_type="barlow", loss_constant_factor=0.1, mlp_hidden_dim=2048, dim=2048,
    lr=0.3, weight_decay=1e-6, final_lr_schedule_value=0.0003,
)
MoCoV3Params = partial(  # loss_constant_factor is 2 T, as in the paper's code
    EqCoParams, use_eqco_margin=False, loss_constant_factor=0.4, prediction_mlp_layers=2, mlp_normalization="bn",
    use_both_augmentations_as_queries=True, m=0.99, use_momentum_schedule=True, optimizer_name="adamw", lr=1.5e-4,
    weight_decay=0.1, warmup_epochs=10, exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
)
SimSiamParams = partial(
    BYOLParams, use_lagging_model=False, stop_gradient_of_keys=True, use_momentum_schedule=False,
    loss_constant_factor=0.5, optimizer_name="sgd", exclude_matching_parameters_from_lars=[], lr=0.05,
)
ReSSLParams = partial(SCEParams, sce_coefficient=0.0, sce_target_T=0.04, use_both_augmentations_as_queries=False)
# R3D-18 on Kinetics200 (https://arxiv.org/abs/2212.11187, eztorch's configuration). loss_constant_factor: its loss is
# the mean over both directions. Its Trainer: --precision 16-mixed --sync_batchnorm --save_every_n_epochs 100.
SCEVideoParams = partial(
    SCEParams, dataset_name="kinetics", video_decoder="frames", frames_per_second=30, num_frames=8, clip_duration=2.56,
    encoder_arch="r3d_18", global_batch_size=512, num_data_workers=5, decoding_threads=4,
    transform_brightness=0.8, transform_contrast=0.8, transform_saturation=0.4, transform_hue=0.2,
    transform_jitter_probability=0.8, transform_grayscale_probability=0.2, transform_blur_probability=[1.0, 0.1],
    transform_solarize_probability=[0.0, 0.2], transform_time_difference_probability=0.2,
    loss_constant_factor=0.5, use_negative_examples_from_batch=False, K=32768, dim=256, m=0.99,
    projection_mlp_layers=3, prediction_mlp_layers=2, mlp_hidden_dim=1024, mlp_bias=False,
    projection_mlp_last_bias=False, prediction_mlp_last_bias=False, projection_mlp_last_normalization="same",
    mlp_last_affine=False, optimizer_name="lars", exclude_matching_parameters_from_lars=NORMS_AND_BIASES,
    lr=2.4, lr_scaling="linear", weight_decay=1e-6, warmup_epochs=35, max_epochs=200,
)

PRESETS = {
    "moco_v2": MoCoV2Params, "eqco": EqCoParams, "sce": SCEParams, "byol": BYOLParams, "simclr": SimCLRParams,
    "vicreg": VICRegParams, "barlow_twins": BarlowTwinsParams,
    "moco_v3": MoCoV3Params, "simsiam": SimSiamParams, "ressl": ReSSLParams, "sce_video": SCEVideoParams,
}
