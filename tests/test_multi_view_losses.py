"""Losses of all views, and those that read labels, prototypes or neighbors: each against a formula of its paper in
float64, and against a number that the authors' code gave on the same inputs."""

import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_same

from model_params import PRESETS
from self_supervised import losses, multi_view_losses
from self_supervised.networks.keys import Prototypes, nearest_keys, sinkhorn

N, D, P = 6, 4, 5
LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def views(n: int, rows: int = N) -> torch.Tensor:
    """Return unit vectors [n, N, D] by a rule, with gradient."""
    places = torch.arange(float(rows * D), dtype=torch.float64).view(rows, D)
    return torch.stack([F.normalize((places + 0.5 * i).sin(), dim=1) for i in range(n)]).requires_grad_()


def by_rule(rows: int, factor: float) -> torch.Tensor:
    return F.normalize(torch.arange(float(rows * D), dtype=torch.float64).view(rows, D).mul(factor).cos(), dim=1)


WEIGHT, QUEUE = by_rule(P, 1.0), by_rule(3, 0.7)


def of_all(preset: str, z: torch.Tensor, k: torch.Tensor | None = None, **fields) -> torch.Tensor:
    params = PRESETS[preset](**{"n_large_views": len(z), **fields})
    return multi_view_losses.get_loss_of_views(params, (0, 1))(z, z if k is None else k)["loss"]


# ---- Labels ----


@pytest.mark.parametrize(("labels", "recorded"), [(LABELS, 3.3048103558588715), (-torch.ones(N), 1.1607881747823885)])
def test_supcon_equals_its_equation_and_the_authors_code(labels, recorded):
    """Equation 2 over all 2 N anchors; their SupConLoss (commit 66a8fe5) with both temperatures 0.1."""
    both = views(2)
    loss_of = losses.get_loss(PRESETS["supcon"](), labels=labels)
    found = (loss_of(both[0], both[1], None)["loss"] + loss_of(both[1], both[0], None)["loss"]) / 2
    z, classes = both.flatten(0, 1), torch.cat([labels, labels])
    expected = 0
    for i in range(2 * N):
        others = [j for j in range(2 * N) if j != i]
        alike = [j for j in others if j % N == i % N or (classes[i] == classes[j] >= 0)]
        denominator = sum((z[i] @ z[a] / 0.1).exp() for a in others)
        expected = expected - sum(((z[i] @ z[j] / 0.1).exp() / denominator).log() for j in alike) / len(alike)
    assert_same(found, expected / (2 * N), both)
    assert found.item() == pytest.approx(recorded, abs=1e-9)


# ---- Prototypes and neighbors ----


def prototypes(loss_type: str) -> Prototypes:
    made = Prototypes(PRESETS[loss_type](n_prototypes=P, dim=D)).double()
    made.weight.data.copy_(WEIGHT)
    return made


def test_sinkhorn_ends_with_equal_parts():
    found = sinkhorn(torch.randn(40, P, dtype=torch.float64), 0.05, iterations=2000)
    assert torch.allclose(found.sum(1), torch.ones(40, dtype=torch.float64))
    assert torch.allclose(found.sum(0), torch.full((P,), 40 / P, dtype=torch.float64), rtol=1e-3)


def test_swav_equals_its_equations_and_the_authors_code():
    """Two large views and a small one, with a queue: their distributed_sinkhorn and loss (commit 06b1b7c)."""
    z, made = views(3), prototypes("swav")
    targets = made.targets({0: z[0], 1: z[1]}, QUEUE, 0.05)
    loss_of = losses.get_loss(PRESETS["swav"]())
    pairs = PRESETS["swav"](n_small_views=1).pairs
    found = torch.stack([loss_of(made(z[i]), targets[j], None)["loss"] for i, j in pairs]).mean()
    expected = 0
    for i, j in pairs:  # equation 2, with the assignments of equation 3
        q = torch.exp(torch.cat([z[j], QUEUE]) @ made.weight.T / 0.05).detach()
        for _ in range(3):
            q = q / q.sum(0) / P
            q = q / q.sum(1, keepdim=True) / len(q)
        logs = (z[i] @ made.weight.T / 0.1).log_softmax(1)
        expected = expected - ((q * len(q))[:N] * logs).sum() / N / len(pairs)
    assert_same(found, expected, z, made.weight)
    assert found.item() == pytest.approx(2.6224192377128626, abs=1e-9)


def test_dino_equals_the_authors_code_in_two_steps():
    """Their DINOLoss (commit 7c446df), which centers the second step with the mean of the first."""
    z, made = views(3), prototypes("dino")
    made.weight.data.mul_(3)  # its length has no effect
    loss_of, center = losses.get_loss(PRESETS["dino"]()), 0
    for step, recorded in enumerate((2.9466075711813673, 8.096822104197853)):
        keys = {j: z[j].roll(step, 0) for j in (0, 1)}
        targets = made.targets(keys, None, 0.04)
        pairs = PRESETS["dino"](n_small_views=1).pairs
        found = torch.stack([loss_of(made(z[i]), targets[j], None)["loss"] for i, j in pairs]).mean()
        unit = made.weight / made.weight.norm(dim=1, keepdim=True)
        scores = {j: (k @ unit.T).detach() for j, k in keys.items()}
        expected = 0
        for i, j in pairs:  # equations 1 and 4
            logs = (z[i] @ unit.T / 0.1).log_softmax(1)
            expected = expected - (((scores[j] - center) / 0.04).softmax(1) * logs).sum() / N / len(pairs)
        center = 0.9 * center + 0.1 * torch.cat(list(scores.values())).mean(0)
        assert_same(found, expected, z, made.weight)
        assert found.item() == pytest.approx(recorded, abs=1e-9)


def test_nnclr_equals_its_equation_and_solo_learns_code():
    """Equation 3: the softmax is over the predictions of all images for one neighbor (commit 9187ea3)."""
    z, loss_of = views(2), losses.get_loss(PRESETS["nnclr"]())
    pairs = ((0, 1), (1, 0))
    found = sum(loss_of(z[i], nearest_keys(z[j], QUEUE), None)["loss"] for i, j in pairs) / 2
    expected = 0
    for i, j in pairs:
        for n in range(N):
            neighbor = QUEUE[(QUEUE @ z[j, n]).argmax()]
            expected = expected - (z[i] @ neighbor / 0.1).log_softmax(0)[n] / (2 * N)
    assert_same(found, expected, z)
    assert found.item() == pytest.approx(1.3828770174850862, abs=1e-9)


def test_seed_is_the_cross_entropy_of_two_distributions_over_the_queue_and_the_own_key():
    q, k = views(2)
    found = losses.get_loss(PRESETS["distill"]())(q, k, QUEUE)["loss"]
    expected = 0
    for n in range(N):
        candidates = torch.stack([k[n], *QUEUE])
        target = ((candidates @ k[n]) / 0.01).softmax(0).detach()
        expected = expected - (target * ((candidates @ q[n]) / 0.2).log_softmax(0)).sum() / N
    assert_same(found, expected, q)


# ---- All views ----


def test_fastsiam_predicts_the_mean_of_the_other_views():
    q, k = views(4), 2 * views(4).flip(1).detach()
    terms = [1 - F.cosine_similarity(q[i], k[[j for j in range(4) if j != i]].mean(0)).mean() for i in range(4)]
    assert_same(of_all("fastsiam", q, k), sum(terms) / 4, q)
    small = 1 - F.cosine_similarity(q[2:], k[:2].mean(0)[None], dim=2).mean()  # two small views, for the mean of both
    large = [1 - F.cosine_similarity(q[i], k[1 - i]).mean() for i in (0, 1)]
    assert_same(of_all("fastsiam", q, k[:2]), (sum(large) + 2 * small) / 4, q)


def test_sigreg_is_the_distance_of_characteristic_functions():
    """Algorithm 1 with complex exponentials and the integral from -3 to 3, for the same directions."""
    z = views(2, rows=9)
    drawn = np.random.default_rng((0, 1)).standard_normal((D, multi_view_losses.N_SLICES))
    directions = torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0))
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    normal = (-t.square() / 2).exp()
    statistics = []
    for view in z:
        found = torch.exp(1j * (view @ directions)[:, :, None] * t).mean(0)
        statistics.append(9 * torch.trapezoid((found - normal).abs().square() * normal, t).mean())
    regularizer = sum(statistics) / 2
    assert_same(multi_view_losses.sigreg(z, (0, 1)), regularizer, z)
    invariance = sum((view - z[:1].mean(0)).square().mean() for view in z) / 2  # one large view and a small one
    found = multi_view_losses.lejepa(z, 1, 0.02, (0, 1))
    assert_same(found["loss"], 0.98 * invariance + 0.02 * regularizer, z)
    assert torch.allclose(found["loss_sigreg"], 0.02 * regularizer, rtol=1e-12)  # terms are logged with their weights


def test_sigreg_is_small_for_normally_distributed_numbers_alone():
    normal = torch.randn(1, 4000, 8, dtype=torch.float64)
    near = multi_view_losses.sigreg(normal, (0,))
    assert near < 2 < multi_view_losses.sigreg(normal.sign(), (0,)) < multi_view_losses.sigreg(0 * normal, (0,))


def test_visreg_equals_its_equations_and_lightlys_code():
    """Algorithm 1 with the same directions (VISRegLoss of lightly's commit e8d317f)."""
    z = views(3, rows=9)
    drawn = np.random.default_rng((0, 1)).standard_normal((D, multi_view_losses.N_SORTED_SLICES))
    found = multi_view_losses.visreg(z, 2, 0.9, (0, 1))["loss"]
    quantiles = [NormalDist().inv_cdf(i / 10) for i in range(1, 10)]
    regularizer = 0
    for view in z:
        mean = view.sum(0) / 9
        std = ((view - mean).square().sum(0) / 9).sqrt()
        projected = ((view - mean) / (std.detach() + 1e-4)) @ torch.from_numpy(drawn / np.linalg.norm(drawn, axis=0))
        ranked = projected.gather(0, projected.argsort(0)) - torch.tensor(quantiles, dtype=torch.float64)[:, None]
        regularizer = regularizer + (mean.square().mean() + (1 - std).square().mean() + ranked.square().mean()) / 3
    invariance = sum((view - (z[0] + z[1]) / 2).square().mean() for view in z) / 3
    assert_same(found, 0.1 * invariance + 0.9 * regularizer, z)
    assert found.item() == pytest.approx(0.3981504394576933, abs=1e-6)  # their quantiles are in float32


def test_emp_ssl_equals_its_formula_and_the_authors_code():
    """Their TotalCodingRate and Similarity_Loss with the weights 1 and 200 (commit 8fc3758)."""
    z = views(3)
    found = of_all("emp_ssl", z)
    cosine = F.cosine_similarity(z, z.mean(0)[None], dim=2).mean()
    rates = [torch.logdet(torch.eye(D) + D / (N * 0.2) * view.T @ view) / 2 for view in z]
    assert_same(found, -200 * cosine - sum(rates) / 3, z)
    assert found.item() == pytest.approx(-186.22034603181643, abs=1e-6)


@pytest.mark.parametrize(
    ("rows", "n", "weight", "recorded"), [(N, 3, 1.0, -0.9998103078710663), (3, 2, 1.4, -0.8114699890217574)]
)
def test_frossl_equals_its_formula_and_lightlys_code(rows, n, weight, recorded):
    """The entropy by eigenvalues, with more images than dimensions and with fewer (lightly 1.6.0)."""
    z = views(n, rows)
    found = of_all("frossl", z, invariance_loss_weight=weight)
    scaled = [view / view.norm(dim=0) for view in z]
    mean = sum(scaled) / n
    expected = 0
    for view in scaled:
        eigenvalues = torch.linalg.eigvalsh(view.T @ view) / D
        expected = expected + eigenvalues.square().sum().log() + weight * n * (view - mean).square().sum() / rows
    assert_same(found, expected, z)
    assert found.item() == pytest.approx(recorded, abs=1e-9)


def test_mmcr_equals_its_formula_and_lightlys_code():
    z = views(4)

    def nuclear(x: torch.Tensor) -> torch.Tensor:  # of full rank
        return torch.linalg.eigvalsh(x @ x.T if len(x) < D else x.T @ x).sqrt().sum()

    centroids = np.linalg.svd(z.detach().mean(0).numpy(), compute_uv=False).sum()
    single = [np.linalg.svd(z[:, n].detach().numpy(), compute_uv=False).sum() for n in range(N)]
    assert of_all("mmcr", z).item() == pytest.approx(-centroids, abs=1e-9)
    found = of_all("mmcr", z, invariance_loss_weight=5e-3).item()
    assert found == pytest.approx(-centroids + 5e-3 * np.mean(single), abs=1e-9)
    assert found == pytest.approx(-2.9195519134485792, abs=1e-9)
    assert math.isfinite(torch.autograd.grad(of_all("mmcr", z, invariance_loss_weight=1.0), z)[0].sum().item())
    z = torch.randn(3, N, D, dtype=torch.float64, requires_grad=True)
    assert_same(of_all("mmcr", z), -nuclear(z.mean(0)), z)
    single = sum(nuclear(z[:, n]) for n in range(N)) / N
    assert_same(of_all("mmcr", z, invariance_loss_weight=5e-3), -nuclear(z.mean(0)) + 5e-3 * single, z)
