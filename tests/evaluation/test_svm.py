"""SVMs, compared with scikit-learn's LinearSVC, cross-validation and grid search."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.svm import LinearSVC

from self_supervised.evaluation import linear_models


def reference(cost: float) -> LinearSVC:
    return LinearSVC(C=cost, class_weight={1: 2, -1: 1}, dual=False, tol=1e-8, max_iter=20000)


@pytest.fixture
def blobs():
    """Return training (x, y) and test (x, y): four overlapping classes in 12 dimensions."""
    centers, y = torch.randn(4, 12) * 0.5, torch.randint(4, (700,))
    x = torch.randn(700, 12) + centers[y] + 0.3
    return x[:300], y[:300], x[300:], y[300:]


@pytest.fixture
def presences():
    """Return multi-label data with three classes; 0 marks objects that are hard to see."""
    x, directions = torch.randn(500, 10), torch.randn(10, 3)
    labels = torch.where(x @ directions + 2 * torch.randn(500, 3) > 2.5, 1, -1)
    labels[torch.rand(500, 3) < 0.1] = 0
    return x[:300], labels[:300], x[300:], labels[300:]


@pytest.mark.parametrize("cost", [2.0**-19, 1e-3, 0.5, 10.0])
def test_weights_are_scikit_learns(blobs, cost):
    x = linear_models.with_bias(blobs[0])
    signs = linear_models.one_against_rest(blobs[1], torch.arange(4))
    found = linear_models.fit_at(x, signs, cost)
    for column in range(4):
        expected = reference(cost).fit(x[:, :-1].double().numpy(), signs[:, column].numpy())
        expected = np.append(expected.coef_, expected.intercept_)
        np.testing.assert_allclose(found[:, column], expected, rtol=2e-3, atol=2e-3 * np.abs(expected).max())


def test_images_that_are_neither_are_left_out(presences):
    x, labels, _, _ = presences
    x, clear = linear_models.with_bias(x), labels[:, 1] != 0
    expected = reference(0.5).fit(x[clear, :-1].double().numpy(), labels[clear, 1].numpy())
    found = linear_models.fit_at(x, labels.float(), 0.5)[:, 1]
    np.testing.assert_allclose(found, np.append(expected.coef_, expected.intercept_), rtol=2e-3, atol=2e-3)


def test_costs_of_multi_label_data_are_those_of_a_grid_search(presences):
    x, labels, test_x, test_y = presences
    x, scores = linear_models.with_bias(x), []
    folds = np.stack([linear_models.folds_of(column.numpy()) for column in labels.T], 1)
    chosen = linear_models.choose_costs(x, labels.float(), folds, multi_label=True).tolist()
    for k in range(3):
        clear = labels[:, k] != 0
        search = GridSearchCV(reference(1.0), {"C": sorted(linear_models.COSTS)}, scoring="average_precision", cv=3)
        search.fit(x[clear, :-1].double().numpy(), labels[clear, k].numpy())
        quality = dict(zip(sorted(linear_models.COSTS), search.cv_results_["mean_test_score"], strict=True))
        nearest = min(quality, key=lambda cost: abs(cost - chosen[k]))  # the nearest, because costs are float32
        assert quality[nearest] == pytest.approx(search.best_score_, abs=1e-3)
        seen = test_y[:, k] != 0
        score = reference(nearest).fit(x[clear, :-1].double().numpy(), labels[clear, k].numpy())
        score = score.decision_function(linear_models.with_bias(test_x)[seen, :-1].double().numpy())
        score, sign = torch.from_numpy(score)[:, None], test_y[seen, k][:, None]
        assert float(linear_models.average_precision(score, sign)) == pytest.approx(
            average_precision_score(sign > 0, score)
        )
        scores.append(float(linear_models.average_precision(score, sign, interpolated=True)))
    assert linear_models.svm(*presences)["map"] == pytest.approx(100 * np.mean(scores), abs=0.3)


def test_the_cost_of_classes_is_that_of_a_search_by_accuracy(blobs):
    x, y, test_x, test_y = blobs
    unit = linear_models.with_bias(x)[:, :-1].double().numpy()

    def scores(cost: float, rows: np.ndarray, of: np.ndarray) -> np.ndarray:
        machines = [reference(cost).fit(unit[rows], np.where(y[rows] == k, 1, -1)) for k in range(4)]
        return np.stack([machine.decision_function(of) for machine in machines], 1).argmax(1)

    quality = {}
    for cost in sorted(linear_models.COSTS):
        splits = StratifiedKFold(3).split(unit, y)
        quality[cost] = np.mean([(scores(cost, fit, unit[held]) == y[held].numpy()).mean() for fit, held in splits])
    folds = linear_models.folds_of(y.numpy() + 1)[:, None]
    chosen = float(
        linear_models.choose_costs(
            linear_models.with_bias(x), linear_models.one_against_rest(y, y.unique()), folds, multi_label=False
        )[0]
    )
    chosen = min(quality, key=lambda cost: abs(cost - chosen))
    assert quality[chosen] == pytest.approx(max(quality.values()), abs=0.004)
    expected = (
        scores(chosen, np.arange(300), linear_models.with_bias(test_x)[:, :-1].double().numpy()) == test_y.numpy()
    )
    assert linear_models.svm(*blobs)["acc1"] == pytest.approx(100 * expected.mean(), abs=0.6)


def test_costs_do_not_depend_on_test_labels(blobs, monkeypatch):
    x, y, test_x, test_y = blobs
    chosen, choose = [], linear_models.choose_costs
    monkeypatch.setattr(linear_models, "choose_costs", lambda *args: chosen.append(choose(*args)) or chosen[-1])
    scores = [linear_models.svm(x, y, test_x, labels)["acc1"] for labels in (test_y, (test_y + 1) % 4)]
    assert torch.equal(*(torch.as_tensor(costs) for costs in chosen)) and scores[0] > 50 > scores[1]


def test_the_area_is_the_mean_of_the_highest_precision_from_each_recall_on():
    scores, signs = torch.randn(60), torch.where(torch.rand(60) < 0.3, 1, -1)
    order = scores.argsort(descending=True)
    right = [int(signs[i]) > 0 for i in order]
    precision = [sum(right[: i + 1]) / (i + 1) for i in range(60)]
    steps = [max(precision[i:]) for i in range(60) if right[i]]
    found = linear_models.average_precision(scores[:, None], signs[:, None], interpolated=True)
    assert float(found) == pytest.approx(sum(steps) / len(steps))


def test_equal_scores_have_one_precision():
    scores, labels = torch.tensor([2.0, 1, 1, 1, 0, 0])[:, None], torch.tensor([-1, 1, -1, 1, 1, -1])[:, None]
    expected = average_precision_score(labels > 0, scores)
    for order in (torch.arange(6), torch.arange(5, -1, -1), torch.tensor([2, 1, 0, 4, 5, 3])):
        assert float(linear_models.average_precision(scores[order], labels[order])) == pytest.approx(expected)


def test_images_that_are_neither_are_not_ranked(presences):
    _, _, x, labels = presences
    scores = x[:, :3].contiguous()
    for k, found in enumerate(linear_models.average_precision(scores, labels)):
        seen = labels[:, k] != 0
        assert float(found) == pytest.approx(average_precision_score(labels[seen, k] > 0, scores[seen, k]))


def test_more_features_than_images_change_nothing():
    """The SVMs in the span of the training images are the same."""
    x, y = torch.randn(60, 200), torch.arange(3).repeat(20)
    test_x, test_y = torch.randn(300, 200) + 0.2 * x[:3].repeat(100, 1), torch.arange(3).repeat(100)
    folds, signs = linear_models.folds_of(y.numpy() + 1)[:, None], linear_models.one_against_rest(y, torch.arange(3))
    cost = linear_models.choose_costs(linear_models.with_bias(x), signs, folds, multi_label=False)
    scores = linear_models.with_bias(test_x) @ linear_models.fit(linear_models.with_bias(x), signs, cost)
    expected = 100 * float((scores.argmax(1) == test_y).double().mean())
    assert linear_models.svm(x, y, test_x, test_y)["acc1"] == pytest.approx(expected, abs=0.7)


def test_too_few_images_for_folds_have_a_fixed_cost():
    x, y = torch.randn(6, 5), torch.arange(3).repeat(2)
    signs = linear_models.one_against_rest(y, torch.arange(3))
    scores = linear_models.with_bias(x) @ linear_models.fit_at(
        linear_models.with_bias(x), signs, linear_models.COST_OF_FEW
    )
    expected = 100 * (scores.argmax(1) == y).double().mean()
    assert linear_models.svm(x, y, x, y)["acc1"] == pytest.approx(float(expected))


def test_a_class_that_is_not_in_every_fold_leaves_the_choice_of_costs_to_the_others(blobs, presences, monkeypatch):
    used, made = [], linear_models.fit
    monkeypatch.setattr(linear_models, "fit", lambda x, signs, costs: used.append(costs) or made(x, signs, costs))
    x, y, test_x, test_y = blobs
    rare = torch.cat([(y != 1).nonzero()[:, 0], (y == 1).nonzero()[:, 0][:2]])
    linear_models.svm(x, y, test_x, test_y)
    linear_models.svm(x[rare], y[rare], test_x, test_y)
    assert used[0].unique().numel() == used[1].unique().numel() == 1 and used[1][0] != linear_models.COST_OF_FEW
    x, y, test_x, test_y = presences
    linear_models.svm(x, y, test_x, test_y)
    y = y.clone()
    y[(y[:, 1] > 0).nonzero()[:, 0][2:], 1] = -1
    linear_models.svm(x, y, test_x, test_y)
    assert used[3][1] == linear_models.COST_OF_FEW and torch.equal(used[3][[0, 2]], used[2][[0, 2]])


def test_low_shot_samples_keep_k_images_with_a_class_and_19_k_without_it():
    labels = torch.where(torch.rand(2000, 20) < 0.1, 1, -1)
    labels[:50] = 0
    left = linear_models.few_presences(labels, 4, seed=1)
    assert (left > 0).sum(0).tolist() == [4] * 20 and (left < 0).sum(0).tolist() == [76] * 20
    assert bool(((left == labels) | (left == 0)).all())
    assert torch.equal(left, linear_models.few_presences(labels, 4, seed=1))
    assert not torch.equal(left, linear_models.few_presences(labels, 4, seed=2))


@pytest.fixture(autouse=True)
def quietly():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Liblinear failed to converge")
        yield
