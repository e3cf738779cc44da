"""Views from settings, and multi-crop: the views, their pairs and their loss."""

import attrs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from moco import SelfSupervisedMethod
from model_params import ALL_VIEW_LOSSES, PRESETS, ModelParams
from self_supervised.catalogue import ViewSettings
from self_supervised.data import data_sets, loading
from self_supervised.runs import preview
from self_supervised.training.plan import Plan
from self_supervised.views import augmentations

SYMMETRIC = {"sce", "byol", "simclr", "dcl", "moco_v3", "simsiam", "sce_video", "swav", "dino", "nnclr", "supcon"}
OF_PAIRS = [name for name, preset in PRESETS.items() if preset().loss_type not in ALL_VIEW_LOSSES]
MULTI_CROP = {"n_small_views": 2, "transform_crop_size": 12, "transform_small_crop_size": 8, "evaluations": []}


class Pooled(nn.Module):
    """Encoder [N, 1, h, w] -> [N, 6] for any size, which records the sizes that it gets in training."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 6))
        self.sizes = []

    def forward(self, x):
        if self.training:
            self.sizes.append(x.shape[-1])
        return self.net(x)


class Witness(SelfSupervisedMethod):
    """Method that records the views of its first step."""

    seen = None

    def training_step(self, batch, batch_idx):
        self.seen = self.seen or [view.clone() for view in batch[0]]
        return super().training_step(batch, batch_idx)


# ---- pairs ----


@pytest.mark.parametrize("name", OF_PAIRS)
def test_small_views_are_queries_for_every_large_views_key(name):
    two_small = PRESETS[name](n_large_views=2, n_small_views=2)
    large = [(0, 1), (1, 0)] if name in SYMMETRIC else [(0, 1)]
    assert two_small.pairs == [*large, (2, 0), (2, 1), (3, 0), (3, 1)] and two_small.n_views == 4
    of_all = {
        "transform_blur_probability": 0.5,
        "transform_solarize_probability": 0.2,
    }  # fields without a value per view
    three_large = PRESETS[name](n_large_views=3, n_small_views=1, **of_all)
    large = [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] if name in SYMMETRIC else [(0, 1), (0, 2)]
    assert three_large.pairs == [*large, (3, 0), (3, 1), (3, 2)]
    assert len(three_large.views) == three_large.n_views == 4


@pytest.mark.parametrize("name", PRESETS)
def test_lagging_model_and_queue_see_large_views_only(name, small, trainer):
    model = SelfSupervisedMethod(small(name, K=100, **MULTI_CROP), encoder=Pooled())
    trainer(limit_train_batches=1).fit(model)
    if model.lagging_model is not None:
        assert model.lagging_model.sizes == [12, 12]
    # In MoCo and similar methods, the second large view is only a key.
    assert sorted(model.model.sizes) == [8, 8, *[12] * (1 if model.lagging_model and name not in SYMMETRIC else 2)]
    if model.queue is not None:
        assert model.queue.position == 2 * 16


# ---- the loss, by formulas of our own in float64 ----


def info_nce(q, k, negatives, T):
    own = (q * k).sum(1) / T
    return (torch.logsumexp(torch.cat([own[:, None], negatives / T], 1), 1) - own).mean()


def others(matrix):
    return matrix[~torch.eye(len(matrix), dtype=torch.bool)].view(len(matrix), -1)


def moco(q, k, queue, p):
    return info_nce(q, k, q @ queue.T, p.T)


def byol(q, k, queue, p):
    return 2 - 2 * F.cosine_similarity(q, k).mean()


def simsiam(q, k, queue, p):
    return 0.5 - 0.5 * F.cosine_similarity(q, k).mean()


def simclr(q, k, queue, p):
    return info_nce(q, k, torch.cat([others(q @ k.T), others(q @ q.T)], 1), p.T)


def sce(q, k, queue, p):
    target = torch.softmax(torch.cat([others(k @ k.T), k @ queue.T], 1) / p.sce_target_T, 1) * (1 - p.sce_coefficient)
    target = torch.cat([torch.full((len(q), 1), p.sce_coefficient), target], 1).detach()
    sim = torch.cat([(q * k).sum(1, keepdim=True), others(q @ k.T), q @ queue.T], 1) / p.T
    return -(target * sim.log_softmax(1)).sum(1).mean()


def vicreg(a, b, queue, p):
    def regularized(z):
        matrix = torch.cov(z.T)
        off_diagonal = others(matrix).square().sum() / z.shape[1]
        return 25 * F.relu(1 - (matrix.diagonal() + 1e-4).sqrt()).mean() + off_diagonal

    return 25 * (a - b).square().mean() + regularized(a) + regularized(b)


def barlow_twins(a, b, queue, p):
    a, b = ((z - z.mean(0)) / (z.var(0, correction=0) + 1e-5).sqrt() for z in (a, b))
    error = (a.T @ b / len(a) - torch.eye(a.shape[1], dtype=a.dtype)).square()
    return 0.1 * (error.diagonal().sum() + 0.0051 * (error.sum() - error.diagonal().sum()))


def nnclr(q, k, queue, p):
    neighbors = queue[(k @ queue.T).argmax(1)]
    return info_nce(neighbors, q, others(neighbors @ q.T), p.T)  # over the predictions for one neighbor: equation 3


def dino_of(model):
    """The student is compared with its own prototypes, the teacher with the lagging ones and with their center."""
    prototypes, lagging = (F.normalize(w.weight, dim=1) for w in (model.prototypes, model.lagging_prototypes))
    center = model.lagging_prototypes.center.clone()  # the step moves it

    def dino(q, k, queue, p):
        target = torch.softmax((k @ lagging.T - center) / p.sce_target_T, 1).detach()
        return -(target * (q @ prototypes.T / p.T).log_softmax(1)).sum(1).mean()

    return dino


@pytest.mark.parametrize(
    "name, formula, n_terms",
    [("moco_v2", moco, 1), ("byol", byol, 2), ("simclr", simclr, 2), ("sce", sce, 2), ("vicreg", vicreg, 1),
     ("barlow_twins", barlow_twins, 1), ("simsiam", simsiam, 2), ("nnclr", nnclr, 1), ("dino", dino_of, 1)],
)  # fmt: skip
def test_loss_and_gradient_of_two_large_and_two_small_views(name, formula, n_terms, small, monkeypatch):
    """Compare the loss (mean over pairs, times the number of pairs of two views) and where gradients flow."""
    fields = {"T": 0.3, "dim": 5, "m": 0.5, "use_momentum_schedule": False, "projection_mlp_layers": 1}
    model = SelfSupervisedMethod(small(name, **MULTI_CROP, **fields), encoder=Pooled()).double()
    monkeypatch.setattr(model, "log_dict", lambda _: None)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # no rounding to float32 on the way
    if model.lagging_model is not None:  # makes keys differ from z
        for p in [*model.lagging_model.parameters(), *getattr(model.lagging_prototypes, "parameters", list)()]:
            p.add_(0.3 * torch.randn_like(p))
    if name == "dino":
        model.plan = Plan(1, 1, 16, 0.1, 10, 10)
        model.lagging_prototypes.center.normal_()
        formula = formula(model)
    p, views = model.params, [torch.randn(16, 1, size, size, dtype=torch.double) for size in (12, 12, 8, 8)]

    def gradients(loss):
        weights = [w for w in model.parameters() if w.requires_grad]
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    loss = model.training_step((views, None), 0)
    large = [(0, 1), (1, 0)][: 2 if name in SYMMETRIC else 1]
    terms = []
    for i, j in [*large, (2, 0), (2, 1), (3, 0), (3, 1)]:
        key = model.encode(views[j])[0] if model.lagging_model is None else model.encode_lagging(views[j], 0)
        key = key.detach() if name == "simsiam" else key
        terms.append(formula(model.encode(views[i])[1], key, None if model.queue is None else model.queue.keys, p))
    expected = n_terms * torch.stack(terms).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert torch.allclose(gradients(loss), gradients(expected), rtol=1e-7, atol=1e-10)


# ---- settings ----


@pytest.mark.parametrize("field", attrs.fields(ViewSettings), ids=lambda field: field.name)
def test_every_field_of_a_view_is_a_setting(field):
    """Every large and small view has its own settings, which the data set does not have."""
    wanted = {
        "crop_size": [96, 96, 16, 24],
        "crop_scale": [(0.31, 0.91), (0.32, 0.92), (0.03, 0.13), (0.04, 0.14)],
        "crop_ratio": [(0.81, 1.1), (0.82, 1.2), (0.83, 1.3), (0.84, 1.4)],
        "blur_sigma": [(0.11, 1.1), (0.12, 1.2), (0.13, 1.3), (0.14, 1.4)],
    }.get(field.name, [0.11, 0.12, 0.13, 0.14])
    both = [wanted] if not isinstance(wanted[0], tuple) else [list(end) for end in zip(*wanted, strict=True)]
    settings = base = {"n_small_views": 2, "dataset_name": "kinetics"}  # images have no time differences
    for values, end in zip(both, ("_min", "_max") if len(both) == 2 else ("",), strict=True):
        name = field.name + end
        if field.name == "crop_size":
            settings = settings | {"transform_crop_size": 96, "transform_small_crop_size": values[2:]}
        elif field.name == "crop_scale":
            settings = settings | {f"transform_{name}": values[:2], f"transform_small_{name}": values[2:]}
        else:
            settings = settings | {f"transform_{name}": values}
    views = ModelParams(**settings).views
    assert [getattr(view, field.name) for view in views] == wanted
    plain = ModelParams(**base).views
    assert [attrs.evolve(v, **{field.name: getattr(p, field.name)}) for v, p in zip(views, plain, strict=True)] == plain


def test_defaults_are_mocos_and_swavs():
    for name, small_size in (("cifar10", 16), ("stl10", 40), ("imagenet", 96)):
        p = ModelParams(dataset_name=name, n_small_views=1)
        assert p.views == [*ModelParams(dataset_name=name).views, attrs.evolve(
            p.views[0], crop_size=small_size, crop_scale=(0.05, 0.14))]  # fmt: skip
        assert attrs.evolve(p.views[0], crop_size=224) == ViewSettings()


def test_lists_shorter_than_the_views():
    """BYOL sets two large views; DINO's small views share a third value."""
    byol = {"n_small_views": 2, "transform_solarize_probability": [0.0, 0.2]}
    assert [v.solarize_probability for v in ModelParams(**byol).views] == [0.0, 0.2, 0.2, 0.2]
    dino = {"n_small_views": 2, "transform_blur_probability": (1.0, 0.1, 0.5), "transform_s": [0.5, 1, 0]}
    views = ModelParams(**dino).views
    assert [v.blur_probability for v in views] == [1.0, 0.1, 0.5, 0.5]
    assert [v.hue for v in views] == pytest.approx([0.1, 0.2, 0, 0])
    assert [v.hue for v in ModelParams(**dino, transform_hue=[None, 0.3]).views] == pytest.approx([0.1, 0.3, 0.3, 0.3])
    no_blur = ModelParams(**dino, transform_apply_blur=False).views
    assert [v.blur_probability for v in no_blur] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"transform_hue": [0.1, 0.1, 0.1]}, r"transform_hue=\[0.1, 0.1, 0.1\] has 3 values for 2 views$"),
        ({"n_small_views": 1, "transform_hue": [0.1]}, "has 1 values for 3 views.* [Aa]t least 2"),
        ({"n_small_views": 1, "transform_crop_scale_min": [0.1] * 3}, "crop_scale_min=.* has 3 values for 2 views"),
        ({"n_small_views": 1, "transform_small_crop_size": [16, 16]}, "crop_size=.* has 2 values for 1 views"),
        ({"n_small_views": 1, "transform_small_crop_size": 97}, "size=97 is above transform_crop_size=96"),
        ({"transform_small_crop_size": 10}, "transform_small_crop_size set, but .* no small views.* n_small_views"),
        ({"transform_small_crop_size": 12.5}, "transform_small_crop_size=12.5 must be a whole number"),
        ({"transform_small_crop_size": 6}, "transform_small_crop_size=6 must be at least 7"),
        ({"transform_crop_scale_max": 0.1}, "scale_min=0.2 is above transform_crop_scale_max=0.1 in view 0"),
        ({"transform_blur_sigma_max": 4}, "transform_blur_sigma_max=4 must be at least 0.01 and at most 3"),
        ({"transform_hue": 0.6}, "transform_hue=0.6 must be at least 0 and at most 0.5"),
        ({"transform_crop_ratio_min": 0}, "transform_crop_ratio_min=0 must be at least 0.01"),
        ({"transform_contrast": "x"}, "transform_contrast='x' must be a number"),
        ({"n_large_views": 1}, "leaves no other view to compare with. Choose at least 2, or pass a teacher."),
        ({"n_large_views": 1, "loss_type": "lejepa"}, "leaves no other view to compare with. Choose at least 2.$"),
        ({"n_small_views": 1.5}, "n_small_views=1.5 must be a whole number"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelParams(**fields)


def test_an_encoder_for_one_size_only_is_refused():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(144, 6))
    p = ModelParams(dataset_name="digits", K=8, **MULTI_CROP)
    with pytest.raises(ValueError, match="transform_small_crop_size=8 needs an encoder for several sizes .* size 12"):
        SelfSupervisedMethod(p, encoder=flat)
    with pytest.raises(ValueError, match="returns 64 features for small views, but 144 for large ones"):
        SelfSupervisedMethod(p, encoder=nn.Flatten())
    SelfSupervisedMethod(p, encoder=flat, transform_small_crop_size=12)


# ---- images ----


def test_small_views_of_packed_images_on_either_path():
    p = ModelParams(dataset_name="cifar10", n_small_views=2, transform_small_crop_size=[14, 9], seed=0)
    x = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    views = augmentations.training_views(p)(x, 1)
    assert [tuple(v.shape) for v in views] == [(8, 3, 32, 32)] * 2 + [(8, 3, 14, 14), (8, 3, 9, 9)]
    large_only = augmentations.training_views(attrs.evolve(p, n_small_views=0, transform_small_crop_size=None))(x, 1)
    assert all(
        torch.equal(a, b) for a, b in zip(views, large_only, strict=False)
    )  # additional views do not change the others
    rng = augmentations.ImageDraws(1, np.arange(8))
    for view, found in zip(p.views, views, strict=True):
        draws = {**augmentations.draw_crops(rng, 8, 32, 32, view), **augmentations.draw_operations(rng, 8, view)}
        matrix = torch.from_numpy(augmentations.to_matrix(draws))
        expected = augmentations.make_normalized_view(x, matrix, view, False, p.mean, p.std)
        assert (expected - found).abs().max() < 1e-4


def write_photographs(folder, n=6):
    for i in range(n):
        path = folder / "imagenet" / "train" / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = F.interpolate(torch.rand(1, 3, 5, 5), (60, 40 + i), mode="bilinear")[0]
        Image.fromarray((smooth * 255).byte().permute(1, 2, 0).numpy()).save(path, quality=95)


IMAGE_FILES = {"dataset_name": "imagenet", "transform_crop_size": 24, "transform_small_crop_size": 10, "seed": 0,
               "batch_size": 4, "K": 8, "n_small_views": 2, "num_data_workers": 1, "evaluations": []}  # fmt: skip


def test_small_views_of_image_files_are_cropped_in_the_workers(tmp_path, monkeypatch, trainer):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    write_photographs(tmp_path)
    encoder = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6))
    model = Witness(ModelParams(**IMAGE_FILES), encoder=encoder)
    trainer(limit_train_batches=1).fit(model)
    assert [view.shape for view in model.seen] == [(4, 3, size, size) for size in (24, 24, 10, 10)]


# ---- preview ----


def read(path):
    """Return the pixels of a PNG, [H, W, 3]."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file))


def tiles(sheet, left, size, factor, spacing):
    """Return the pixels of the three tiles below each other from `left` on, [3, 3, size, size]."""
    top, picked = len(sheet) - preview.PREVIEW_MARGIN + preview.PREVIEW_GAP - 3 * spacing, []
    for row in range(3):
        tile = sheet[top + row * spacing :, left:][: size * factor, : size * factor]
        squares = tile.reshape(size, factor, size, factor, 3)
        assert (squares == squares[:, :1, :, :1]).all()  # of one color each
        picked.append(squares[:, 0, :, 0].permute(2, 0, 1))
    return torch.stack(picked)


def test_the_preview_shows_what_the_model_sees_at_its_first_step(small, trainer, tmp_path):
    model = Witness(small("byol", **MULTI_CROP, transform_small_crop_scale_max=0.6), encoder=Pooled())
    trainer(limit_train_batches=1).fit(model)
    p = model.params
    path = preview.write_preview(p, tmp_path / "new" / "views.png", rows=3)
    assert path == tmp_path / "new" / "views.png" and [file.name for file in path.parent.iterdir()] == ["views.png"]
    sheet, factor, left = read(path), 13, preview.PREVIEW_MARGIN  # 12 pixels are magnified to about 160
    dataset = data_sets.get_dataset(p, ("train",))
    first = list(loading.get_loader(p, dataset, training=True).sampler)[:3]
    columns = [(torch.stack([dataset[i][0] for i in first]), ["original", "8 x 8 px"])]
    columns += [((v[:3] * p.std[0] + p.mean[0]) * 255, preview.caption(p, i)) for i, v in enumerate(model.seen)]
    for exact, lines in columns:
        size, font = exact.shape[-1], preview.ImageFont.load_default(preview.FONT_SIZE)
        shown = tiles(sheet, left, size, factor, 12 * factor + preview.PREVIEW_GAP)
        assert (shown[:, :1] - exact).abs().max() <= 0.501 and (shown == shown[:, :1]).all()
        left += max(size * factor, *(round(font.getlength(line)) for line in lines)) + 2 * preview.PREVIEW_GAP
    assert sheet.shape[1] == left - 2 * preview.PREVIEW_GAP + preview.PREVIEW_MARGIN


def test_the_preview_of_a_small_batch_has_as_many_rows(small):
    columns = preview.first_columns(small("simclr", batch_size=3))
    assert [len(images) for _, images in columns] == [3, 3, 3]


def test_captions_name_what_differs():
    p = ModelParams(dataset_name="cifar10", n_small_views=1, transform_blur_probability=[1.0, 0.1])
    assert preview.caption(p, 0) == [
        "view 0, large",
        "32 x 32 px",
        "query and key",
        "crop scale 0.2 to 1",
        "blur in 100 %",
    ]
    assert preview.caption(p, 1)[2:] == ["key", "crop scale 0.2 to 1", "blur in 10 %"]
    assert preview.caption(p, 2) == ["view 2, small", "16 x 16 px", "query", "crop scale 0.05 to 0.14", "blur in 10 %"]
    assert preview.caption(ModelParams(), 0) == ["view 0, large", "96 x 96 px", "query"]
    of_five = ModelParams(in_channels=5, dataset_name="folder", image_mean=[0.5] * 5, image_std=[0.5] * 5)
    assert preview.caption(of_five, 0)[1] == "224 x 224 px, first of 5 channels"


def test_preview_of_image_files_and_of_ones_own_loader(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    write_photographs(tmp_path)
    p = ModelParams(**IMAGE_FILES)
    files = read(preview.write_preview(p, "files.png", rows=2))
    assert preview.first_columns(p, rows=2)[0][0] == ["original, central square", "24 x 24 px"]
    floats = [[torch.randn(4, 3, size, size) for size in (24, 24, 10, 10)]]
    own = read(preview.write_preview(p, "own.png", floats, rows=2))
    assert len(files) == len(own) and files.shape[1] > own.shape[1]  # no originals
    with pytest.raises(ValueError, match="preview=.*files.jpg"):
        preview.write_preview(p, "files.jpg")
