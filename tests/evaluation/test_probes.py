"""Probes, compared with scikit-learn on the same features."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, recall_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from self_supervised.evaluation import linear_models, probes


@pytest.fixture(scope="module")
def digits():
    """(train x, y, test x, y): 96 random features of the digits, rectified like those of a network."""
    images, labels = load_digits(return_X_y=True)
    weights = np.random.default_rng(0).normal(size=(64, 96)) / 64
    x, y = torch.from_numpy(images @ weights).float().relu(), torch.from_numpy(labels)
    return x[:500], y[:500], x[500:1000], y[500:1000]


@pytest.fixture(scope="module")
def found_by_linear(digits):
    return probes.linear(*digits, seed=0)


def test_knn_is_scikit_learns(digits):
    train_x, train_y, test_x, test_y = (part.double().numpy() for part in digits)
    found = probes.knn_protocol(*digits)
    for k in probes.KS:
        reference = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = 100 * reference.fit(train_x, train_y).score(test_x, test_y)
        assert found[f"knn{k}_acc1"] == pytest.approx(expected, abs=0.41)  # ties in float32: 2 of 500 images


def test_linear_is_scikit_learns_optimum_at_the_chosen_l2(digits, found_by_linear):
    train_x, train_y, test_x, test_y = (part.double().numpy() for part in digits)
    found = found_by_linear
    scaler = StandardScaler().fit(train_x)
    reference = LogisticRegression(C=1 / found["l2"], max_iter=5000, tol=1e-8).fit(scaler.transform(train_x), train_y)
    assert found["acc1"] == pytest.approx(100 * reference.score(scaler.transform(test_x), test_y), abs=0.41)
    p = reference.predict_proba(scaler.transform(test_x))
    top5 = (np.argsort(-p, axis=1)[:, :5] == test_y[:, None]).any(1).mean()
    assert found["acc5"] == pytest.approx(100 * top5, abs=0.61)
    assert found["acc1"] > 80
    recall = recall_score(test_y, reference.predict(scaler.transform(test_x)), average=None)
    of_class = probes.linear_classes(*digits, seed=0)
    assert of_class == {number: pytest.approx(100 * recall[number], abs=2.5) for number in range(10)}  # one of 45


def test_imbalanced_test_images_have_the_mean_over_classes_too(digits, found_by_linear):
    """It is scikit-learn's balanced accuracy."""
    rng = np.random.default_rng(0)
    y = rng.choice([2, 5, 7], 300, p=[0.9, 0.07, 0.03])
    predicted = np.where(rng.random(300) < 0.7, 2, y)
    scores = probes.balanced_accuracy("mean", torch.from_numpy(predicted == y), torch.from_numpy(y))
    assert scores == {"mean": pytest.approx(100 * balanced_accuracy_score(y, predicted))}
    train_x, train_y, test_x, test_y = digits
    rows = (test_y > 2) | (torch.arange(len(test_y)) % 5 == 0)
    found_by_knn = probes.knn_protocol(*digits)
    for protocol, name, of_all in ((probes.linear, "", found_by_linear), (probes.knn_protocol, "knn20_", found_by_knn)):
        of_few = protocol(train_x, train_y, test_x[rows], test_y[rows])
        assert of_few.keys() - of_all.keys() == {f"{name}class_mean_acc1"}
        assert of_few[f"{name}class_mean_acc1"] == pytest.approx(of_few[f"{name}acc1"], abs=8)


def test_the_chosen_l2_is_the_best_on_the_held_out_part(digits):
    x, y = digits[0], digits[1]
    x = linear_models.standardized(x, x)[0]
    chosen = probes.choose_decay(x, y, seed=3)
    fit, score = probes.subsets.held_out(y.numpy(), probes.HELD_OUT, 3)

    def held_out(decay: float) -> float:
        reference = LogisticRegression(C=1 / decay, max_iter=3000, tol=1e-7).fit(x[fit].double(), y[fit])
        return reference.score(x[score].double(), y[score])

    assert held_out(chosen) >= max(held_out(10.0**i) for i in range(-2, 5)) - 0.011  # tolerance: one of 100 images


def objective(x: torch.Tensor, y: torch.Tensor, decay: float, weight: torch.Tensor, bias: torch.Tensor) -> float:
    losses = torch.nn.functional.cross_entropy(x.double() @ weight.double() + bias, y, reduction="sum")
    return float(losses + decay / 2 * weight.double().square().sum())


def optimum(x: torch.Tensor, y: torch.Tensor, decay: float) -> tuple[LogisticRegression, float]:
    """Return scikit-learn's classifier in float64, and its objective."""
    reference = LogisticRegression(C=1 / decay, max_iter=100_000, tol=1e-9).fit(x.double(), y)
    weights = torch.from_numpy(reference.coef_.T), torch.from_numpy(reference.intercept_)
    return reference, objective(x, y, decay, *weights)


@pytest.mark.parametrize("decay", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("images", [60, 400])  # fewer and more than there are features
def test_weak_l2_on_separable_classes_is_scikit_learns_optimum(digits, images, decay):
    x, test_x = linear_models.standardized(digits[0][:images], digits[2])
    y = digits[1][:images]
    logits = linear_models.linear_logits(x, test_x, y, decay, probes.PRECISION)
    reference, best = optimum(x, y, decay)
    classes = torch.arange(10)
    for part, features, labels in zip(logits, (x, test_x), (y, digits[3]), strict=True):
        expected = 100 * reference.score(features.double(), labels)
        assert linear_models.accuracy(part, classes, labels, 1) == pytest.approx(expected, abs=0.61)  # 3 of 500 images
    assert linear_models.accuracy(logits[0], classes, y, 1) == 100
    inside = linear_models.within_span(x, x)[0]
    weights = linear_models.logistic_regression(inside, y, decay, probes.PRECISION)
    assert objective(inside, y, decay, *weights) < 1.003 * best


@pytest.mark.parametrize("images", [60, 400])
def test_one_l2_after_another_is_scikit_learns_optimum(digits, images):
    x, test_x = linear_models.standardized(digits[0][:images], digits[2])
    y = digits[1][:images]
    regressions = linear_models.Regressions(x, test_x, y, probes.PRECISION)
    for decay in probes.DECAYS:
        regressions(decay)
        fitted = regressions.solved[decay]
        assert objective(regressions.train_x, y, decay, *fitted) < 1.003 * optimum(x, y, decay)[1]


def test_a_start_from_which_the_line_search_gets_stuck_is_given_up():
    """Images of very different length, on which it happens with one of these L2."""
    rng = torch.Generator().manual_seed(0)
    for n, width, n_classes in ((300, 20, 2), (100, 64, 2), (300, 32, 5)):
        y = torch.arange(n) % n_classes
        means, noise = torch.randn(n_classes, width, generator=rng), torch.randn(n, width, generator=rng)
    x = (means[y] + noise) * torch.exp(2 * torch.randn(n, 1, generator=rng))
    x, _ = linear_models.standardized(x, x)
    regressions = linear_models.Regressions(x, x, y, probes.PRECISION)
    for decay in probes.DECAYS:
        regressions(decay)
        from_zero = linear_models.logistic_regression(x, y, decay, probes.PRECISION)
        assert objective(x, y, decay, *regressions.solved[decay]) < 1.01 * objective(x, y, decay, *from_zero)


def test_weak_l2_on_overlapping_classes_takes_few_steps_after_a_stronger_one(monkeypatch):
    y = torch.arange(400) % 4
    x = linear_models.standardized(*[torch.randn(4, 16)[y] + 3 * torch.randn(400, 16)] * 2)[0]
    passes, fit = [], linear_models.fit_linear

    def counted(x, loss, *args, **known):
        def once_more(scores):
            passes[-1] += 1
            return loss(scores)

        passes.append(0)
        return fit(x, once_more, *args, **known)

    monkeypatch.setattr(linear_models, "fit_linear", counted)
    regressions = linear_models.Regressions(x, x, y, probes.PRECISION)
    for solve in (regressions, lambda decay: linear_models.linear_logits(x, x, y, decay, probes.PRECISION)):
        for decay in probes.DECAYS:
            solve(decay)
    n = len(probes.DECAYS)
    assert sum(passes[:n]) < 0.75 * sum(passes[n:]) and max(passes[n - 4 : n]) < 0.4 * min(passes[-4:])


def test_weak_l2_on_many_separable_classes_is_scikit_learns_optimum():
    y = torch.arange(300) % 100
    x = torch.randn(100, 64)[y] + torch.randn(300, 64)
    x = linear_models.standardized(x, x)[0]
    weights = linear_models.logistic_regression(x, y, 1e-4, probes.PRECISION)
    assert objective(x, y, 1e-4, *weights) < 1.003 * optimum(x, y, 1e-4)[1]


def two_classes(n: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Sets of n and n + 1 images of two classes that are easily told apart: (train x, y, test x, y)."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(2 * n + 1) % 2
    x = torch.randn(len(y), 32, generator=rng) + 3 * y[:, None]
    return x, y, torch.randn(200, 32, generator=rng) + 3 * (torch.arange(200) % 2)[:, None], torch.arange(200) % 2


@pytest.mark.parametrize("n", [7, 12, 22, 47, 102])
def test_classes_of_nearly_equal_size_are_told_apart(n):
    """All L2 are equally accurate on the held-out part, even those with which the bias alone would decide later."""
    for seed in range(4):
        found = probes.linear(*two_classes(n, seed))
        assert found["acc1"] == 100 and found["l2"] <= probes.DECAYS[0]


def test_a_rare_class_leaves_the_choice_of_l2_to_the_others(digits):
    x, y = digits[0], digits[1]
    rare = torch.cat([(y != 3).nonzero()[:, 0], (y == 3).nonzero()[:, 0][:4]])
    x, y = linear_models.standardized(x, x)[0][rare], y[rare]
    assert probes.choose_decay(x, y, seed=0) < probes.DECAY_OF_FEW / 5
    few = torch.cat([(y == k).nonzero()[:, 0][:4] for k in range(10)])
    assert probes.choose_decay(x[few], y[few], seed=0) == probes.DECAY_OF_FEW


def test_hyperparameters_do_not_depend_on_test_labels(digits, found_by_linear):
    train_x, train_y, test_x, test_y = digits
    right, wrong = found_by_linear, probes.linear(train_x, train_y, test_x, (test_y + 1) % 10, seed=0)
    assert right["l2"] == wrong["l2"] and right["acc1"] + wrong["acc1"] <= 100


@pytest.mark.slow
def test_the_few_label_curve_rises_to_all_labels(digits, monkeypatch):
    monkeypatch.setattr(probes, "FEW_LABELS", (1, 20, 1000))
    monkeypatch.setattr(probes, "FEW_DRAWS", 2)
    found = probes.few_labels(*digits, seed=1)
    assert found["labels_all_acc1"] == probes.linear(*digits, seed=1)["acc1"]
    assert found["labels1_acc1"] + 10 < found["labels20_acc1"] < found["labels_all_acc1"]
    assert "labels1000_acc1" not in found  # there are fewer images per class
    monkeypatch.setattr(probes, "FEW_LABELS", (1,))
    fewer = [part[:200] for part in digits]
    first, again, other = (probes.few_labels(*fewer, seed=seed) for seed in (1, 1, 2))
    assert first == again and first["labels1_acc1"] != other["labels1_acc1"]


def test_one_label_per_class_uses_the_fixed_l2(digits, monkeypatch):
    """Without a draw or a split: the same features, and the fixed L2 for few labels."""
    digits = digits[0][:100], digits[1][:100], *digits[2:]
    train_x, train_y, test_x, test_y = (part.double().numpy() for part in digits)
    scaler, scores = StandardScaler().fit(train_x), []
    for draw in range(probes.FEW_DRAWS):
        rows = probes.subsets.stratified(digits[1].numpy(), per_class=1, seed=draw)
        reference = LogisticRegression(C=1 / probes.DECAY_OF_FEW, max_iter=5000, tol=1e-10)
        reference.fit(scaler.transform(train_x[rows]), train_y[rows])
        scores.append(100 * reference.score(scaler.transform(test_x), test_y))
    monkeypatch.setattr(probes, "FEW_LABELS", (1,))
    found = probes.few_labels(*digits, seed=0)
    assert found["labels1_acc1"] == pytest.approx(np.mean(scores), abs=0.3)
    assert found["labels1_acc1_std"] == pytest.approx(np.std(scores, ddof=1), abs=0.3)


def test_low_shot_svms_are_those_of_their_draws(digits, monkeypatch):
    monkeypatch.setattr(probes, "VOC_SHOTS", (1, 4, 96))
    monkeypatch.setattr(probes, "VOC_DRAWS", 2)
    found = probes.low_shot_svm(*digits, seed=2)
    # There are fewer than 96 images per class.
    assert sorted(found) == ["shot1_acc1", "shot1_acc1_std", "shot4_acc1", "shot4_acc1_std"]
    train_x, train_y, test_x, test_y = digits
    draws = [probes.subsets.stratified(train_y.numpy(), per_class=4, seed=seed) for seed in (4, 5)]
    scores = [linear_models.svm(train_x[rows], train_y[rows], test_x, test_y)["acc1"] for rows in draws]
    assert found["shot4_acc1"] == pytest.approx(np.mean(scores)) and found["shot4_acc1_std"] == pytest.approx(
        np.std(scores, ddof=1)
    )
    assert probes.mean_and_std("acc1", [50.0]) == {"acc1": 50.0}
    assert found["shot1_acc1"] < found["shot4_acc1"]


def test_low_shot_svms_of_multi_label_data(digits, monkeypatch):
    monkeypatch.setattr(probes, "VOC_SHOTS", (2, 8))
    monkeypatch.setattr(probes, "VOC_DRAWS", 2)
    train_x, train_y, test_x, test_y = digits
    train, test = (torch.stack([y % 2 * 2 - 1, (y > 6) * 2 - 1, (y < 4) * 2 - 1], 1) for y in (train_y, test_y))
    found = probes.low_shot_svm(train_x, train, test_x, test)
    assert 40 < found["shot2_map"] < found["shot8_map"] < linear_models.svm(train_x, train, test_x, test)["map"]
