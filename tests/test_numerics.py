"""Features of any scale have their scores; what is not finite is refused; a device may lack float64."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised import losses
from self_supervised.embeddings import nearest
from self_supervised.embeddings import projection as embedding_map
from self_supervised.evaluation import label_free, linear_models, probes, results, validation
from self_supervised.evaluation.features import EvaluationData
from self_supervised.networks.pretrained import load_encoder
from self_supervised.numerics import finite, not_finite, on_scoring_device, unit
from self_supervised.report import compare
from self_supervised.safe_files import to_json
from self_supervised.training import checkpoints, milestones

CLASSES = 4
MEASURES = {  # of (train features, labels, test features, labels)
    "linear_probe": validation.linear_probe,
    "linear_probe by torch": lambda *sets: validation.linear_probe(*sets, solver="torch"),
    "knn": validation.knn,
    "rank_me": validation.rank_me,
    "embedding_std": validation.embedding_std,
    "retrieval": probes.retrieval,
    "linear": probes.linear,
    "svm": linear_models.svm,
    "few_labels": probes.few_labels,
    "low_shot_svm": probes.low_shot_svm,
    "alpha_req": lambda x, *_: label_free.alpha_req(x),
    "uniformity": lambda x, *_: label_free.uniformity(x),
    "alignment": lambda x, *_: label_free.alignment(x.unflatten(0, (-1, 2))),
    "lidar": lambda x, *_: label_free.lidar(x.unflatten(0, (-1, 2)), delta=0),
}


@pytest.fixture
def sets() -> tuple[torch.Tensor, ...]:
    y = torch.arange(200) % CLASSES
    x = torch.randn(200, 16) + 2 * F.one_hot(y, 16)
    return x[:120], y[:120], x[120:], y[120:]


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    for name, value in {"FEW_LABELS": (5,), "VOC_SHOTS": (4,), "VOC_DRAWS": 1, "FEW_DRAWS": 1}.items():
        monkeypatch.setattr(probes, name, value)


# ---- scale ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unit_vectors_have_the_bits_of_pytorchs_normalize(dtype):
    for scale in (1e-9, 0.7, 1e9):
        x, gradient = scale * torch.randn(50, 33, dtype=dtype), torch.randn(50, 33, dtype=dtype)
        x.requires_grad_()
        found, expected = unit(x), F.normalize(x, dim=1)
        assert torch.equal(found, expected)
        assert torch.equal(*(torch.autograd.grad(y, x, gradient)[0] for y in (found, expected)))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1e19, 1e30, 3e38])
def test_unit_vectors_of_any_scale_have_length_one(scale):
    x = torch.rand(20, 5) * scale
    torch.testing.assert_close(unit(x).norm(dim=1), torch.ones(20))
    assert np.allclose(np.linalg.norm(embedding_map.unit_rows(x.numpy()), axis=1), 1)
    assert torch.equal(unit(torch.zeros(2, 3)), torch.zeros(2, 3))


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_scores_do_not_depend_on_the_scale(name, sets):
    measure, (x, y, test_x, test_y) = MEASURES[name], sets
    expected = measure(*sets)
    for scale in (1e-30, 1e-20, 1e20, 1e35):
        found = measure(x * scale, y, test_x * scale, test_y)
        assert found == pytest.approx(expected, rel=1e-3, abs=2.6)  # 2 of 80 images


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
def test_scores_of_features_on_a_device_without_float64_are_those_on_the_host(name, sets):
    """As evaluations hand them over."""
    data = SimpleNamespace(encoder=SimpleNamespace(device="cpu"))
    handed_over = EvaluationData.on_device(data, *(part.as_subclass(WithoutFloat64) for part in sets))
    assert MEASURES[name](*handed_over) == pytest.approx(MEASURES[name](*sets), rel=1e-5)


def test_a_device_without_float64_is_left_for_the_host():
    x = torch.ones(2)
    with pytest.raises(TypeError, match="Cannot convert a MPS Tensor"):
        x.as_subclass(WithoutFloat64).double()
    assert on_scoring_device(x.as_subclass(WithoutFloat64)).double().dtype is torch.float64
    assert on_scoring_device(x) is x and on_scoring_device(None) is None


@pytest.mark.parametrize("scale", [1e-20, 1e30])
def test_the_monitor_does_not_call_large_or_small_projections_collapsed(scale):
    z, k = torch.randn(2, 64, 8)
    found, expected = losses.cosines(z * scale, k * scale), losses.cosines(z, k)
    assert {name: float(value) for name, value in found.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, abs=1e-5
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_maps_and_neighbors_of_any_scale(scale):
    x = np.random.default_rng(0).normal(size=(60, 8)).astype(np.float32)
    scaled = x * np.float32(scale)
    assert np.isfinite(embedding_map.project(scaled, "tsne", seed=0)).all()
    paths = [str(i) for i in range(60)]
    found, expected = (nearest.best_of([(paths, some, [None] * 60)], some[:3], k=5) for some in (scaled, x))
    assert [[n.path for n in row] for row in found] == [[n.path for n in row] for row in expected]


def test_a_map_of_one_direction_is_refused():
    with pytest.raises(ValueError, match="at least 4 different directions"):
        embedding_map.project(np.arange(1, 9, dtype=np.float32)[:, None] * np.ones(3, np.float32), "tsne", seed=0)


# ---- what is not finite ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", MEASURES)
def test_features_that_are_not_finite_are_refused_by_every_measure(name, value, sets):
    sets[0][3, 2] = value
    with pytest.raises(ValueError, match="1 of .* not finite"):
        MEASURES[name](*sets)


def test_the_sentence_names_the_rows():
    x = torch.zeros(5, 2, 3)
    x[1, 1, 0] = x[4] = math.nan
    with pytest.raises(ValueError, match=r"views: 2 of 5 rows .* \(the first: b\)"):
        finite(x, "views", names="abcde")
    with pytest.raises(ValueError, match="not finite"):
        nearest.best_of([(["a"], np.float32([[math.nan]]), [None])], np.ones((1, 1), np.float32), k=1)
    with pytest.raises(ValueError, match="not finite"):
        embedding_map.project(np.full((9, 2), np.inf, np.float32), "tsne", seed=0)


class Overflows(nn.Module):
    """[N, 1, 8, 8] -> [N, 6]; in eval mode all is infinite, as by running statistics of a young network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))

    def forward(self, x):
        return self.net(x) if self.training else self.net(x) * math.inf


@pytest.mark.parametrize("fitted_on", [False, True])
def test_a_training_goes_on_where_embeddings_are_not_finite(fitted_on, small, trainer):
    params = small(probe_on_training_set=fitted_on)
    model = SelfSupervisedMethod(params, encoder=Overflows())
    fit = trainer(max_epochs=2, limit_val_batches=1.0, callbacks=[best := milestones.Best(".", "valid_rank_me")])
    fit.fit(model)
    names = ("valid_class_acc", "valid_knn20_acc", "train_class_acc")
    expected = {f"{name}_trainset" if fitted_on else name for name in names} | {"valid_rank_me", "valid_embedding_std"}
    found = {name: float(value) for name, value in fit.callback_metrics.items()}
    assert expected <= set(found) and all(math.isnan(found[name]) for name in expected)
    assert best.best is None and not best.path.exists()


def test_nan_is_never_the_best(tmp_path):
    best, saved = milestones.Best(tmp_path, "valid_loss"), []
    best.load_state_dict({"best": math.nan})  # of an earlier version
    module = SimpleNamespace(params=SimpleNamespace(evaluate_every_n_epochs=1))
    for epoch, value in enumerate((math.nan, -math.inf, 3.0, math.nan, 2.0, 2.5)):
        trainer = SimpleNamespace(
            callback_metrics={"valid_loss": torch.tensor(value)},
            current_epoch=epoch,
            fast_dev_run=False,
            save_checkpoint=lambda *_, epoch=epoch, **__: saved.append(epoch),
        )
        best.on_train_epoch_end(trainer, module)
    assert saved == [2, 4] and best.state_dict() == {"best": 2.0}


def test_json_has_null_in_place_of_nan(tmp_path):
    text = to_json({"a": [1.5, math.nan, (math.inf, np.float64("nan"))]})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [1.5, None, [None, None]]}
    assert math.isnan(results.deviation([1.0, math.nan])) and results.deviation([1.0, 3.0]) == pytest.approx(2**0.5)


def test_comparing_runs_passes_over_nan(tmp_path):
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "results.json").write_text('{"trained encoder": {"valid_rank_me": null}, "epochs": 3}')
    rows = "step,valid_rank_me,valid_loss\n0,nan,nan\n1,3.0,nan\n2,2.0,nan\n"
    (tmp_path / "pretraining" / "metrics.csv").write_text(rows)
    found = compare.results_of_run(tmp_path)
    assert math.isnan(found["trained encoder: valid_rank_me"]) and found["best valid_rank_me"] == 3.0
    assert math.isnan(found["best valid_loss"]) and compare.score_text([math.nan, 1.0]).startswith("nan")


# ---- weights ----


def test_masks_may_be_infinite_and_weights_may_not():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    module.register_buffer("number", torch.tensor(3))
    assert not_finite(module) == []
    module.mask[0] = math.nan
    module[0].bias.data[1] = math.inf
    module[1].running_var[0] = math.inf
    assert sorted(not_finite(module)) == ["0.bias", "1.running_var", "mask"]


@pytest.mark.parametrize("name", ["model.0.weight", "model.16.running_var"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(name, value, small, trainer, tmp_path):
    path, params = tmp_path / "bad.ckpt", small(evaluations=[])
    fit = trainer()
    fit.fit(SelfSupervisedMethod(params))
    fit.save_checkpoint(path)
    content = checkpoints.read_checkpoint(path)
    content["state_dict"][name].view(-1)[0] = value
    torch.save(content, path)
    for read in (
        lambda: load_encoder(path),
        lambda: LinearClassifierMethod.from_moco_checkpoint(path),
        lambda: SelfSupervisedMethod(small(encoder_weights=str(path))),
        lambda: trainer(max_epochs=2).fit(SelfSupervisedMethod(params), ckpt_path=path),
    ):
        with pytest.raises(ValueError, match=f"not finite .*{name.removeprefix('model.')}"):
            read()


# ---- devices ----


class WithoutFloat64(torch.Tensor):
    """Says that it is on MPS, and refuses float64 as there."""

    @property
    def device(self):
        return torch.device("mps")

    def cpu(self):
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        values = (*args[1:], *(kwargs or {}).values())
        if function is torch.Tensor.double or any(value is torch.float64 for value in values):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return super().__torch_function__(function, types, args, kwargs or {})
