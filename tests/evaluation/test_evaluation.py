import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from moco import SelfSupervisedMethod
from self_supervised import catalogue
from self_supervised.evaluation import linear_models, validation


@pytest.fixture
def blobs():
    """Return (x, y): four overlapping classes in 12 dimensions, sorted by class."""
    y = torch.arange(4).repeat_interleave(60)
    return torch.randn(240, 12) + torch.randn(4, 12)[y] * 0.7, y


def test_halves_hold_every_class_in_proportion_even_when_sorted(blobs):
    fit_x, fit_y, score_x, score_y = validation.halves(*blobs)
    assert fit_y.bincount().tolist() == score_y.bincount().tolist() == [30] * 4
    both = torch.cat([fit_x, score_x])
    assert torch.equal(both[both[:, 0].argsort()], blobs[0][blobs[0][:, 0].argsort()])
    assert torch.equal(validation.halves(*blobs)[0], fit_x)


def test_halves_of_classes_too_small_to_stratify():
    x, y = torch.randn(5, 2), torch.tensor([0, 0, 1, 2, 3])
    assert len(validation.halves(x, y)[1]) == 2


def test_linear_probe_is_scikit_learns_pipeline(blobs):
    sets = validation.halves(*blobs)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000, tol=1e-6))
    fit_x, fit_y, score_x, score_y = (part.numpy() for part in sets)
    reference.fit(fit_x, fit_y)
    found = validation.linear_probe(*sets)
    assert found["valid_class_acc"] == pytest.approx(100 * reference.score(score_x, score_y), abs=1)
    assert found["train_class_acc"] == pytest.approx(100 * reference.score(fit_x, fit_y), abs=1)
    assert found["valid_class_acc"] > 50


@pytest.mark.parametrize("solver", validation.SOLVERS)
@pytest.mark.parametrize("n, width, n_classes", [(400, 30, 2), (900, 40, 7), (60, 200, 4)])
def test_linear_probe_finds_scikit_learns_optimum(n, width, n_classes, solver):
    """With two or many classes, and more features than images; labels have gaps; in Lightning's inference mode."""
    y = torch.randint(n_classes, (n,)) * 3 - 1
    x = torch.randn(n, width) + torch.randn(n_classes, width)[(y + 1) // 3] * 0.3
    sets = validation.halves(x, y)
    fit_x, score_x = (part.double().numpy() for part in linear_models.standardized(sets[0], sets[2]))
    reference = LogisticRegression(C=0.01, max_iter=5000, tol=1e-9).fit(fit_x, sets[1].numpy())
    with torch.inference_mode():
        found = validation.linear_probe(*sets, solver=solver)
    assert found["train_class_acc"] == pytest.approx(100 * reference.score(fit_x, sets[1].numpy()), abs=0.6)
    assert found["valid_class_acc"] == pytest.approx(100 * reference.score(score_x, sets[3].numpy()), abs=0.6)


def test_both_solvers_of_the_probe_give_the_same_accuracy():
    """On features like those of an encoder, whose directions have very different scales."""
    y = torch.randint(10, (4000,))
    x = (torch.randn(4000, 40) + torch.randn(10, 40)[y] * 0.4) / torch.arange(1, 41).sqrt()
    x = (x @ torch.randn(40, 100) + 0.2 * torch.randn(4000, 100)).relu()
    by_sklearn, by_torch = (validation.epoch_scores(["linear_probe"], x, y, None, s) for s in ("sklearn", "torch"))
    assert by_sklearn == pytest.approx(by_torch, abs=0.2) and 40 < by_torch["valid_class_acc"] < 95


def test_validation_fits_scikit_learns_probe_unless_the_field_says_otherwise(small, trainer, monkeypatch):
    asked = []
    for name, solve in validation.SOLVERS.items():
        counted = lambda *sets, name=name, solve=solve: asked.append(name) or solve(*sets)  # noqa: E731
        monkeypatch.setitem(validation.SOLVERS, name, counted)
    for settings in ({}, {"probe_solver": "torch"}):
        model = SelfSupervisedMethod(small(evaluations=["linear_probe"], evaluate_every_n_epochs=2, **settings))
        trainer(max_epochs=3).fit(model)
    # at the start, after the second of three epochs, and at the end
    assert asked == ["sklearn"] * 3 + ["torch"] * 3
    with pytest.raises(ValueError, match="probe_solver='numpy'"):
        small(probe_solver="numpy")


def test_a_slow_probe_names_the_solver_for_gpus(blobs, monkeypatch, caplog):
    for seconds, device, said in ((95.2, "cuda:0", True), (95.2, "cpu", False), (3.0, "cuda:0", False)):
        caplog.clear()
        validation.report_slow_probe(seconds, torch.device(device))
        assert ("took 95 s on one CPU core. Set probe_solver='torch'" in caplog.text) == said
    measured = []
    monkeypatch.setattr(validation, "report_slow_probe", lambda *of: measured.append(of))
    validation.epoch_scores(["linear_probe"], *blobs)
    ((seconds, device),) = measured
    assert 0 < seconds < 60 and device == blobs[0].device


def test_logistic_regression_has_scikit_learns_weights():
    y = torch.randint(5, (500,))
    x = linear_models.standardized(torch.randn(500, 30) + torch.randn(5, 30)[y] * 0.3, torch.zeros(1, 30))[0]
    reference = LogisticRegression(C=0.01, max_iter=5000, tol=1e-9).fit(x.double().numpy(), y.numpy())
    weight, bias = (part.double() for part in linear_models.logistic_regression(x, y, decay=100.0))
    expected = torch.from_numpy(reference.coef_.T), torch.from_numpy(reference.intercept_)
    assert (weight - expected[0]).norm() < 0.01 * expected[0].norm()
    assert torch.allclose(bias - bias.mean(), expected[1] - expected[1].mean(), atol=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_evaluations_run_on_the_device_of_the_features(blobs):
    names = list(catalogue.EVALUATIONS)
    found = validation.epoch_scores(names, *(part.cuda() for part in blobs))
    assert found == pytest.approx(validation.epoch_scores(names, *blobs), abs=1)


def test_probes_take_bfloat16_and_dead_features(blobs):
    x = blobs[0].bfloat16()
    x[:, 3] = 2.0
    found = validation.epoch_scores(list(catalogue.EVALUATIONS), x, blobs[1])
    assert all(np.isfinite(value) for value in found.values()) and found["valid_class_acc"] > 50


def test_knn_equals_a_vote_counted_by_hand(blobs):
    sets = validation.halves(*blobs)
    fit_x, fit_y, score_x, score_y = (part.double().numpy() for part in sets)
    fit_x, score_x = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (fit_x, score_x))
    found = validation.knn(*sets, ks=(1, 7, 500))
    for k in (1, 7, 500):
        correct = 0
        for x, label in zip(score_x, score_y, strict=True):
            cosine = fit_x @ x
            votes = np.zeros(4)
            for neighbor in np.argsort(-cosine)[:k]:
                votes[int(fit_y[neighbor])] += np.exp(cosine[neighbor] / 0.07)
            correct += votes.argmax() == label
        assert found[f"valid_knn{k}_acc"] == pytest.approx(100 * correct / len(score_y))


def test_rank_me():
    x = torch.randn(50, 8)
    p = np.linalg.svd(x.double().numpy(), compute_uv=False)
    p = p / p.sum()
    assert validation.rank_me(x)["valid_rank_me"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert validation.rank_me(torch.eye(6))["valid_rank_me"] == pytest.approx(6, rel=1e-4)
    assert validation.rank_me(torch.ones(50, 8))["valid_rank_me"] == pytest.approx(1, abs=0.01)


def test_embedding_std():
    assert validation.embedding_std(torch.randn(2000, 64) * 9)["valid_embedding_std"] == pytest.approx(1, abs=0.01)
    assert validation.embedding_std(torch.ones(20, 8))["valid_embedding_std"] < 1e-3
    x = torch.randn(100, 8) + 1
    unit = x / x.norm(dim=1, keepdim=True)
    expected = (unit.var(0, correction=0).mean() * 8).sqrt()
    assert validation.embedding_std(x)["valid_embedding_std"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_labels_the_label_free_scores_remain(blobs):
    names, label_free = list(catalogue.EVALUATIONS), {"valid_rank_me", "valid_embedding_std"}
    x, y = blobs
    assert set(validation.epoch_scores(names, x, None)) == label_free
    assert set(validation.epoch_scores(names, x, torch.full_like(y, -1))) == label_free
    assert set(validation.epoch_scores(names, x, torch.zeros_like(y))) == label_free


def test_probes_leave_out_images_without_a_label(blobs):
    x, y = blobs
    known = torch.arange(len(y)) % 3 > 0
    some = torch.where(known, y, -1)
    expected = validation.epoch_scores(["knn"], x[known], y[known], train=(x[known], y[known]))
    assert validation.epoch_scores(["knn"], x, some, train=(x, some)) == expected
    assert "valid_class_acc" in validation.epoch_scores(["linear_probe"], x, some)


def test_a_class_with_one_image_raises_no_error():
    x = torch.randn(12, 3)
    for rare in range(12):
        y = torch.zeros(12, dtype=torch.long)
        y[rare] = 1
        assert "valid_rank_me" in validation.epoch_scores(list(catalogue.EVALUATIONS), x, y)


def test_the_name_says_that_the_training_set_was_used(blobs):
    half = validation.halves(*blobs)
    found = validation.epoch_scores(["linear_probe", "rank_me"], *half[2:], train=half[:2])
    assert set(found) == {"train_class_acc_trainset", "valid_class_acc_trainset", "valid_rank_me"}
    assert found["valid_class_acc_trainset"] == validation.linear_probe(*half)["valid_class_acc"]


def test_a_probe_of_8000_takes_seconds():
    import time

    y = torch.randint(10, (8000,))
    x = torch.randn(8000, 512) + torch.randn(10, 512)[y] * 0.1
    start = time.process_time()
    validation.epoch_scores(["linear_probe", "knn", "rank_me", "embedding_std"], x, y)
    assert time.process_time() - start < 20  # CPU seconds on two cores; 3 to 6 on an idle machine


def test_features_of_any_scale_are_standardized_and_constant_ones_are_not():
    x = torch.cat([torch.randn(100, 3), 0.3 + 1e-8 * torch.randn(100, 1), torch.zeros(100, 1)], 1)
    for scale in (1.0, 1e-9, 1e9):
        found, _ = linear_models.standardized(scale * x, scale * x)
        torch.testing.assert_close(found.std(0, correction=0), torch.tensor([1.0, 1, 1, 0, 0]), atol=1e-4, rtol=1e-4)
