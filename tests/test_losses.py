"""Every loss against a formula written from its paper, in float64 and with loops if that is simpler."""

import math

import attrs
import pytest
import torch
import torch.nn.functional as F
from conftest import VECTORS, assert_same

from model_params import ALL_VIEW_LOSSES, LOSSES, PRESETS, ModelParams
from self_supervised import losses, multi_view_losses

N, D, K = VECTORS
RECORDED = {None: 0.5890572208768287, 0.5: 0.6203599585284832}  # sigma -> loss of a public implementation of DCL


def loss(params_change, q, k, queue=None):
    params = attrs.evolve(ModelParams(), **params_change)
    return losses.get_loss(params)(q, k, queue)


def info_nce(q, candidates_of, T, weight=1.0):
    """Return the mean of -log(e^(s+/T) / (e^(s+/T) + weight sum e^(s/T))).

    candidates_of(n) returns the positive of query n, then its negatives.
    """
    total = 0
    for n in range(len(q)):
        positive, *negatives = [(q[n] @ c / T).exp() for c in candidates_of(n)]
        total = total - (positive / (positive + weight * sum(negatives))).log()
    return total / len(q)


def test_moco_is_info_nce_with_the_queue(vectors):
    q, k, queue = vectors
    expected = info_nce(q, lambda n: [k[n], *queue], 0.2)
    assert_same(loss({}, q, k, queue)["loss"], expected, q)


def test_batch_and_queue_negatives_together(vectors):
    q, k, queue = vectors
    expected = info_nce(q, lambda n: [k[n], *(k[m] for m in range(N) if m != n), *queue], 0.2)
    assert_same(loss({"use_negative_examples_from_batch": True}, q, k, queue)["loss"], expected, q, k)


def test_simclr_equals_the_2n_by_2n_matrix(vectors):
    """NT-Xent of all 2 N anchors at once, with the anchor itself masked before the softmax."""
    a, b, _ = vectors
    z = torch.cat([a, b])
    logits = (z @ z.T / 0.2).masked_fill(torch.eye(2 * N, dtype=torch.bool), -math.inf)
    expected = F.cross_entropy(logits, (torch.arange(2 * N) + N) % (2 * N))
    from_model_params = {
        "use_lagging_model": False,
        "use_negative_examples_from_queue": False,
        "use_negative_examples_from_batch": True,
        "use_negative_examples_from_same_view": True,
    }
    both = (loss(from_model_params, a, b)["loss"] + loss(from_model_params, b, a)["loss"]) / 2
    assert_same(both, expected, a, b)


def test_dcl_of_a_single_image_is_0():
    """The last batch of an epoch may have one."""
    assert losses.decoupled(torch.ones(1, 1), 0.1, None)["loss"] == 0


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_dcl_equals_its_formula_and_a_public_implementation(vectors, sigma):
    """Equations 6 and 7, image by image, and a number of raminnakhli's DCL and DCLW (commit 0b9b76d) in float64."""
    q, k, _ = vectors
    settings = {"loss_type": "dcl", "T": 0.1, "dcl_sigma": sigma, "use_lagging_model": False}
    settings |= {"use_negative_examples_from_queue": False}
    settings |= {f"use_negative_examples_from_{of}": True for of in ("batch", "same_view")}
    found = loss(settings, q, k)["loss"]
    own = [(q[n] @ k[n]) for n in range(N)]
    expected = 0
    for n in range(N):
        others = [x for m in range(N) if m != n for x in (q[m], k[m])]
        weight = 1 if sigma is None else 2 - (own[n] / sigma).exp() / (sum((s / sigma).exp() for s in own) / N)
        expected = expected - weight * own[n] / 0.1 + sum((q[n] @ x / 0.1).exp() for x in others).log()
    assert_same(found, expected / N, q, k)
    a, b = (F.normalize(torch.arange(24.0, dtype=torch.float64).view(6, 4).add(c).sin(), dim=1) for c in (0, 0.5))
    assert loss(settings, a, b)["loss"].item() == pytest.approx(RECORDED[sigma], abs=1e-9)


@pytest.mark.parametrize("source", ["queue", "batch"])
@pytest.mark.parametrize("alpha", [3.0, 65536.0])
def test_eqco_weighs_negatives_as_if_there_were_alpha(vectors, source, alpha):
    q, k, queue = vectors
    negatives = {"queue": lambda n: list(queue), "batch": lambda n: [k[m] for m in range(N) if m != n]}[source]
    expected = info_nce(q, lambda n: [k[n], *negatives(n)], 0.2, weight=alpha / len(negatives(0)))
    settings = {"use_eqco_margin": True, "eqco_alpha": alpha}
    settings |= {f"use_negative_examples_from_{name}": name == source for name in ("queue", "batch")}
    assert_same(loss(settings, q, k, queue)["loss"], expected, q)


@pytest.mark.parametrize("name", ["ce", "dcl"])
def test_other_queries_alone_as_negatives(vectors, name):
    q, k, _ = vectors
    sources = {
        f"use_negative_examples_from_{source}": source == "same_view" for source in ("queue", "batch", "same_view")
    }
    expected = 0
    for n in range(N):
        others = [(q[n] @ q[i] / 0.2).exp() for i in range(N) if i != n]
        own = (q[n] @ k[n] / 0.2).exp()
        expected = expected - torch.log(own / sum(others + [own] * (name == "ce"))) / N
    settings = {"loss_type": name, "use_lagging_model": False, "T": 0.2, **sources}
    assert_same(loss(settings, q, k, None)["loss"], expected, q)


def test_eqco_with_alpha_equal_to_the_number_is_info_nce(vectors):
    q, k, queue = vectors
    plain, margin = loss({}, q, k, queue), loss({"use_eqco_margin": True, "eqco_alpha": K}, q, k, queue)
    assert plain["loss"].item() == margin["loss"].item()


def test_eqco_is_finite_where_exponentials_overflow():
    q = F.normalize(torch.randn(4, 8), dim=1)
    value = losses.cross_entropy(losses.similarities(q, q, q), 0.005, eqco_alpha=65536)["loss"]
    assert (1 / torch.tensor(0.005)).exp().isinf() and value.isfinite()


@pytest.mark.parametrize("alpha", [None, 20.0])
@pytest.mark.parametrize("in_batch", [False, True])
def test_a_queue_in_chunks_equals_the_whole_matrix(vectors, monkeypatch, in_batch, alpha):
    q, k, queue = vectors
    queue = torch.cat([queue, -q.detach(), q.detach()])  # least and most similar last: the largest logit changes
    monkeypatch.setattr(losses.QueueLogit, "CHUNK", 4)
    for T in (0.2, 0.001):
        whole = losses.cross_entropy(losses.similarities(q, k, queue, in_batch), T, alpha)
        chunks = losses.cross_entropy(losses.similarities(q, k, None, in_batch), T, alpha, q, queue)
        assert all(torch.allclose(chunks[name], whole[name], rtol=1e-12, atol=1e-12) for name in whole)
        gradients = (torch.autograd.grad(found["loss"] * 3, (q, k)) for found in (chunks, whole))
        for ours, theirs in zip(*gradients, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_queue_with_nan_recognizes_nothing(vectors):
    q, k, queue = vectors
    found = loss({}, q, k, queue * math.nan)
    assert found["loss"].isnan() and found["step_train_acc5"] == 0


@pytest.mark.parametrize("with_queue", [True, False])
def test_bce_and_ip(vectors, with_queue):
    q, k, queue = vectors
    bce = ip = 0
    for n in range(N):
        positive = q[n] @ k[n]
        bce = bce - torch.sigmoid(positive / 0.2).log() / N
        ip = ip + (1 - positive) / N
        for negative in queue if with_queue else []:
            bce = bce - (1 - torch.sigmoid(q[n] @ negative / 0.2)).log() / N / K
            ip = ip + (1 + q[n] @ negative) / N / K
    for loss_type, expected in (("bce", bce), ("ip", ip)):
        settings = {"loss_type": loss_type, "use_negative_examples_from_queue": with_queue}
        assert_same(loss(settings, q, k, queue)["loss"], expected, q)


def test_byol_is_2_minus_2_cosine(vectors):
    q, k, _ = vectors
    expected = (2 - 2 * F.cosine_similarity(q, k)).mean()
    settings = {"loss_type": "ip", "use_negative_examples_from_queue": False}
    assert 2 * loss(settings, q, k)["loss"].item() == pytest.approx(expected.item(), abs=1e-12)


def test_vicreg_equals_the_paper_term_by_term():
    a, b = (torch.randn(7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    invariance = sum((x - y).square().sum() for x, y in zip(a, b, strict=True)) / 7 / 4
    variance = covariance = 0
    for z in (a, b):
        for j in range(4):
            variance = variance + F.relu(1 - (z[:, j].var() + 1e-4).sqrt()) / 4
        matrix = torch.cov(z.T)
        covariance = covariance + sum(matrix[i, j] ** 2 for i in range(4) for j in range(4) if i != j) / 4
    found = losses.vicreg(a, b, 25.0, 25.0, 1.0, 1e-4)
    assert_same(found["loss"], 25 * invariance + 25 * variance + covariance, a, b)
    assert found["loss_variance"].item() == pytest.approx(25 * variance.item())
    assert found["loss_covariance"].item() == pytest.approx(covariance.item())


def test_barlow_twins_equals_the_authors_batch_norm_form():
    a, b = (torch.randn(7, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    c = F.batch_norm(a, None, None, training=True).T @ F.batch_norm(b, None, None, training=True) / 7
    expected = sum((c[i, j] - float(i == j)) ** 2 * (1 if i == j else 0.0051) for i in range(4) for j in range(4))
    assert_same(losses.barlow_twins(a, b, 0.0051)["loss"], expected, a, b)


def test_accuracies_count_the_closer_negatives():
    sim = torch.tensor([[0.5, 0.4, 0.3], [0.5, 0.6, 0.3], [0.5, 0.6, 0.7], [0.1, 0.0, 0.0]])
    found = losses.cross_entropy(sim, 1.0)
    assert found["step_train_acc1"] == 50 and found["step_train_acc5"] == 100
    sim = torch.cat([torch.zeros(1, 1), torch.ones(1, 5)], dim=1)
    assert losses.cross_entropy(sim, 1.0)["step_train_acc5"] == 0


def test_ties_and_nan_recognize_nothing():
    for value in (1.0, float("nan")):
        assert losses.cross_entropy(torch.full((3, 9), value), 1.0)["step_train_acc5"] == 0


@pytest.mark.parametrize("name", ["vic", "barlow"])
def test_one_image_is_refused(name):
    with pytest.raises(ValueError, match="drop_last_batch=True"):
        losses.get_loss(ModelParams(loss_type=name))(torch.zeros(1, 4), torch.zeros(1, 4), None)


def test_cosines_equal_the_matrix_of_all_pairs():
    z, k = torch.randn(N, D) * 3, torch.randn(N, D)
    matrix = torch.stack([F.cosine_similarity(row, k) for row in z])
    found = losses.cosines(z, k)
    assert found["step_pos_cos"].item() == pytest.approx(matrix.diagonal().mean().item(), abs=1e-6)
    assert found["step_neg_cos"].item() == pytest.approx(matrix[~torch.eye(N, dtype=bool)].mean().item(), abs=1e-6)
    spread = F.normalize(z, dim=1).std(0, correction=0).square().sum().sqrt()
    assert found["step_projection_std"].item() == pytest.approx(spread.item(), abs=1e-6)


def test_every_name_has_a_loss():
    q, queue = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    for name, preset in PRESETS.items():
        params = preset()
        if params.loss_type in ALL_VIEW_LOSSES:
            found = multi_view_losses.get_loss_of_views(params, (0,))(torch.stack([q, queue]), torch.stack([q, queue]))
        else:
            found = losses.get_loss(params, labels=torch.arange(4))(q, q, queue)
        assert found["loss"].isfinite(), name
    assert {preset().loss_type for preset in PRESETS.values()} == set(LOSSES) - {"bce"}
