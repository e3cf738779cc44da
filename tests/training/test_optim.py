"""Settings of each parameter at each step: options, layer decay, schedules, clipped LARS."""

import math
import warnings

import attrs
import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from lars import LARS
from linear_classifier import LinearClassifierMethod
from moco import SelfSupervisedMethod
from self_supervised.training import online_classifier, optimizers, parameter_groups, schedules
from self_supervised.training.checkpoints import Checkpoints, newest
from self_supervised.training.monitor import LearningRate
from self_supervised.training.plan import Plan
from self_supervised.views import augmentations


class TinyEncoder(nn.Module):
    """Encoder of four stages: two convolutions, each with a norm, and two linear layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(1, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.middle, self.bn2 = nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.third, self.last = nn.Linear(4, 8), nn.Linear(8, 6)

    def forward(self, x):
        x = self.bn2(self.middle(self.bn1(self.stem(x)).relu())).relu().mean((2, 3))
        return self.last(self.third(x).relu())


@pytest.fixture
def method(small):
    def build(preset: str = "moco_v2", **fields) -> SelfSupervisedMethod:
        torch.manual_seed(4)
        return SelfSupervisedMethod(small(preset, evaluations=[], **fields), encoder=TinyEncoder())

    return build


def rows_of(method) -> dict:
    return {row.name: row for row in method.parameter_table()}


class Record(pl.Callback):
    """Callback that records learning rates and weight decays of the groups, and the gradients, at each step."""

    def __init__(self):
        self.lr, self.decay, self.gradients = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.lr.append([group["lr"] for group in optimizer.param_groups])
        self.decay.append([group["weight_decay"] for group in optimizer.param_groups])
        self.gradients.append({n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None})


# ---- the table ----


def test_the_table_has_each_trainable_parameter_once(small):
    model = SelfSupervisedMethod(small("byol", encoder_arch="resnet18"))
    rows = model.parameter_table()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [row.name for row in rows] == list(trainable)
    assert not any(row.name.startswith("lagging") for row in rows)
    for row in rows:
        p = trainable[row.name]
        assert row.shape == tuple(p.shape) and (row.lr, row.momentum, row.layer_factor) == (0.5, 0.9, 1)
        assert row.adapted == (p.ndim > 1) and row.weight_decay == (1e-4 if p.ndim > 1 else 0)
    text = parameter_groups.printed(rows, "lars").splitlines()
    assert (
        len(text) == 1 + len(rows) and len({*map(len, text)}) == 1 and any("512 x 512 x 3 x 3" in line for line in text)
    )
    assert [line.split()[0] for line in text[1:]] == list(trainable)


@pytest.mark.parametrize(
    ("optimizer", "head"),
    [("lars", "layer momentum decay LARS"), ("sgd", "layer momentum decay"), ("adamw", "layer decay final decay")],
)
def test_the_printed_table_has_the_columns_of_its_optimizer(optimizer, head, method):
    model = method(optimizer_name=optimizer, final_weight_decay=0.1 if "final" in head else None)
    text = parameter_groups.printed(model.parameter_table(), optimizer).splitlines()
    assert text[0].split() == ["parameter", "shape", "lr", *head.split()]
    assert text[1].split()[-1] == {"lars": "yes", "sgd": "0.0001", "adamw": "0.1"}[optimizer]
    scaled = parameter_groups.printed(model.parameter_table(), optimizer, "linear").splitlines()
    assert " lr before lr_scaling " in scaled[0] and scaled[1].split() == text[1].split()


def test_options_by_regular_expression(method):
    """Later rows replace the same values of earlier ones, and nothing else."""
    model = method(
        "byol",
        lr=0.4,
        weight_decay=0.01,
        parameter_options=[
            {"pattern": r"^model\.", "lr_mult": 0.5, "weight_decay_mult": 2},
            {"pattern": r"stem|bn1", "lr": 0.03, "momentum": 0.5},
            {"pattern": r"bn1\.weight$", "weight_decay": 0.3, "lars_exclude": False},
            {"pattern": r"middle\.weight", "lars_exclude": True, "lr_mult": 0.0},
        ],
    )
    rows = rows_of(model)
    found = {name: (r.lr, r.momentum, r.weight_decay, r.adapted) for name, r in rows.items()}
    assert found["model.last.weight"] == (0.2, 0.9, 0.02, True)
    assert found["model.last.bias"] == (0.2, 0.9, 0.0, False)  # a multiple of 0
    assert found["model.stem.weight"] == (0.03, 0.5, 0.02, True)
    assert found["model.bn1.weight"] == (0.03, 0.5, 0.3, True)
    assert found["model.bn1.bias"] == (0.03, 0.5, 0.0, False)
    assert found["model.middle.weight"] == (0.0, 0.9, 0.02, False)
    assert found["projection_model.net.0.weight"] == (0.4, 0.9, 0.01, True)


@pytest.mark.parametrize("optimizer", ["sgd", "lars", "adamw", "adam"])
def test_groups_are_the_table(optimizer, method, trainer):
    """Parameters with equal rows share one group, which has the values of the rows."""
    options = [{"pattern": "stem", "lr_mult": 0.1}, {"pattern": r"last\.weight", "weight_decay": 0.2}]
    fields = {"exclude_matching_parameters_from_lars": [".bias", ".bn"], "lr_scaling": "linear", "lr_batch_size": 8}
    model, record = method(optimizer_name=optimizer, lr=0.01, parameter_options=options, **fields), Record()
    before = model.model.stem.weight.detach().clone()
    fit = trainer(callbacks=[record])
    fit.fit(model)
    rows, groups = rows_of(model), fit.optimizers[0].param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    members = [{names[id(p)] for p in group["params"]} for group in groups]
    assert sorted(name for group in members for name in group) == sorted(rows)
    assert len(groups) == len({(r.lr, r.weight_decay, r.adapted) for r in rows.values()}) == 5
    for i, (group, own) in enumerate(zip(groups, members, strict=True)):
        for row in map(rows.get, own):
            assert (group["initial_lr"], group["weight_decay"]) == (row.lr * 16 / 8, row.weight_decay)
            assert record.lr[0][i] == group["initial_lr"]
            assert group.get("momentum", 0.9) == 0.9 and group.get("adapt", row.adapted) == row.adapted
    assert not torch.equal(model.model.stem.weight, before)
    assert "model.stem.weight" in optimizers.groups_text(fit.optimizers[0])
    own = torch.optim.SGD(model.parameters())  # of a user, in one group
    assert optimizers.groups_text(own) == f"parameters: {len(own.param_groups[0]['params'])}"


def test_groups_have_names_of_their_own_even_if_both_usual_ones_are_empty(method):
    """Lightning's LearningRateMonitor needs them."""
    model = method(parameter_options=[{"pattern": "", "lr_mult": 0.1}])
    groups = parameter_groups.optimizer_groups(
        list(rows_of(model).values()), dict(model.named_parameters()), model.params
    )
    assert [len(group["params"]) for group in groups[:2]] == [0, 0]
    assert len({group["name"] for group in groups}) == len(groups)


def test_steps_with_options_equal_sgd_written_out(method, trainer):
    """Steps in float64 from the recorded gradients: every parameter with its learning rate, momentum and decay."""
    options = [
        {"pattern": "model", "lr_mult": 0.5},
        {"pattern": r"bias$", "momentum": 0.0, "weight_decay": 0.0},
        {"pattern": "stem", "lr": 0.01, "weight_decay_mult": 30},
    ]
    model, record = method(lr=0.1, weight_decay=0.01, parameter_options=options, lr_schedule="constant"), Record()
    values = {name: p.detach().double() for name, p in model.named_parameters() if p.requires_grad}
    first, rows = dict(values), rows_of(model)
    velocities = {name: torch.zeros_like(value) for name, value in values.items()}
    trainer(callbacks=[record], limit_train_batches=4).fit(model)
    for gradients in record.gradients:
        for name, value in values.items():
            row = rows[name]
            velocities[name] = row.momentum * velocities[name] + gradients[name] + row.weight_decay * value
            values[name] = value - row.lr * velocities[name]
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert torch.allclose(p.double(), values[name], rtol=1e-5, atol=1e-6), name
    assert rows["model.stem.weight"].weight_decay == pytest.approx(0.3)
    assert (values["model.stem.weight"] - first["model.stem.weight"]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([{"pattern": "stem", "lr_mul": 2}], r"unknown keys \['lr_mul'\].* lr_mult\?"),
        ([{"pattern": "stem", "learning_rate": 2}], r"unknown keys .* Did you mean lr\?"),
        ([{"lr_mult": 2}], "needs a pattern"),
        ([{"pattern": "stem("  , "lr": 0.1}], "regular expression"),
        ([{"pattern": "stem", "lr": -0.1}], "a number of at least 0 and at most 1000 as lr"),
        ([{"pattern": "stem", "momentum": math.nan}], "a number .* as momentum"),
        ([{"pattern": "stem", "lars_exclude": 1}], "True or False as lars_exclude"),
        ([{"pattern": "stem", "lr": 0.1, "lr_mult": 2}], "both lr and lr_mult"),
        ([{"pattern": "stem"}], "has no option"),
        ({"pattern": "stem", "lr": 1}, "must be a list of dictionaries"),
        (["stem"], "must be a list of dictionaries"),
        ([{"pattern": "stem", "lars_exclude": True}], "optimizer_name='lars', not for 'sgd'"),
        ([{"pattern": r"model\.sten\.weight", "lr": 1}], "matches none of .* some are model.stem.weight"),
        ([{"pattern": "^lagging_model", "lr": 1}], "matches none of"),
    ],
)  # fmt: skip
def test_invalid_parameter_options_are_refused_at_construction(options, message, method):
    with pytest.raises(ValueError, match=f"parameter_options.*{message}"):
        method(parameter_options=options)


def test_unmatched_exclusions_are_refused_except_norms_and_biases(method):
    with pytest.raises(
        ValueError,
        match="exclude_matching_parameters_from_lars: the pattern '.nonsense' matches none of .*'.bn' matches every",
    ):
        method(exclude_matching_parameters_from_lars=[".bias", ".nonsense"])
    fields = {"projection_mlp_layers": 0, "dim": 6, "exclude_matching_parameters_from_lars": [".bias", ".bn"]}
    bare = nn.Sequential(nn.Flatten(), nn.Linear(64, 6, bias=False))
    assert list(rows_of(SelfSupervisedMethod(method().params, encoder=bare, **fields))) == ["model.1.weight"]


def test_layer_decay_follows_the_stages(method, small):
    """ResNet-18: heads 1, layer4 0.5, layer3 0.25, ...; the stem with its norm has the smallest factor."""
    model = SelfSupervisedMethod(small(encoder_arch="resnet18", layer_decay=0.5, lr=0.8))
    for name, row in rows_of(model).items():
        part = name.split(".")[1]
        depth = 5 - int(part[-1]) if part.startswith("layer") else 5
        expected = 0.5**depth if name.startswith("model.") else 1.0
        assert row.layer_factor == expected and row.lr == 0.8 * expected, name
    own = method(layer_decay=0.5, lr=1.0, parameter_options=[{"pattern": "third", "lr_mult": 3}])
    rows = rows_of(own)
    found = [rows[f"model.{stage}.weight"].lr for stage in ("stem", "bn1", "middle", "third", "last")]
    assert found == [1 / 16, 1 / 16, 1 / 8, 3 / 4, 1 / 2]
    assert len(parameter_groups.layer_groups(own.model)) == 4


# ---- LARS, clipped ----


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_clipped_lars_equals_its_formula(weight_decay):
    """The effective learning rate is min(eta |p| / |g|, lr), as in LARC; computed in float64 with plain branches."""
    scales = (1e-3, 1.0, 1e3)  # some are clipped, others are not
    values = [torch.randn(4, 3, dtype=torch.float64) * s for s in scales] + [torch.zeros(2, 2, dtype=torch.float64)]
    params = [nn.Parameter(v.clone()) for v in values]
    optimizer = LARS(params, lr=1.0, momentum=0.9, weight_decay=weight_decay, eta=0.02, clip=True)
    velocities, clipped = [torch.zeros_like(v) for v in values], set()
    for lr in (0.05, 0.01, 0.2, 0.0):
        optimizer.param_groups[0]["lr"] = lr
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            g = p.grad + weight_decay * values[i]
            q = 1.0
            if values[i].norm() > 0 and g.norm() > 0 and lr > 0:
                own = 0.02 * (values[i].norm() / g.norm()).item()
                q = min(own, lr) / lr
                clipped.add(own > lr)
            velocities[i] = 0.9 * velocities[i] + q * g
            values[i] = values[i] - lr * velocities[i]
        optimizer.step()
        for p, expected in zip(params, values, strict=True):
            assert torch.allclose(p, expected, rtol=1e-12, atol=1e-12)
    assert clipped == {True, False}


def test_grad_clip_lars_reaches_the_optimizer(method, trainer):
    clipped, plain = (method("byol", lr=1e-4, lars_eta=1.0, grad_clip_lars=clip) for clip in (True, False))
    moved = []
    for model in (clipped, plain):
        before = model.projection_model.net[0].weight.detach().clone()
        trainer(limit_train_batches=1).fit(model)
        moved.append((model.projection_model.net[0].weight - before).norm().item() / before.norm().item())
    assert moved[1] == pytest.approx(1e-4, rel=0.01)  # lr eta: in proportion to the weights
    assert moved[0] != pytest.approx(moved[1], rel=0.1)
    with pytest.raises(ValueError, match="grad_clip_lars=True is for optimizer_name='lars', not for 'sgd'"):
        method(grad_clip_lars=True)


# ---- schedules ----


def torchs(build, steps: int, peak: float = 0.4) -> list[float]:
    """Return the learning rates of one of PyTorch's schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule, found = build(optimizer), []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*epoch parameter")  # from within SequentialLR of PyTorch
        for _ in range(steps):
            found += schedule.get_last_lr()
            optimizer.step()
            schedule.step()
    return found


PYTORCH = torch.optim.lr_scheduler
SCHEDULES = {
    "cosine": lambda o: PYTORCH.CosineAnnealingLR(o, T_max=40, eta_min=0.04),
    "linear": lambda o: PYTORCH.LinearLR(o, start_factor=1.0, end_factor=0.1, total_iters=40),
    "constant": lambda o: PYTORCH.ConstantLR(o, factor=1.0),
    "steps": lambda o: PYTORCH.MultiStepLR(o, [15, 30], gamma=0.5),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rates_equal_pytorchs_schedulers(name, small):
    """Without a warm-up, and after one that rises from 0.08: 50 steps, 5 per epoch, 10 of warm-up."""
    fields = {"lr": 0.4, "final_lr_schedule_value": 0.04, "lr_schedule": name, "warmup_start_lr": 0.08}
    fields |= {"lr_decay_steps": [3, 6], "lr_decay_factor": 0.5} if name == "steps" else {}
    p = small(**fields)
    plan = Plan(1, 1, 16, 0.4, 40, 5)
    found = [0.4 * schedules.pretraining_lr_fraction(p, plan, step) for step in range(41)]
    assert found == pytest.approx(torchs(SCHEDULES[name], 41))
    plan = Plan(1, 1, 16, 0.4, 50, 5, warmup_steps=10)
    found = [0.4 * schedules.pretraining_lr_fraction(p, plan, step) for step in range(51)]
    first = [0.08 + (0.4 - 0.08) * (step + 1) / 10 for step in range(10)]
    # Decay steps count epochs from the start of the training; other curves start after the warm-up.
    later = torchs(SCHEDULES[name], 51)[10:] if name == "steps" else torchs(SCHEDULES[name], 41)
    assert found == pytest.approx(first + later)


def test_steps_do_not_fall_below_the_final_learning_rate(small):
    p = small(lr_schedule="steps", lr_decay_steps=[1, 2, 3], lr=0.1, final_lr_schedule_value=0.002)
    found = [0.1 * schedules.pretraining_lr_fraction(p, Plan(1, 1, 16, 0.1, 40, 10), step) for step in (9, 10, 20, 30)]
    assert found == pytest.approx([0.1, 0.01, 0.002, 0.002])


def test_decay_steps_after_the_last_epoch_give_a_warning(method, trainer):
    model = method(lr_schedule="steps", lr_decay_steps=[0.5, 1, 400])
    with pytest.warns(UserWarning, match=r"lr_decay_steps=\[1, 400\] are beyond the 2 steps of the training"):
        trainer().fit(model)


LR = 0.001
# Factors of lr and weight decay, in the order of the groups; None: constant.
FACTORS = [(1.0, 1.0), (1.0, 0.0), (0.1, 3.0), (0.1, 0.0), (1.0, None)]


def test_every_group_follows_rate_and_decay(method, trainer):
    """Weight decay goes from 0.02 to 0.1 along DINO's cosine: in proportion with weight_decay_mult, constant with
    weight_decay, and 0 if excluded. Two epochs of four batches, two accumulated."""
    options = [{"pattern": "stem", "weight_decay_mult": 3, "lr_mult": 0.1}]
    options += [{"pattern": r"projection_model.*weight", "weight_decay": 0.05}]
    excluded = {"exclude_matching_parameters_from_lars": [".bias", ".bn"]}
    for name in ("sgd", "lars", "adamw"):
        model = method(
            optimizer_name=name, lr=LR, weight_decay=0.02, final_weight_decay=0.1, lr_schedule="linear",
            parameter_options=options, **excluded,
        )  # fmt: skip
        record = Record()
        trainer(max_epochs=2, limit_train_batches=4, accumulate_grad_batches=2, callbacks=[record]).fit(model)
        decay = [0.1 + (0.02 - 0.1) * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
        lr = [LR * (1 - step / 4) for step in range(4)]
        assert len(record.decay) == 4
        for step in range(4):
            for found, factors in zip(zip(record.lr[step], record.decay[step], strict=True), FACTORS, strict=True):
                expected = 0.05 if factors[1] is None else factors[1] * decay[step]
                assert found == pytest.approx((factors[0] * lr[step], expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_schedule": "steps"}, r"lr_schedule='steps' needs .* lr_decay_steps, for example \[192, 256\]"),
        ({"lr_decay_steps": [3]}, r"lr_decay_steps=\[3\] is for lr_schedule='steps', not for 'cosine'"),
        ({"lr_schedule": "steps", "lr_decay_steps": [-1]}, "lr_decay_steps=-1 must be at least 0"),
        ({"lr_schedule": "steps", "lr_decay_steps": 3}, "lr_decay_steps=3 must be a list of numbers"),
        ({"lr_schedule": "steps", "lr_decay_steps": [True]}, "lr_decay_steps=True must be a number"),
        ({"lr_schedule": "exponential"}, "lr_schedule='exponential' is unknown: choose one of cosine, linear"),
        ({"warmup_start_lr": 0.6}, "warmup_start_lr=0.6 is above lr=0.5"),
        ({"final_lr_schedule_value": 0.6}, "final_lr_schedule_value=0.6 is above lr=0.5, from .* such as 0"),
        ({"weight_decay": 0, "final_weight_decay": 0.1}, "final_weight_decay=0.1 needs weight_decay above 0"),
        ({"final_weight_decay": 5}, "lr=0.5 times final_weight_decay=5 is above 2"),
        ({"layer_decay": 0}, "layer_decay=0 must be above 0"),
        ({"optimizer_name": "adam", "parameter_options": [{"pattern": "", "momentum": 0.5}]}, "momentum, which"),
    ],
)
def test_contradictions_are_refused(fields, message, small):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_a_resumed_run_equals_the_uninterrupted_one(method, trainer, tmp_path):
    fields = {
        "lr_schedule": "steps", "lr_decay_steps": [1, 2], "lr_decay_factor": 0.5, "final_weight_decay": 0.1,
        "layer_decay": 0.7, "warmup_epochs": 1, "warmup_start_lr": 0.1, "grad_clip_lars": True,
        "parameter_options": [{"pattern": "stem", "lr_mult": 0.5, "momentum": 0.3}, {"pattern": "third", "lr": 0.2}],
    }  # fmt: skip

    def run(folder: str, until: int, resume: bool = False) -> tuple[dict, list]:
        model, record = method("byol", **fields), Record()
        stop = Stop(until)
        fit = trainer(max_epochs=3, callbacks=[record, stop, Checkpoints(tmp_path / folder)])
        fit.fit(model, ckpt_path=newest(tmp_path / folder) if resume else None)
        groups = [{k: v for k, v in g.items() if k != "params"} for g in fit.optimizers[0].param_groups]
        return model.state_dict(), record.lr, record.decay, groups

    class Stop(pl.Callback):
        def __init__(self, epochs):
            self.epochs = epochs

        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch + 1 >= self.epochs

    whole = run("whole", 3)
    run("parts", 1)
    parts = run("parts", 3, resume=True)
    assert all(torch.equal(parts[0][name], value) for name, value in whole[0].items())
    assert parts[1] == whole[1][2:] and parts[2] == whole[2][2:] and parts[3] == whole[3]
    assert len({*map(tuple, whole[1])}) > 3


def test_the_settings_survive_in_a_checkpoint(method, trainer, tmp_path):
    options = [{"pattern": "stem", "lr_mult": 0.5}]
    model = method(parameter_options=options, lr_schedule="steps", lr_decay_steps=(0, 0.5), mlp_normalization="bn")
    fit = trainer()
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "example.ckpt")
    found = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "example.ckpt", encoder=TinyEncoder())
    assert found.params == attrs.evolve(model.params, embedding_dim=6) and found.params.parameter_options == options
    assert found.parameter_table() == model.parameter_table()


# ---- the online classifier ----


@pytest.mark.parametrize("preset", ["moco_v2", "byol"])
def test_the_online_classifier_is_softmax_regression_alongside_the_method(preset, method, trainer):
    """The method ends with the same bits as without it; its weights equal SGD in float64 on the embeddings."""
    seen = []

    def keep(module, _, embeddings):
        seen.extend([embeddings.detach().double()] * module.training)

    class Batches(Record):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 0:
                module.model.register_forward_hook(keep)
            self.labels = [*getattr(self, "labels", []), batch[1]]

    fields = {
        "lr": 0.05,
        "weight_decay": 0.01,
        "lr_schedule": "constant",
        "parameter_options": [{"pattern": "model", "lr_mult": 0.5}],
    }
    model, record = method(preset, online_classifier=True, online_classifier_lr=0.3, **fields), Batches()
    w, b = (p.detach().double() for p in model.online_classifier.parameters())
    fit = trainer(callbacks=[record], limit_train_batches=3)
    fit.fit(model)
    plain = method(preset, **fields)
    trainer(limit_train_batches=3).fit(plain)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in plain.state_dict().items())
    assert set(state) - set(plain.state_dict()) == {"online_classifier.weight", "online_classifier.bias"}
    views = len(seen) // 3
    assert {"online_classifier.weight", "online_classifier.bias"} <= rows_of(model).keys()
    vw = vb = 0
    for x, y in zip(seen[::views], record.labels, strict=True):
        wrong = (x @ w.T + b).softmax(1) - nn.functional.one_hot(y, 10)
        accuracy = 100 * ((x @ w.T + b).argmax(1) == y).double().mean()
        vw, vb = 0.9 * vw + wrong.T @ x / len(x), 0.9 * vb + wrong.mean(0)
        w, b = w - 0.3 * vw, b - 0.3 * vb
    assert torch.allclose(state["online_classifier.weight"].double(), w, atol=1e-5)
    assert torch.allclose(state["online_classifier.bias"].double(), b, atol=1e-5)
    assert fit.callback_metrics["online_train_acc1"].item() == pytest.approx(accuracy.item())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_sees_the_methods_gradients_alone(algorithm, method, trainer):
    def weights(**fields) -> dict:
        model = method(lr=0.05, **fields)
        trainer(gradient_clip_val=1e-3, gradient_clip_algorithm=algorithm).fit(model)
        return model.state_dict()

    plain, beside = weights(), weights(online_classifier=True)
    assert all(torch.equal(beside[name], value) for name, value in plain.items())
    start = method(online_classifier=True).online_classifier.weight
    assert (beside["online_classifier.weight"] - start).abs().max() > 1e-3  # its gradient is restored


def test_the_logged_learning_rate_is_not_the_online_classifiers(method, trainer):
    logged = []

    class Log(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            logged.append(trainer.callback_metrics["lr"].item())

    model = method(lr=0.01, online_classifier=True, lr_schedule="constant")
    trainer(callbacks=[LearningRate(), Log()], log_every_n_steps=1).fit(model)
    assert logged == pytest.approx([0.01, 0.01])


def test_an_online_classifier_without_labels_is_refused(method, monkeypatch):
    monkeypatch.setattr("self_supervised.data.facts.n_classes", lambda _: 0)
    with pytest.raises(ValueError, match="dataset_name='digits', .*no labels, which a classifier needs"):
        method(online_classifier=True)


def test_the_online_classifier_learns_is_scored_and_saved(method, trainer, tmp_path):
    model = method(online_classifier=True, online_classifier_lr=1.0, lr=1e-3, batch_size=64, warmup_epochs=0)
    fit = trainer(max_epochs=4, limit_train_batches=1.0, limit_val_batches=1.0)
    fit.fit(model)
    scores = {name: value.item() for name, value in fit.callback_metrics.items()}
    assert 20 < scores["valid_online_acc1"] < scores["valid_online_acc5"] <= 100
    loader, model = fit.val_dataloaders, model.eval()
    loader = loader[0] if isinstance(loader, list) else loader
    right = n = 0
    with torch.no_grad():
        for images, labels in loader:
            x, y = augmentations.for_evaluation(images, model.params), labels
            order = model.online_classifier(model(x)).argsort(1, descending=True)
            right, n = right + (order[:, :5] == y[:, None]).any(1).sum().item(), n + len(y)
    assert scores["valid_online_acc5"] == pytest.approx(100 * right / n)
    fit.save_checkpoint(tmp_path / "example.ckpt")
    again = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "example.ckpt", encoder=TinyEncoder())
    assert trainer(limit_val_batches=1.0).validate(again, verbose=False)[0]["valid_online_acc1"] == pytest.approx(
        scores["valid_online_acc1"]
    )
    LinearClassifierMethod.from_moco_checkpoint(tmp_path / "example.ckpt", encoder=TinyEncoder())


def test_images_without_labels_and_wrong_ones():
    classifier, x = nn.Linear(3, 4), torch.randn(5, 3)
    y = torch.tensor([0, -1, 3, -1, 2])
    loss, accuracy = online_classifier.loss_and_accuracy(classifier, x, y)
    known = y >= 0
    assert loss.item() == pytest.approx(nn.functional.cross_entropy(classifier(x[known]), y[known]).item())
    assert accuracy.item() == pytest.approx(100 * (classifier(x[known]).argmax(1) == y[known]).float().mean().item())
    none, accuracy = online_classifier.loss_and_accuracy(classifier, x, torch.full((5,), -1))
    none.backward()
    assert none.item() == 0 and classifier.weight.grad.abs().max() == 0 and accuracy.isnan()
    assert online_classifier.accuracies(classifier, x, None) == {}
    for labels, message in (
        (None, "needs one label per image"),
        (torch.tensor([4] * 5), "yields the label 4, .* has the 4 cl"),
    ):
        with pytest.raises(ValueError, match=f"{message}"):
            online_classifier.loss_and_accuracy(classifier, x, labels)


# ---- the Trainer's length ----


LENGTHS = [  # options of the Trainer, optimizer steps, and steps per epoch
    ({"max_epochs": None, "max_steps": 10}, 10, 4),
    ({"max_epochs": None, "max_steps": 3}, 3, 4),
    ({"max_epochs": 3}, 12, 4),
    ({"max_epochs": 3, "max_steps": 5}, 5, 4),
    ({"max_epochs": 2, "max_steps": 100}, 8, 4),
    ({"max_epochs": 2, "max_time": "00:01:00:00"}, 8, 4),
    ({"max_epochs": None, "max_steps": 4, "accumulate_grad_batches": 3}, 4, 2),
]
LENGTHS_OF_16_BATCHES = [
    ({"max_epochs": 2, "limit_train_batches": 0.5}, 16, 8),
    ({"max_epochs": None, "max_steps": 10, "limit_train_batches": 0.5}, 10, 8),
    ({"max_epochs": None, "max_steps": 20, "limit_train_batches": None}, 20, 16),
]


@pytest.mark.parametrize(
    ("loader", "options", "steps", "an_epoch"),
    [(None, *row) for row in LENGTHS] + [("own", *row) for row in LENGTHS + LENGTHS_OF_16_BATCHES],
)
def test_rates_follow_the_length_that_the_trainer_has(loader, options, steps, an_epoch, method, trainer):
    """Half an epoch of warm-up, a tenth of lr from the first epoch on, and scaling by the loader's batch size."""
    fields = {"lr_schedule": "steps", "lr_decay_steps": [1], "lr_scaling": "linear", "lr_batch_size": 8}
    if loader is not None:
        loader = torch.utils.data.DataLoader(torch.zeros(256, 1, 8, 8, dtype=torch.uint8), batch_size=16)
    model, record = method(lr=0.1, warmup_epochs=0.5, batch_size=16, **fields), Record()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "lr_decay_steps=")
        trainer(**{"limit_train_batches": 4, "callbacks": [record], **options}).fit(model, loader)
    assert (model.plan.steps, model.plan.steps_per_epoch) == (steps, an_epoch)
    factor = 2 * options.get("accumulate_grad_batches", 1)  # images per step / 8
    warm = [0.1 * (step + 1) / (an_epoch / 2) if step < an_epoch / 2 else 0.1 for step in range(steps)]
    expected = [factor * (lr if step < an_epoch else 0.01) for step, lr in enumerate(warm)]
    assert [groups[0] for groups in record.lr] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        *(("pretraining", name) for name in ("cosine", "linear", "constant", "steps")),
        *(("linear", name) for name in ("cosine", "steps")),
    ],
)
def test_every_schedule_ends_with_max_steps(stage, name, method, trainer):
    """Learning rates of max_steps=10 equal those of two epochs of five steps."""
    found = []
    for options in ({"max_epochs": None, "max_steps": 10}, {"max_epochs": 2}):
        if stage == "pretraining":
            more = {"lr_decay_steps": [1]} if name == "steps" else {}
            model = method(lr=0.1, lr_schedule=name, use_momentum_schedule=True, warmup_epochs=0.4, **more)
        else:
            fields = {"dataset_name": "digits", "batch_size": 16, "seed": 0, "lr_schedule": name, "warmup_epochs": 0.4}
            model = LinearClassifierMethod(encoder=TinyEncoder(), **fields)
        record = Record()
        trainer(limit_train_batches=5, limit_val_batches=0, callbacks=[record], **options).fit(model)
        found.append(record.lr)
    assert found[0] == found[1] and len(found[0]) == 10 and len({rates[0] for rates in found[0]}) > 1


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.zeros(1, 8, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"max_epochs": -1, "max_time": "00:01:00:00"}, "max_epochs"),
        ({"warmup_epochs": 2}, {"max_epochs": None, "max_steps": 4}, "warmup_epochs"),
        ({"lr_schedule": "steps", "lr_decay_steps": [1]}, {"max_epochs": None, "max_steps": 4}, "lr_decay_steps"),
        (
            {"loss_type": "sce", "sce_target_T_warmup_epochs": 5, "sce_target_T_warmup_start": 0.07},
            {"max_epochs": None, "max_steps": 4},
            "sce_target_T_warmup_epochs=5 counts epochs",
        ),
        (
            {"preset": "swav", "prototypes_frozen_epochs": 1, "queue_from_epoch": 0},
            {"max_epochs": None, "max_steps": 4},
            "prototypes_frozen_epochs=1 counts epochs",
        ),
        ({}, {"max_epochs": 1, "limit_train_batches": 0}, "limit_train_batches=0 leaves no batch"),
    ],
)
def test_schedules_without_an_end_or_without_epochs_are_refused(fields, options, message, method, trainer):
    loader = torch.utils.data.DataLoader(Stream(), batch_size=16)
    with pytest.raises(ValueError, match=message):
        trainer(**{"limit_train_batches": None, **options}).fit(method(**fields), loader)


def test_an_endless_loader_has_a_warm_up_that_is_a_fraction_and_none_of_lars(method, trainer):
    loader = torch.utils.data.DataLoader(Stream(), batch_size=16)
    for preset, warmup_epochs, expected in (("moco_v2", 0.5, 2), ("byol", None, 0)):
        model = method(preset, warmup_epochs=warmup_epochs)
        trainer(limit_train_batches=None, max_epochs=None, max_steps=4).fit(model, loader)
        assert model.plan.warmup_steps == expected
