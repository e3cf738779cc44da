"""Label-free measures, compared with formulas from the papers in NumPy and SciPy (float64)."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import pdist

from self_supervised.evaluation.label_free import alignment, alpha_req, lidar, uniformity


@pytest.fixture
def views():
    """200 images with 5 views each and 24 features, the first of which differ between images."""
    strength = torch.arange(1, 25) ** -0.8
    return (torch.randn(200, 1, 24) + 0.4 * torch.randn(200, 5, 24)) * strength + 0.3


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_alpha_req_is_a_weighted_fit_of_a_line(views):
    x = views[:, 0].double().numpy()
    eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(x.T)))[::-1]
    ranks = np.arange(11, 25)
    slope, _ = np.polyfit(np.log(ranks), np.log(eigenvalues[10:]), 1, w=ranks**-0.5)  # polyfit squares its weights
    assert alpha_req(views[:, 0])["alpha_req"] == pytest.approx(-slope, rel=1e-6)


def test_alpha_req_of_a_known_spectrum():
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(500, 150)))
    basis = np.linalg.qr(basis - basis.mean(0))[0]  # orthonormal columns of mean 0
    x = torch.from_numpy(basis * np.arange(1, 151) ** -0.6)  # eigenvalues i^-1.2
    assert alpha_req(x)["alpha_req"] == pytest.approx(1.2, rel=1e-6)
    assert math.isnan(alpha_req(torch.ones(10, 3))["alpha_req"])


def test_alignment_is_the_mean_over_pairs_of_views(views):
    v = unit(views.double().numpy())
    views = views.clone()
    v[2, 1:] = views[2, 1:] = 0  # some dead views, whose distance from one another is 0
    distances = [((v[:, i] - v[:, j]) ** 2).sum(1).mean() for i in range(5) for j in range(i)]
    assert alignment(views)["alignment"] == pytest.approx(np.mean(distances), rel=1e-6)
    assert alignment(views[:, :1].expand(-1, 4, -1))["alignment"] == pytest.approx(0, abs=1e-9)


def test_uniformity_is_the_log_of_the_mean_over_pairs():
    x = torch.randn(1300, 24) + 0.5  # more than one block of rows
    distances = pdist(unit(x.double().numpy()), "sqeuclidean")
    assert uniformity(x)["uniformity"] == pytest.approx(np.log(np.exp(-2 * distances).mean()), rel=1e-5)
    assert uniformity(torch.ones(5, 3))["uniformity"] == pytest.approx(0, abs=1e-5)
    assert uniformity(torch.zeros(60, 3))["uniformity"] == pytest.approx(0, abs=1e-5)  # a dead encoder
    assert np.isnan(uniformity(torch.ones(1, 3))["uniformity"])  # no pair


def test_lidar_is_the_effective_rank_of_the_discriminant(views):
    v = views.double().numpy()
    means = v.mean(1)
    between = np.cov(means.T, bias=True)
    within = np.mean([np.cov(image.T, bias=True) for image in v], axis=0) + 1e-4 * np.eye(24)
    whitening = np.linalg.inv(scipy.linalg.sqrtm(within).real)
    p = np.linalg.eigvalsh(whitening @ between @ whitening)
    p = p / p.sum()
    assert lidar(views)["lidar"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)


def test_lidar_counts_what_tells_images_apart_and_not_what_tells_views_apart():
    images = torch.randn(400, 1, 3) @ torch.randn(3, 3)
    alike = torch.cat([images.expand(-1, 6, -1), torch.randn(400, 6, 20) * 1e-9], 2)
    assert lidar(alike + 0.01 * torch.randn(400, 6, 23))["lidar"] < 4.0
