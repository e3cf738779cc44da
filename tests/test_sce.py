"""Similarity contrastive estimation: its loss, schedules, heads, and the preset for videos."""

import math

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import videos
from conftest import VECTORS
from torch import nn
from torch.utils.data import DataLoader

import moco
import model_params
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from model_params import NORMS_AND_BIASES, ModelParams, SCEParams, SCEVideoParams
from self_supervised import catalogue, losses
from self_supervised.catalogue import DATASETS, NORMALIZATIONS
from self_supervised.data.facts import n_classes
from self_supervised.distributed import shuffled
from self_supervised.networks.heads import MLP
from self_supervised.runs import command_line
from self_supervised.training import schedules
from self_supervised.training.plan import Plan

N, D, K = VECTORS
SETS = {"queue": (True, False), "keys": (False, True), "keys and queue": (True, True)}


# ---- Loss ----


def settings(relational_set: str, **fields) -> ModelParams:
    queue, batch = SETS[relational_set]
    of_set = {"use_negative_examples_from_queue": queue, "use_negative_examples_from_batch": batch}
    return SCEParams(**of_set, **fields)


def sce_by_hand(q, k, queue, relational_set, T, target_T, coefficient):
    """Return (loss, gradient of q), computed with loops in NumPy's float64.

    The gradient of a cross entropy with logits q.c / T is the sum of (distribution - target) c / T.
    """
    loss, gradient = 0.0, np.zeros_like(q)
    for n in range(N):
        others = [k[m] for m in range(N) if m != n] if SETS[relational_set][1] else []
        others = others + (list(queue) if SETS[relational_set][0] else [])
        weights = [math.exp(k[n] @ c / target_T) for c in others]
        candidates, target = others, [(1 - coefficient) * w / sum(weights) for w in weights]
        if coefficient > 0:  # ReSSL excludes the own key
            candidates, target = [k[n], *candidates], [coefficient, *target]
        exponentials = [math.exp(q[n] @ c / T) for c in candidates]
        for c, t, e in zip(candidates, target, exponentials, strict=True):
            p = e / sum(exponentials)
            loss -= t * math.log(p) / N
            gradient[n] += (p - t) * c / T / N
    return loss, gradient


@pytest.mark.parametrize("coefficient", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("relational_set", SETS)
def test_loss_and_gradient_equal_the_formula(vectors, relational_set, coefficient):
    q, k, queue = vectors
    p = settings(relational_set, T=0.1, sce_target_T=0.07, sce_coefficient=coefficient)
    found = losses.get_loss(p)(q, k.detach(), queue)["loss"]
    arrays = [x.detach().numpy() for x in (q, k, queue)]
    expected, gradient = sce_by_hand(*arrays, relational_set, 0.1, 0.07, coefficient)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    assert np.allclose(torch.autograd.grad(found, q)[0].numpy(), gradient, atol=1e-12)


@pytest.mark.parametrize("relational_set", SETS)
def test_coefficient_1_is_info_nce(vectors, relational_set):
    q, k, queue = vectors
    p = settings(relational_set, sce_coefficient=1.0)
    ours, info_nce = (losses.get_loss(attrs.evolve(p, loss_type=kind))(q, k, queue)["loss"] for kind in ("sce", "ce"))
    assert ours.item() == pytest.approx(info_nce.item(), abs=1e-14)
    for a, b in zip(torch.autograd.grad(ours, (q, k)), torch.autograd.grad(info_nce, (q, k)), strict=True):
        assert torch.allclose(a, b, atol=1e-14)


def ressl_and_ceiling(q, k, queue, T, target_T):
    """Return ReSSL's loss as in its authors' code, and the additional term if the own key is a candidate.

    The loss has a softmax over the queue's columns only. The term is -log of the queue's probability.
    """
    relations, online = (k @ queue.T / target_T).softmax(1).detach(), q @ queue.T / T
    of_queue = online.logsumexp(1)
    ceiling = torch.logaddexp(of_queue, (q * k).sum(1) / T) - of_queue
    return -(relations * online.log_softmax(1)).sum(1).mean(), ceiling.mean()


@pytest.mark.parametrize("fields", [{"sce_coefficient": 0.0}, {"sce_coefficient": 0.5}])
def test_coefficient_0_is_the_loss_of_ressls_authors(vectors, fields):
    """This holds for 0 as the setting and as the value of a schedule at this step."""
    q, k, queue = vectors
    loss = losses.get_loss(settings("queue", T=0.1, sce_target_T=0.04, **fields), sce_coefficient=0.0)
    found, expected = loss(q, k, queue)["loss"], ressl_and_ceiling(q, k, queue, 0.1, 0.04)[0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    ours, theirs = (torch.autograd.grad(x, (q, k), allow_unused=True) for x in (found, expected))
    assert torch.allclose(ours[0], theirs[0], atol=1e-12)
    assert theirs[1] is None and not ours[1].any()  # the own key has no part in it


def test_a_coefficient_near_0_keeps_the_own_key_as_a_candidate(vectors):
    """The paper's proposition 1: the loss is ReSSL's plus the ceiling."""
    q, k, queue = vectors
    p = settings("queue", T=0.1, sce_target_T=0.04, sce_coefficient=1e-12)
    found, (ressl, ceiling) = losses.get_loss(p)(q, k, queue)["loss"], ressl_and_ceiling(q, k, queue, 0.1, 0.04)
    assert found.item() == pytest.approx((ressl + ceiling).item(), abs=1e-9) and ceiling > 1e-3


def test_ressl_of_one_image_without_a_queue_is_0():
    """The last batch may have a single image, which has no others to compare with."""
    q = F.normalize(torch.randn(1, D), dim=1).requires_grad_()
    found = losses.get_loss(settings("keys", sce_coefficient=0.0))(q, q.detach(), None)["loss"]
    found.backward()
    assert found.item() == 0 and not q.grad.any()


def small_encoder() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU())


SMALL = {
    "dataset_name": "digits", "encoder_arch": "module", "global_batch_size": None, "batch_size": N, "K": K, "dim": D,
    "mlp_hidden_dim": 8, "evaluations": [], "seed": 0,
}  # fmt: skip


def small_method(preset=SCEParams, **fields) -> SelfSupervisedMethod:
    return SelfSupervisedMethod(preset(**{**SMALL, **fields}), encoder=small_encoder())


@pytest.mark.parametrize("constant", [1, 0.5])
def test_the_symmetric_loss_is_the_sum_or_the_mean_of_both_directions(constant, monkeypatch):
    fields = {"use_negative_examples_from_batch": False, "use_momentum_schedule": False}  # a schedule needs a Trainer
    method = small_method(T=0.1, loss_constant_factor=constant, **fields)
    monkeypatch.setattr(method, "log_dict", lambda _: None)
    views = [torch.randn(N, 1, 8, 8) for _ in range(2)]
    loss = method.training_step((views, None), 0).item()
    q, k = ([f(view).detach().double().numpy() for view in views] for f in (lambda x: method.encode(x)[1],
            lambda x: method.encode_lagging(x, 0)))  # fmt: skip
    queue = method.queue.keys.double().numpy()
    both = [sce_by_hand(q[i], k[j], queue, "queue", 0.1, 0.05, 0.5)[0] for i, j in ((0, 1), (1, 0))]
    assert loss == pytest.approx(sum(both) * constant, rel=1e-5)


# ---- Schedules ----


CASES = [  # fields, and the values at steps 0 to 12 of 12, three per epoch
    ({"warmup_epochs": 2, "warmup": "linear"}, [1, 11 / 12, 10 / 12, 9 / 12, 8 / 12, 7 / 12, *[0.5] * 7]),
    ({"warmup_epochs": 1, "warmup": "cosine"}, [1, 0.875, 0.625, *[0.5] * 10]),
    ({"schedule": "linear"}, [0.5 - i / 24 for i in range(13)]),
    ({"schedule": "cosine", "final": 0.9}, [0.7 - 0.2 * math.cos(math.pi * i / 12) for i in range(13)]),
    (
        {"warmup_epochs": 2, "warmup_start": 0.2, "warmup": "linear", "schedule": "linear", "final": 0.2},
        [*(0.2 + 0.3 * i / 6 for i in range(6)), *(0.5 - 0.3 * i / 6 for i in range(7))],
    ),
]


def plan(**fields) -> Plan:
    of_small = {"processes": 1, "accumulated": 1, "batch_size": 8, "lr": 0.1, "steps": 12, "steps_per_epoch": 3}
    return Plan(**{**of_small, **fields})


@pytest.mark.parametrize(("fields", "expected"), CASES)
@pytest.mark.parametrize("name", model_params.SCHEDULED)
def test_values_of_a_schedule(name, fields, expected):
    fields = {"warmup_start": 1.0, "final": 0.0 if name == "sce_coefficient" else 1e-4, **fields}
    p = SCEParams(**{name: 0.5}, **{f"{name}_{part}": value for part, value in fields.items()})
    found = [moco.scheduled(p, step, plan()) for step in range(13)]
    assert all(one.keys() == {name} for one in found)
    assert [one[name] for one in found] == pytest.approx(expected, abs=2e-4 if name == "sce_target_T" else 1e-12)


def test_without_a_schedule_nothing_changes_and_no_length_is_asked_for():
    assert moco.scheduled(SCEVideoParams(), 7, None) == {}
    assert moco.scheduled(SCEParams(sce_coefficient_final=0.3), 7, None) == {}


def test_curves_meet_their_ends():
    for warmup in ("linear", "cosine"):
        for then in ("linear", "cosine"):
            values = [schedules.warmup_then(step, 10, 4, 3.0, 1.0, 2.0, warmup, then) for step in (0, 4, 10, 99)]
            assert values == [3.0, 1.0, 2.0, 2.0]


CHANGING = {
    "sce_coefficient_warmup_epochs": 1, "sce_coefficient_schedule": "cosine", "sce_target_T_warmup_epochs": 2,
    "sce_target_T_warmup_start": 0.1,
}  # fmt: skip


class Stop(pl.Callback):
    """Callback that saves after some steps and interrupts the training."""

    def __init__(self, after: int):
        self.after = after

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.after:
            trainer.save_checkpoint("stopped.ckpt")
            raise KeyboardInterrupt


class Logged(pl.Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *_):
        self.rows.append(tuple(trainer.callback_metrics[name].item() for name in model_params.SCHEDULED))


def test_the_loss_gets_what_is_logged_and_a_resumed_run_goes_on_with_it(trainer, monkeypatch):
    used, original = [], losses.sce

    def spy(sim, key_sim, temperature, target_temperature, coefficient):
        used.append((coefficient, target_temperature))
        return original(sim, key_sim, temperature, target_temperature, coefficient)

    monkeypatch.setattr(losses, "sce", spy)
    logged = Logged()

    def fit(*callbacks, **options):
        length = {"max_epochs": 4, "limit_train_batches": 3, "log_every_n_steps": 1}
        trainer(callbacks=list(callbacks), **length).fit(small_method(**CHANGING), **options)

    fit(logged)
    expected = [moco.scheduled(SCEParams(**CHANGING), step, plan()) for step in range(12)]
    expected = [tuple(row[name] for name in model_params.SCHEDULED) for row in expected]
    assert used[::2] == used[1::2] == expected and expected[0] == (1.0, 0.1) and expected[3][0] == 0.5
    assert np.allclose(logged.rows, expected, rtol=1e-6)
    with pytest.raises(SystemExit):
        fit(Stop(4))
    used.clear()
    fit(ckpt_path="stopped.ckpt")
    assert used[::2] == expected[4:]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sce_target_T_schedule": "linear"}, "sce_target_T_schedule='linear' .* sce_target_T_final"),
        ({"sce_target_T_warmup_epochs": 5}, "sce_target_T_warmup_epochs=5 .* sce_target_T_warmup_start"),
        ({"sce_coefficient_warmup": "constant"}, "sce_coefficient_warmup='constant' is unknown"),
        ({"sce_coefficient_final": 1.5}, "sce_coefficient_final=1.5 must be"),
        ({"loss_type": "ce", "sce_coefficient_schedule": "cosine"}, "sce_coefficient_schedule='cosine' .*'sce'"),
        ({"projection_mlp_hidden_dims": [8, 8]}, r"projection_mlp_hidden_dims=\[8, 8\] .*projection_mlp_layers=2"),
        ({"prediction_mlp_hidden_dims": [8]}, r"prediction_mlp_hidden_dims=\[8\] .*prediction_mlp_layers=0"),
        ({"projection_mlp_hidden_dims": [8.5]}, "projection_mlp_hidden_dims=8.5 must be a whole number"),
        ({"mlp_normalization": "gn", "projection_mlp_hidden_dims": [40]}, "projection_mlp_hidden_dims=40 .*group norm"),
        ({"projection_mlp_last_normalization": "gn", "dim": 33}, "dim=33 does not fit group norm"),
        ({"projection_mlp_last_normalization": "bn", "mlp_normalization": None, "batch_size": 1}, "batch_size=1"),
        (
            {"use_lagging_model": False, "use_negative_examples_from_same_view": True},
            "from_same_view=True: loss_type='sce'",
        ),
        ({"mlp_normalization": "br", "batch_size": 1}, "batch_size=1 is too small for mlp_normalization='br'"),
    ],
)
def test_refused_at_construction(fields, message):
    with pytest.raises(ValueError, match=message):
        SCEParams(**fields)


def test_a_checkpoint_of_a_setting_that_is_refused_now_loads(small, trainer, tmp_path):
    fit = trainer()
    fit.strategy.connect(SelfSupervisedMethod(small("sce", use_lagging_model=False)))
    fit.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt", weights_only=True)
    content["hyper_parameters"]["use_negative_examples_from_same_view"] = True
    torch.save(content, tmp_path / "earlier.ckpt")
    loaded = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "earlier.ckpt")
    assert loaded.params.use_negative_examples_from_same_view is False


# ---- Heads ----


def same_weights(ours: nn.Module, reference: nn.Sequential) -> nn.Sequential:
    reference.load_state_dict({key.removeprefix("net."): value for key, value in ours.state_dict().items()})
    return reference


def test_the_heads_of_the_video_preset_equal_those_built_by_hand():
    """Projector and predictor of eztorch's configuration for an encoder of width 512, layer by layer."""
    p = SCEVideoParams()
    projector = MLP(512, output_dim=p.dim, **p.head("projection"))
    predictor = MLP(p.dim, output_dim=p.dim, **p.head("prediction"))
    count = [sum(weight.numel() for weight in head.parameters()) for head in (projector, predictor)]
    assert count == [512 * 1024 + 1024 * 1024 + 1024 * 256 + 2 * 2 * 1024, 256 * 1024 + 1024 * 256 + 2 * 1024]

    def hidden(width: int) -> list[nn.Module]:
        return [nn.Linear(width, 1024, bias=False), nn.BatchNorm1d(1024), nn.ReLU()]

    last = [nn.Linear(1024, 256, bias=False), nn.BatchNorm1d(256, affine=False)]
    by_hand = [nn.Sequential(*hidden(512), *hidden(1024), *last), nn.Sequential(*hidden(256), last[0])]
    for head, reference in zip((projector, predictor), by_hand, strict=True):
        reference, x = same_weights(head, reference), torch.randn(7, reference[0].in_features)
        assert torch.equal(head(x), reference(x))


def test_widths_biases_and_normalizations_of_each_head():
    p = ModelParams(
        projection_mlp_layers=3, projection_mlp_hidden_dims=[8, 6], prediction_mlp_layers=2, mlp_hidden_dim=10,
        mlp_normalization="bn", prediction_mlp_normalization="ln", projection_mlp_last_normalization="same",
        prediction_mlp_last_normalization="same", prediction_mlp_last_bias=False, mlp_bias=False, dim=4,
    )  # fmt: skip
    projection = MLP(5, output_dim=4, **p.head("projection"))
    prediction = MLP(4, output_dim=4, **p.head("prediction"))
    first = [nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU()]
    second = [nn.Linear(8, 6, bias=False), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)]
    x = torch.randn(7, 5)
    assert torch.equal(projection(x), same_weights(projection, nn.Sequential(*first, *second))(x))
    only = [nn.Linear(4, 10, bias=False), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 4, bias=False), nn.LayerNorm(4)]
    x = torch.randn(7, 4)
    assert torch.equal(prediction(x), same_weights(prediction, nn.Sequential(*only))(x))


@pytest.mark.parametrize("kind", NORMALIZATIONS)
def test_a_last_normalization_without_affine_has_no_parameters_and_normalizes(kind):
    head = MLP(6, 64, 64, 1, last_normalization=kind, last_affine=False)
    assert list(dict(head.named_parameters())) == ["net.0.weight", "net.0.bias"]
    z, axis = head(torch.randn(50, 6) * 1000), 0 if kind in ("bn", "br") else 1
    groups = z.view(50, 32, 2) if kind == "gn" else z
    axis = 2 if kind == "gn" else axis
    assert torch.allclose(groups.mean(axis), torch.zeros(()), atol=1e-3)
    assert torch.allclose(groups.var(axis, correction=0), torch.ones(()), atol=0.01)


@pytest.mark.parametrize("normalization", [None, "bn"])
def test_heads_of_the_defaults_are_the_old_ones_to_the_bit(normalization):
    torch.manual_seed(3)
    norm = [nn.BatchNorm1d(12)] if normalization else []
    reference = nn.Sequential(nn.Linear(7, 12), *norm, nn.ReLU(), nn.Linear(12, 5))
    p = ModelParams(mlp_hidden_dim=12, dim=5, mlp_normalization=normalization)
    torch.manual_seed(3)
    ours = MLP(7, output_dim=5, **p.head("projection")).state_dict()
    assert list(ours) == [f"net.{key}" for key in reference.state_dict()]
    assert all(torch.equal(ours[f"net.{key}"], value) for key, value in reference.state_dict().items())
    assert not MLP(5, output_dim=5, **p.head("prediction")).state_dict()


# ---- Shuffled split batch norm on one process ----


@pytest.mark.parametrize("of_clips", [True, False])
def test_keys_are_normalized_in_shuffled_parts(of_clips, monkeypatch):
    """There are as many parts as simulated devices, each with its own batch statistics; keys return to their places."""
    shape = (3, 4, 5, 5) if of_clips else (3, 5, 5)
    norm = (nn.BatchNorm3d if of_clips else nn.BatchNorm2d)(3, affine=False)
    x, parts = torch.randn(12, *shape), []

    def encode(part):
        parts.append(part)
        return norm(part).flatten(1)

    keys = shuffled(encode, x, (1, 2), n_virtual_devices=4)
    position = [[next(i for i in range(12) if torch.equal(x[i], one)) for one in part] for part in parts]
    assert [len(part) for part in parts] == [3] * 4 and sorted(sum(position, [])) == list(range(12))
    assert position != [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    for part in position:
        images = x[part].double()
        axes = [axis for axis in range(x.dim()) if axis != 1]
        mean, variance = images.mean(axes, keepdim=True), images.var(axes, correction=0, keepdim=True)
        assert torch.allclose(keys[part].double(), ((images - mean) / (variance + 1e-5).sqrt()).flatten(1), atol=1e-5)


# ---- Preset for videos ----


SEED = [  # configuration of eztorch's guide: its name and value, and the field and value in this repository
    ("datamodule.decoder", "frame", "video_decoder", "frames"),
    ("decoder_args.fps", 30, "frames_per_second", 30),
    ("frame_filter.num_samples (uniform)", 8, "num_frames", 8),
    ("decoder_args.time_difference_prob", 0.2, "transform_time_difference_probability", 0.2),
    ("decoder_args.num_threads_decode", 4, "decoding_threads", 4),
    ("RandomResizedCrop.target_height", 224, "crop_size", 224),
    ("RandomMultiClipSampler.num_clips", 2, "n_views", 2),
    ("clip_sampler.clip_duration", 2.56, "clip_duration", 2.56),
    ("clip_sampler.speeds", [1], "clip_speeds", [1]),
    ("clip_sampler.jitter_factor", 0, "clip_jitter", 0),
    ("loader.drop_last", True, "drop_last_batch", True),
    ("loader.num_workers", 5, "num_data_workers", 5),
    ("loader.pin_memory", True, "pin_data_memory", True),
    ("train.global_batch_size", 512, "global_batch_size", 512),
    ("trunk.model", "create_resnet3d_basic, depth 18", "encoder_arch", "r3d_18"),
    ("projector.num_layers", 3, "projection_mlp_layers", 3),
    ("projector.hidden_dims", [1024, 1024], "mlp_hidden_dim", 1024),
    ("projector.bias, predictor.bias", False, "mlp_bias", False),
    ("projector.norm_layer, predictor.norm_layer", "bn_1D", "mlp_normalization", "bn"),
    ("predictor.norm_layer", "bn_1D", "prediction_mlp_normalization", "same"),
    ("projector.last_bias", False, "projection_mlp_last_bias", False),
    ("projector.last_norm", True, "projection_mlp_last_normalization", "same"),
    ("projector.last_affine, predictor.last_affine", False, "mlp_last_affine", False),
    ("projector.output_dim, queue.feature_dim", 256, "dim", 256),
    ("predictor.num_layers", 2, "prediction_mlp_layers", 2),
    ("predictor.last_bias", False, "prediction_mlp_last_bias", False),
    ("predictor.last_norm", False, "prediction_mlp_last_normalization", None),
    ("model.coeff", 0.5, "sce_coefficient", 0.5),
    ("model.warmup_epoch_coeff", 0, "sce_coefficient_warmup_epochs", 0),
    ("model.start_warmup_coeff", 1.0, "sce_coefficient_warmup_start", 1.0),
    ("model.warmup_scheduler_coeff", "linear", "sce_coefficient_warmup", "linear"),
    ("model.scheduler_coeff", None, "sce_coefficient_schedule", "constant"),
    ("model.final_scheduler_coeff", 0.0, "sce_coefficient_final", 0.0),
    ("model.temp", 0.1, "T", 0.1),
    ("model.temp_m", 0.05, "sce_target_T", 0.05),
    ("model.warmup_epoch_temp_m", 0, "sce_target_T_warmup_epochs", 0),
    ("model.warmup_scheduler_temp_m", "cosine", "sce_target_T_warmup", "cosine"),
    ("model.initial_momentum", 0.99, "m", 0.99),
    ("model.scheduler_momentum", "cosine", "use_momentum_schedule", True),
    ("model.normalize_outputs", True, "use_unit_sphere_projection", True),
    ("model.num_global_crops", 2, "n_large_views", 2),
    ("model.num_local_crops", 0, "n_small_views", 0),
    ("model.queue.size", 32768, "K", 32768),
    ("model.queue", "given", "use_negative_examples_from_queue", True),
    ("model.use_keys", False, "use_negative_examples_from_batch", False),
    ("model.simulate_n_devices", 8, "n_virtual_devices", 8),
    ("model.shuffle_bn", False, "shuffle_batch_norm", False),
    ("model.sym", True, "use_both_augmentations_as_queries", True),
    ("model.sym: the mean over both directions", 0.5, "loss_constant_factor", 0.5),
    ("optimizer.name", "lars", "optimizer_name", "lars"),
    ("optimizer.momentum", 0.9, "momentum", 0.9),
    ("optimizer.trust_coefficient", 0.001, "lars_eta", 0.001),
    ("optimizer.weight_decay", 1e-6, "weight_decay", 1e-6),
    ("lars: parameters of one axis", "neither decay nor scaling", "exclude_matching_parameters_from_lars",
     NORMS_AND_BIASES),
    ("optimizer.initial_lr", 2.4, "lr", 2.4),
    ("optimizer.layer_decay_lr", None, "layer_decay", 1),
    ("optimizer.scaler", "linear", "lr_scaling", "linear"),
    ("optimizer.scaler: initial_lr is meant for", 256, "lr_batch_size", 256),
    ("scheduler.name", "linear_warmup_cosine_annealing_lr", "lr_schedule", "cosine"),
    ("scheduler.max_epochs, trainer.max_epochs", 200, "max_epochs", 200),
    ("scheduler.warmup_epochs", 35, "warmup_epochs", 35),
    ("scheduler.warmup_start_lr", 0.0, "warmup_start_lr", 0.0),
    ("scheduler.eta_min", 0.0, "final_lr_schedule_value", 0.0),
    ("Normalize.mean", [0.45] * 3, "mean", (0.45,) * 3),
    ("Normalize.std", [0.225] * 3, "std", (0.225,) * 3),
]  # fmt: skip
SEED_VIEWS = {  # one value for both views, or a list with one per view
    "crop_scale": (0.2, 0.766), "crop_ratio": (0.75, 1.3333), "jitter_probability": 0.8, "brightness": 0.8,
    "contrast": 0.8, "saturation": 0.4, "hue": 0.2, "grayscale_probability": 0.2, "blur_probability": [1.0, 0.1],
    "blur_sigma": (0.1, 2.0), "solarize_probability": [0.0, 0.2], "solarize_threshold": 0.5, "flip_probability": 0.5,
    "time_difference_probability": 0.2, "crop_size": 224, "vertical_flip_probability": 0.0, "rotation_probability": 0.0,
}  # fmt: skip
SEED_TRAINER = {"precision": "16-mixed", "sync_batchnorm": True, "save_every_n_epochs": 100, "strategy": "ddp"}


@pytest.mark.parametrize(("there", "value", "field", "expected"), SEED, ids=[row[0] for row in SEED])
def test_the_preset_has_the_seeds_value(there, value, field, expected):
    assert getattr(SCEVideoParams(), field) == expected


def test_the_preset_has_the_seeds_views_and_hidden_layers():
    p = SCEVideoParams()
    assert p.head("projection")["hidden_dim"] == [1024, 1024] and p.head("prediction")["hidden_dim"] == [1024]
    assert SEED_VIEWS.keys() == {field.name for field in attrs.fields(type(p.views[0]))}
    for i, view in enumerate(p.views):
        expected = {name: value[i] if isinstance(value, list) else value for name, value in SEED_VIEWS.items()}
        assert attrs.asdict(view) == expected


def test_the_seeds_blur_of_23_pixels_is_that_of_13():
    """Beyond 13 pixels, the kernel at the largest sigma changes no pixel by more than about half a gray level."""
    weights = np.exp(-0.5 * (np.arange(-11, 12) / 2.0) ** 2)
    beyond = 1 - weights[11 - catalogue.BLUR_RADIUS : 12 + catalogue.BLUR_RADIUS].sum() / weights.sum()
    assert 2 * beyond < 0.53 / 255  # along both axes


def test_the_command_line_has_the_seeds_trainer():
    line = "sce_video --precision 16-mixed --sync_batchnorm --save_every_n_epochs 100 --strategy ddp --seed 42"
    _, options, params = command_line.parse(line.split())
    assert {name: getattr(options, name) for name in SEED_TRAINER} == SEED_TRAINER
    assert params == SCEVideoParams(seed=42)


def test_the_optimizer_gets_4_8_at_a_global_batch_of_512(trainer):
    """eztorch's linear rule is initial_lr * batch_size / 256. Vectors have no weight decay and no adaptation."""
    p = SCEVideoParams(**{**SMALL, "global_batch_size": 512})
    method = SelfSupervisedMethod(p, encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6)))
    images = torch.randint(256, (1024, 1, 8, 8), dtype=torch.uint8)
    fit = trainer(max_epochs=200, max_steps=-1, callbacks=[StopAfterOneStep()])
    fit.fit(method, DataLoader(images, batch_size=512))
    assert method.plan.steps == 400 and method.plan.warmup_steps == 70 and method.plan.global_batch_size == 512
    optimizer, scheduler = fit.optimizers[0], fit.lr_scheduler_configs[0].scheduler
    rates = [optimizer.param_groups[0]["initial_lr"] * scheduler.lr_lambdas[0](step) for step in (0, 69, 70, 235, 400)]
    assert rates == pytest.approx([4.8 / 70, 4.8, 4.8, 2.4, 0.0], abs=1e-12)
    for group in optimizer.param_groups:
        assert group["initial_lr"] == 4.8 and group["eta"] == 0.001 and group["momentum"] == 0.9
        many_axes = {weight.ndim > 1 for weight in group["params"]}
        assert many_axes == {group["adapt"]} and group["weight_decay"] == (1e-6 if group["adapt"] else 0.0)


class StopAfterOneStep(pl.Callback):
    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = True


# ---- Training on videos ----


def write_lists(folder, n_classes_listed: int, n_videos: int) -> None:
    """Write train.csv and val.csv, with a line `path label` for each video."""
    for split in ("train", "val"):
        lines = [f"v{i}.mp4 {i * n_classes_listed // n_videos}" for i in range(n_videos)]
        (folder / "kinetics").mkdir(exist_ok=True)
        (folder / "kinetics" / f"{split}.csv").write_text("\n".join(lines))


@pytest.mark.parametrize("n", [200, 400])
def test_classes_of_kinetics_are_counted_where_it_is_on_disk(n, tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    assert n_classes(SCEVideoParams()) == DATASETS["kinetics"].n_classes == 400
    write_lists(tmp_path, n, 800)
    assert n_classes(SCEVideoParams()) == n


def clip_encoder() -> nn.Module:
    """Return an encoder [N, 3, T, H, W] -> [N, 8]."""
    layers = nn.Conv3d(3, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool3d(1), nn.Flatten())


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # Lightning's, of the frozen encoder
@pytest.mark.filterwarnings("ignore:the warm-up of 35 epochs is longer")
def test_the_preset_trains_on_lists_of_folders_of_frames(tmp_path, monkeypatch, trainer):
    """Uses few small frames, four videos of two classes, and a small encoder: 33 million weights would take long."""
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    write_lists(tmp_path, 2, 4)
    for split in ("train", "val"):
        for i in range(4):
            videos.write_frames(tmp_path / "kinetics" / split / f"v{i}", n=12)
    small = {"transform_crop_size": 16, "num_frames": 2, "global_batch_size": 2, "num_data_workers": 0, "K": 6}
    p = SCEVideoParams(**small, encoder_arch="module", online_classifier=True, evaluations=["knn"])
    method = SelfSupervisedMethod(p, encoder=clip_encoder())
    before = {name: weight.clone() for name, weight in method.named_parameters()}
    fit = trainer()
    fit.fit(method)
    assert fit.global_step == 2 and method.queue.position == 2  # eight keys in six slots
    assert method.online_classifier.out_features == 2 and fit.callback_metrics["step_train_loss"].isfinite()
    assert all(
        not torch.equal(weight, before[name]) for name, weight in method.named_parameters() if weight.requires_grad
    )
    fit.save_checkpoint("a.ckpt")
    linear = LinearClassifierMethod.from_moco_checkpoint("a.ckpt", encoder=clip_encoder(), batch_size=2)
    fit = trainer()
    fit.fit(linear)
    fit.save_checkpoint("linear.ckpt")
    monkeypatch.setenv("DATA_PATH", str(tmp_path / "elsewhere"))
    again = LinearClassifierMethod.load_from_checkpoint("linear.ckpt", encoder=clip_encoder())
    assert again.classifier.out_features == 2
