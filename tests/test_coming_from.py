"""docs/coming_from.md: its programs run, its commands are understood, and the settings that it names exist."""

import argparse
import ast
import importlib.util
import inspect
import itertools
import math
import pkgutil
import re
import shlex
import sys
from pathlib import Path

import attrs
import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
import videos
from conftest import QUIET
from PIL import Image
from torch import Tensor, nn

import model_params
import self_supervised
from linear_classifier import LinearClassifierMethodParams
from moco import EncodedView, SelfSupervisedMethod
from model_params import ModelParams, SCEVideoParams
from self_supervised import losses
from self_supervised.__main__ import COMMANDS
from self_supervised.data import loading, packed
from self_supervised.evaluation.protocols import PROTOCOLS
from self_supervised.exports.formats import FORMATS
from self_supervised.fields import Preset
from self_supervised.networks.heads import MLP
from self_supervised.runs import command_line, run_options
from self_supervised.runs.run_options import RunOptions
from self_supervised.training.checkpoints import Checkpoints

PAGE = (Path(__file__).parents[1] / "docs" / "coming_from.md").read_text()
SECTIONS = dict(zip(*[iter(re.split(r"^## (.*)\n", PAGE, flags=re.MULTILINE)[1:])] * 2, strict=True))
FIELDS = {
    attribute.name: attribute
    for kind in (LinearClassifierMethodParams, RunOptions, model_params.ModelParams)
    for attribute in attrs.fields(kind)
}
TRAINER = inspect.signature(pl.Trainer).parameters


def named_here(section: str) -> list[str]:
    """Return the texts in backticks in the second columns of the tables."""
    lines = [re.split(r"(?<!\\)\|", line) for line in section.splitlines() if line.startswith("| ")]
    assert lines and all(len(cells) == 5 for cells in lines)
    return [span for cells in lines for span in re.findall(r"`([^`]+)`", cells[2])]


def is_command(text: str) -> bool:
    return bool({"python", "self-supervised"} & set(text.split()))


@pytest.mark.parametrize("name", SECTIONS)
def test_named_settings_exist_and_take_the_values(name):
    for span in named_here(SECTIONS[name]):
        if not re.search(r"\w=", span) or is_command(span):
            continue
        call = ast.parse(span if re.match(r"[\w.]+\(", span) else f"f({span})", mode="eval").body
        for keyword in call.keywords:
            value = ast.literal_eval(keyword.value)
            if not span.startswith("pl.Trainer"):
                field = FIELDS[keyword.arg]
                assert value in field.metadata.get("choices", [value]), span
                (field.validator or (lambda *_: None))(None, field, value)
            assert keyword.arg in (TRAINER if span.startswith("pl.Trainer") else FIELDS), span


@pytest.mark.parametrize("name", SECTIONS)
def test_named_presets_and_functions_exist(name):
    for span in named_here(SECTIONS[name]):
        if re.fullmatch(r"\w+Params", span):
            assert span in vars(model_params)
        elif re.fullmatch(r"[a-z]\w+(\.\w+)+", span) and not span.endswith((".py", ".json", ".yaml", ".txt", ".ckpt")):
            pkgutil.resolve_name(span)


@pytest.mark.parametrize("name", SECTIONS)
def test_commands_are_understood(name, monkeypatch):
    monkeypatch.setitem(run_options.LOGGERS, "wandb", None)  # need not be installed
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", SECTIONS[name], re.DOTALL)).replace("\\\n", " ")
    commands = [*blocks.splitlines(), *filter(is_command, named_here(SECTIONS[name]))]
    assert commands
    for command in commands:
        words = shlex.split(command)
        start = words.index("self-supervised" if "self-supervised" in words else "python") + 1
        check(words[start], words[start + 1 :], monkeypatch)


def check(program: str, arguments: list[str], monkeypatch) -> None:
    """Parse a program's arguments without running it; status 2 means that it does not understand them."""
    if program == "train":
        if "--config" not in arguments:
            command_line.parse(arguments)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*given):
        options = vars(parse(*given))
        unknown = {*(options.get("protocols") or ())} - {*PROTOCOLS} | {*(options.get("format") or ())} - {*FORMATS}
        raise SystemExit(2 if unknown else 0)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [program, *arguments])
        if program in COMMANDS:
            importlib.import_module(COMMANDS[program][0]).main(arguments)
        else:
            importlib.import_module(program.removesuffix(".py")).main()
    assert ended.value.code == 0, arguments


class ShortTrainer(pl.Trainer):
    def __init__(self, **options):
        short = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1, "limit_test_batches": 1}
        super().__init__(**{**QUIET, **options, **short, "accelerator": "cpu"})


@pytest.fixture
def small_data(monkeypatch, tmp_path):
    """Small versions of the page's data sets, batches of 4, and a directory `dataset` with 2 classes."""
    rng = np.random.default_rng(0)

    def read(size: int, splits: list[str]):
        arrays = {name: rng.integers(0, 256, (8, size, size, 3), dtype=np.uint8) for name in splits}
        return lambda: {name: (images, np.arange(8) % 2) for name, images in arrays.items()}

    for name, size, splits in (("cifar10", 32, ["train", "test"]), ("stl10", 96, ["train", "unlabeled", "test"])):
        monkeypatch.setitem(packed.READERS, name, read(size, splits))
    for i in range(24):
        file = tmp_path / "dataset" / f"class_{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(file)
    for split, i in itertools.product(("train", "val"), range(4)):
        videos.write_frames(tmp_path / "datasets" / "kinetics" / split / f"class_{i % 2}" / f"video_{i}", n=12)
    few = {"global_batch_size": 4, "num_frames": 2, "transform_crop_size": 32, "K": 8, "evaluations": ["knn"]}
    preset = Preset(SCEVideoParams, "", "", num_data_workers=0, **few)
    monkeypatch.setattr(model_params, "SCEVideoParams", preset)
    monkeypatch.setattr(self_supervised, "SCEVideoParams", preset)  # which keeps a name once it was used
    make = loading.get_loader
    few = {"batch_size": 4, "num_data_workers": 0}
    monkeypatch.setattr(loading, "get_loader", lambda p, *rest, **more: make(attrs.evolve(p, **few), *rest, **more))
    monkeypatch.setattr(pl, "Trainer", ShortTrainer)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:collapse", "ignore:the warm-up of", "ignore:There is a wandb")
@pytest.mark.parametrize("name", SECTIONS)
def test_python_blocks(name, small_data, tmp_path, monkeypatch):
    """Blocks run in order, as in a notebook."""
    if name == "eztorch":
        monkeypatch.setattr(Checkpoints, "save", lambda *_: None)  # 400 MB
    blocks, names = re.findall(r"```python\n(.*?)```", SECTIONS[name], re.DOTALL), {}
    assert blocks
    for block in blocks:
        block = re.sub("2048|4096", "64", block)  # widths of heads, which would make checkpoints of 160 MB
        exec(compile(block, "coming_from.md", "exec"), names)
    if name == "solo-learn":
        assert (tmp_path / "checkpoints" / "barlow" / "epoch_0001.ckpt").is_file()
        assert names["model"].params.zero_init_residual and names["model"].params.lars_eta == 0.02
    if name == "eztorch":
        network = names["resnet3d_basic"]().eval()
        assert network(torch.zeros(1, 3, 8, 64, 64)).shape == (1, 512)
        assert network.layer4(network.layer3(torch.zeros(1, 128, 8, 4, 4))).shape[2] == 8  # frames
    if name == "The original":
        assert (tmp_path / "example.ckpt").is_file()


# ---- lightly and stable-pretraining: rows of the tables are run ----

lightly_loss = importlib.import_module("lightly.loss") if importlib.util.find_spec("lightly") else None

PARAMS = r"(?:ModelParams|[A-Z]\w+Params)(?<!LinearClassifierMethodParams)"


def rows(section: str, theirs: str) -> list[tuple[str, str]]:
    """Return the texts in backticks at the start of both columns, where the first one has the form `theirs`."""
    return re.findall(rf"^\| `({theirs})`.*? \| `({PARAMS}(?:\(.*?\))?)` \|", SECTIONS[section], re.MULTILINE)


def built(call: str) -> ModelParams:
    """Return the settings of a preset's name or of a call."""
    return eval(call if call.endswith(")") else f"{call}()", dict(vars(model_params)))


def our_loss(params: ModelParams, a: Tensor, b: Tensor, queue: Tensor | None) -> Tensor:
    """Return the loss of two views, as `training_step` does for networks that are the identity."""
    loss = losses.get_loss(params)
    z = [F.normalize(x, dim=1) if params.use_unit_sphere_projection else x for x in (a, b)]
    return torch.stack([loss(z[i], z[j], queue)["loss"] for i, j in params.pairs]).mean() * params.loss_factor


LOSSES_OF_LIGHTLY = dict(rows("lightly", r"\w+(?:Loss|Similarity)\(.*?\)"))
LIGHTLY = {  # loss of lightly 1.6.0, and norms of its gradients with respect to each of the views
    "NTXentLoss(temperature=0.5)": (2.48380521985, 0.781105975212, 0.781276794691),
    "NTXentLoss(temperature=0.1, memory_bank_size=(4096, 128))": (11.4451188619, 4.09141802014, 4.06212862699),
    "DCLLoss(temperature=0.1)": (2.90003959641, 4.27604882244, 4.38481760865),
    "DCLWLoss(sigma=0.5)": (3.03291531628, 4.3127904979, 4.41175708571),
    "NegativeCosineSimilarity()": (1.04616688954, 0.406218346246, 0.406218346246),
    "BarlowTwinsLoss(lambda_param=0.005)": (182.96327913, 123.726227935, 123.010481502),
    "VICRegLoss(lambda_param=25.0, mu_param=25.0, nu_param=1.0)": (23.2144705427, 0.377991863949, 0.377501287213),
    "SwaVLoss()": (13.0555884906, 0.253546035667, 0.275933743723, 0.489686169885, 0.494030438052),
    "DINOLoss(output_dim=2048)": (12.6321535757, 0.347922108383, 0.349635637775, 0.581773296098, 0.583147103626),
    "LeJEPALoss(lambda_param=0.02, sigreg_num_vectors=256)": (
        0.314837893025,
        0.00379413811222,
        0.00383302559317,
        0.00388809760157,
        0.00378806326028,
    ),
    "VISRegLoss(num_slices=1024)": (
        0.589982624232,
        0.00742492966116,
        0.0073221127742,
        0.00684075022632,
        0.00641611838287,
    ),
    "EMPSSLLoss()": (-111.094664267, 6.60700755241, 6.86268496784, 6.75729516578, 6.73282756024),
    "FroSSLLoss()": (-2.60594198721, 0.287877182748, 0.308632609208, 0.314822003483, 0.307980563324),
    "MMCRLoss(lmda=0.005)": (-12.4347050398, 0.999657485124, 0.99965222392, 0.999650949823, 0.999547246784),
}
OF_ALL_VIEWS = {  # calls with views [4, N, D], of which two are large, and prototypes [P, D]
    "SwaVLoss": lambda loss, z, w: loss([*(z[:2] @ w.T)], [*(z[2:] @ w.T)]),
    "DINOLoss": lambda loss, z, w: loss([*(z[:2].detach() @ w.T)], [*(z @ w.T)]),
    "LeJEPALoss": lambda loss, z, _: loss(global_proj=z[:2], local_proj=z[2:]),
    "VISRegLoss": lambda loss, z, _: loss(global_proj=z[:2], local_proj=z[2:]),
    "EMPSSLLoss": lambda loss, z, _: loss([*z]) - 2 * sys.modules[loss.__module__].tcr_loss(z, 0.2),  # see its remark
    "FroSSLLoss": lambda loss, z, _: loss([*z]),
    "MMCRLoss": lambda loss, z, _: loss(z[:2].transpose(0, 1), z[2:].transpose(0, 1)),
}


def sines(*shape: int) -> Tensor:
    """Return unit vectors without random numbers, which may change between versions of torch."""
    places = torch.arange(float(math.prod(shape)), dtype=torch.float64)
    return F.normalize((places + 0.001 * places.square()).sin().view(shape), dim=-1)


def loss_of_all_views(params: ModelParams, z: Tensor, prototypes: Tensor) -> Tensor:
    """Return the loss of a step whose networks map four views of each image to z [4, N, D]."""
    large = 4 if params.loss_type in ("emp", "frossl", "mmcr") else 2
    small = {"n_small_views": 2, "transform_small_crop_size": 32} if large == 2 else {}
    params = attrs.evolve(params, dataset_name="cifar10", n_large_views=large, **small, dim=z.shape[2], seed=3)
    model = SelfSupervisedMethod(params, encoder=nn.Flatten()).double()
    for made in filter(None, (model.prototypes, model.lagging_prototypes)):
        made.weight.data = prototypes
        made.begin_step(0)
    keys = {j: z[j] for _, j in params.pairs}
    return (
        model.compare({i: EncodedView(x, x, None) for i, x in enumerate(z)}, keys, None, 0)["loss"] * params.loss_factor
    )


def loss_of_lightly(call: str, z: Tensor, prototypes: Tensor, queue: Tensor | None) -> Tensor:
    """Requires lightly (benchmarks/requirements.txt). Random directions are those of the step above."""
    modules = [importlib.import_module(f"lightly.loss.{name}") for name in ("negative_cosine_similarity", "mmcr_loss")]
    criterion = eval(call, {name: x for module in (lightly_loss, *modules) for name, x in vars(module).items()})
    if queue is not None:
        criterion.memory_bank.bank = queue.clone()  # which the loss updates
    if view_loss := OF_ALL_VIEWS.get(call.split("(")[0]):
        drawn = np.random.default_rng((3, 0, 0))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "randn", lambda *shape, **_: torch.from_numpy(drawn.standard_normal(shape)))
            return view_loss(criterion, z, prototypes).squeeze()
    return criterion(*z) + (call == "NegativeCosineSimilarity()")


@pytest.mark.filterwarnings("ignore:To copy construct")  # by lightly's DCLWLoss
@pytest.mark.parametrize("theirs", LOSSES_OF_LIGHTLY)
def test_losses_of_lightly_are_those_of_their_rows(theirs):
    """Where lightly is installed, whole gradients are compared, but not DCLW's, whose weights have one here alone."""
    params, queue = built(LOSSES_OF_LIGHTLY[theirs]), None
    if theirs.split("(")[0] in OF_ALL_VIEWS:
        z, prototypes = sines(4, 40, 16).requires_grad_(), sines(params.n_prototypes or 1, 16)
        found = loss_of_all_views(params, z, prototypes)
    else:
        z, prototypes = sines(2, 6, 128).requires_grad_(), None
        queue = sines(4096, 128) if "memory_bank_size" in theirs else None
        found = our_loss(params, *z, queue)
    (gradient,) = torch.autograd.grad(found, z)
    loss, *norms = LIGHTLY[theirs]
    assert found.item() == pytest.approx(loss, rel=1e-6, abs=1e-9)  # some constants of lightly are in float32
    assert "DCLW" in theirs or gradient.flatten(1).norm(dim=1).tolist() == pytest.approx(norms, rel=1e-4, abs=1e-9)
    if lightly_loss:
        expected = loss_of_lightly(theirs, z, prototypes, queue)
        (their_gradient,) = torch.autograd.grad(expected, z)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
        assert "DCLW" in theirs or torch.allclose(gradient, their_gradient, rtol=1e-4, atol=1e-7)


STABLE_PRETRAINING = {  # loss, and norms of its gradients with respect to both views, of views_of_sines()
    "NTXEntLoss(temperature=0.5)": (1.225539528665655, 0.19475436866387544, 0.21052954952350747),
    "NTXEntLoss(temperature=0.1)": (0.6545024783027017, 0.694628402909793, 0.7060783174610027),
    "BYOLLoss()": (0.16483903339029551, 0.21225584576457804, 0.2110922384234656),
    "VICRegLoss()": (9.151976657447321, 2.946524624738795, 2.8700192093629115),
    "VICRegLoss(sim_coeff=10, std_coeff=20, cov_coeff=2)": (7.803569500687542, 1.271577333765882, 1.293492009003933),
    "NegativeCosineSimilarity()": (1 - 0.9175804833048522, 0.10612792288228902, 0.1055461192117328),
}


def views_of_sines() -> list[Tensor]:
    """Return two batches [6, 5] without random numbers, which may change between versions of torch."""
    views = [[[math.sin(start + 1.7 * n + 0.9 * d * d) for d in range(5)] for n in range(6)] for start in (0.0, 0.4)]
    return [torch.tensor(view, dtype=torch.float64, requires_grad=True) for view in views]


def test_losses_of_stable_pretraining_are_those_of_their_rows():
    found = rows("stable-pretraining", r"\w+(?:Loss|Similarity)\(.*?\)")
    assert {theirs for theirs, _ in found} == {*STABLE_PRETRAINING}
    for theirs, ours in found:
        z = views_of_sines()
        loss = our_loss(built(ours), *z, None)
        values = (loss.item(), *(gradient.norm().item() for gradient in torch.autograd.grad(loss, z)))
        assert values == pytest.approx(STABLE_PRETRAINING[theirs], abs=1e-9), theirs


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # by lightly's DINOProjectionHead
@pytest.mark.parametrize("theirs, ours", rows("lightly", r"\w+Head\(.*?\)"))
def test_heads_of_lightly_are_those_of_their_rows(theirs, ours):
    heads = pytest.importorskip("lightly.models.modules.heads")
    params = built(ours)
    kind = "prediction" if "Prediction" in theirs else "projection"
    ours = MLP(512 if kind == "projection" else params.dim, output_dim=params.dim, **params.head(kind))
    assert [repr(layer) for layer in eval(theirs, vars(heads)).layers] == [repr(layer) for layer in ours.net]


def steps(transform) -> list:
    """Return the single steps of a transform of lightly."""
    inner = getattr(transform, "transform", None)
    parts = getattr(transform, "transforms", None) if type(transform).__name__ == "Compose" else None
    if parts is None and type(inner).__name__ == "Compose":
        parts = inner.transforms
    return [transform] if parts is None else [step for part in parts for step in steps(part)]


def view_of_lightly(transform) -> dict:
    """Return the settings of ViewSettings that a transform of one view has."""
    by_name = {type(step).__name__: step for step in steps(transform)}
    jitter, crop, blur = (by_name[name] for name in ("RandomApply", "RandomResizedCrop", "GaussianBlur"))
    (colors,) = jitter.transforms
    found = {name: getattr(colors, name)[1] - 1 for name in ("brightness", "contrast", "saturation")}
    solarize = by_name.get("RandomSolarization")
    return found | {
        "hue": colors.hue[1],
        "crop_scale": tuple(crop.scale),
        "jitter_probability": jitter.p,
        "grayscale_probability": by_name["RandomGrayscale"].p,
        "flip_probability": by_name["RandomHorizontalFlip"].p,
        "blur_probability": blur.prob,
        "blur_sigma": blur.sigmas,
        "solarize_probability": solarize.prob if solarize else 0.0,
    }


@pytest.mark.parametrize("theirs, ours", rows("lightly", r"\w+Transform\(\)"))
def test_transforms_of_lightly_are_those_of_their_rows(theirs, ours):
    transforms = vars(pytest.importorskip("lightly.transforms"))
    found = [attrs.asdict(view) for view in built(ours).views]
    expected = [view_of_lightly(transform) for transform in eval(theirs, transforms).transforms]
    assert len(found) == len(expected)
    for view, settings in zip(found, expected, strict=True):
        for name, value in settings.items():
            assert view[name] == pytest.approx(value), name


METHODS = [(name, *row) for name in ("lightly", "stable-pretraining") for row in rows(name, r"[\w.]+")]


@pytest.mark.parametrize("section, theirs, ours", METHODS)
def test_rows_of_methods_train(section, theirs, ours, small_data):
    params = built(re.sub("2048|4096|8192", "64", ours))
    model = SelfSupervisedMethod(
        attrs.evolve(params, dataset_name="cifar10", batch_size=4, K=8, warmup_epochs=0, evaluations=[], seed=0),
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16)),
    )
    before = model.model[1].weight.clone()
    trainer = ShortTrainer()
    trainer.fit(model)
    assert not torch.equal(before, model.model[1].weight)


def test_loaders_of_lightly_are_used_as_they_are(small_data):
    data = pytest.importorskip("lightly.data")
    transform = pytest.importorskip("lightly.transforms").SimCLRTransform(input_size=32)
    loader = torch.utils.data.DataLoader(data.LightlyDataset("dataset", transform), batch_size=4)
    params = ModelParams(dataset_name="cifar10", K=8, evaluations=[], seed=0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16))
    ShortTrainer().fit(SelfSupervisedMethod(params, encoder=encoder), loader)
