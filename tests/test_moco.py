"""SelfSupervisedMethod: how often views are encoded, when weights and queue change, and what users may pass."""

import argparse
import copy
import pickle
import re
from pathlib import Path

import attrs
import pytest
import pytorch_lightning as pl
import torch
import yaml
from conftest import TinyEncoder
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from linear_classifier import LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import ModelParams
from self_supervised import distributed, losses
from self_supervised.custom_loss import as_pair_loss
from self_supervised.data import data_sets
from self_supervised.data.batches import images_and_labels
from self_supervised.networks import frozen_encoder, pretrained
from self_supervised.networks.keys import ema_update
from self_supervised.training import schedules


@pytest.mark.parametrize(
    "name, online, lagging",
    [("moco_v2", 1, 1), ("eqco", 1, 1), ("sce", 2, 2), ("byol", 2, 2), ("simclr", 2, 0), ("vicreg", 2, 0),
     ("barlow_twins", 2, 0), ("moco_v1", 1, 1), ("dcl", 2, 0), ("moco_v3", 2, 2), ("simsiam", 2, 0), ("ressl", 1, 1)],
)  # fmt: skip
def test_each_view_is_encoded_once(name, online, lagging, small, trainer):
    model = SelfSupervisedMethod(small(name, evaluations=[]), encoder=TinyEncoder())
    heads = []
    model.projection_model.register_forward_hook(lambda *_: heads.append(1))
    trainer(limit_train_batches=1).fit(model)
    assert model.model.passes == online and len(heads) == online
    assert (model.lagging_model.passes if model.lagging_model else 0) == lagging


def test_built_from_params_dict_or_fields():
    params = ModelParams(encoder_arch="shufflenet_v2_x0_5", dataset_name="digits", K=8, batch_size=4, seed=5)
    for model in (
        SelfSupervisedMethod(params),
        SelfSupervisedMethod(attrs.asdict(params)),
        SelfSupervisedMethod(**attrs.asdict(params)),
        SelfSupervisedMethod(attrs.evolve(params, K=9), K=8),
    ):
        assert model.params == params and model.hparams.K == 8 and model.hparams["batch_size"] == 4
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 1024)
    with pytest.raises(TypeError, match="batchsize"):
        SelfSupervisedMethod(params, batchsize=3)


@pytest.mark.parametrize("build", [SelfSupervisedMethod, LinearClassifierMethod])
def test_hparams_is_another_name_of_params(build):
    fields = {"encoder_arch": "shufflenet_v2_x0_5", "dataset_name": "digits", "lr": 0.3}
    kind = ModelParams if build is SelfSupervisedMethod else LinearClassifierMethodParams
    for hparams in (kind(**fields), fields, argparse.Namespace(**fields)):
        assert build(hparams=hparams, seed=1).params == kind(**fields, seed=1)
    with pytest.raises(ValueError, match="hparams"):
        build(kind(**fields), hparams=fields)


@pytest.mark.slow
@pytest.mark.parametrize("build", [SelfSupervisedMethod, LinearClassifierMethod])
def test_hparams_cannot_be_changed(build, trainer, tmp_path):
    class Extended(build):
        def __init__(self, mine: int = 3, **fields):
            super().__init__(**fields)
            self.save_hyperparameters("mine")

    def refuses(model):
        for change in (
            lambda: setattr(model.hparams, "lr", 0.3),
            lambda: model.hparams.__setitem__("lr", 0.3),
            lambda: model.hparams.update(lr=0.3),
            lambda: model.hparams.update({"lr": 0.3}),
            lambda: model.hparams.__ior__({"lr": 0.3}),
            lambda: model.hparams.setdefault("lr", 0.3),
            lambda: model.hparams.update(learning_rate=0.3),
            lambda: model.hparams.pop("lr"),
            lambda: model.hparams.clear(),
        ):
            with pytest.raises(ValueError, match="hparams"):
                change()
        assert model.hparams.lr == model.hparams["lr"] == model.hparams_initial.lr == 0.1

    model = Extended(dataset_name="digits", batch_size=16, lr=0.1, seed=0, encoder=TinyEncoder())
    refuses(model)
    assert copy.deepcopy(model).hparams == model.hparams == pickle.loads(pickle.dumps(model.hparams))
    fit = trainer(logger=pl.loggers.CSVLogger(tmp_path))
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "example.ckpt", weights_only=False)
    assert yaml.safe_load((Path(fit.logger.log_dir) / "hparams.yaml").read_text())["lr"] == 0.1
    loaded = Extended.load_from_checkpoint(tmp_path / "example.ckpt", encoder=TinyEncoder())
    refuses(loaded)
    assert loaded.hparams == model.hparams and loaded.hparams.mine == 3
    assert Extended.load_from_checkpoint(tmp_path / "example.ckpt", encoder=TinyEncoder(), lr=0.3).hparams.lr == 0.3


@pytest.mark.parametrize("build", [SelfSupervisedMethod, LinearClassifierMethod])
def test_settings_replaced_after_construction_are_refused_by_fit(build, trainer):
    model = build(dataset_name="digits", batch_size=16, encoder=TinyEncoder())
    model.params = attrs.evolve(model.params, dataset_name="cifar10")
    with pytest.raises(ValueError, match=r"^dataset_name='cifar10': not the setting .* Build it again"):
        trainer().fit(model)


def test_a_subclass_may_record_its_own_arguments(trainer):
    class Doubled(SelfSupervisedMethod):
        def __init__(self, lr=0.1):
            super().__init__("simclr", lr=2 * lr, dataset_name="digits", encoder=TinyEncoder(), evaluations=[])
            self.save_hyperparameters()

    model = Doubled()
    trainer().fit(model)
    assert model.hparams.lr == 0.1 and model.params.lr == 0.2


def test_a_subclass_that_records_settings_and_encoder_leaves_good_checkpoints(small, trainer, tmp_path):
    class Mine(SelfSupervisedMethod):
        def __init__(self, params, encoder=None, alpha=0.5, betas=(0.1, 0.2), ignored=()):
            super().__init__(params, encoder=encoder)
            self.save_hyperparameters(ignore=ignored)

    params = small("simclr", evaluations=[])
    model, fit = Mine(params, TinyEncoder(), alpha=0.7), trainer()
    fit.fit(model)
    fit.save_checkpoint(tmp_path / "mine.ckpt")
    loaded = Mine.load_from_checkpoint(tmp_path / "mine.ckpt", params=params, encoder=TinyEncoder())
    assert loaded.hparams == model.hparams and loaded.hparams.alpha == 0.7 and "params" not in loaded.hparams
    encoder = pretrained.load_encoder(tmp_path / "mine.ckpt", encoder=TinyEncoder())
    assert torch.equal(encoder.model.net[1].weight, model.model.net[1].weight)
    assert "alpha" not in Mine(params, TinyEncoder(), ignored=["alpha", "encoder"]).hparams


@pytest.mark.parametrize("build", [SelfSupervisedMethod, LinearClassifierMethod])
def test_settings_as_a_whole_are_refused_next_to_those_of_a_checkpoint(build, trainer, tmp_path):
    """A subclass may have an argument of this name."""

    class Mine(build):
        def __init__(self, params, **fields):
            super().__init__(**fields)

    model, fit = build(dataset_name="digits", encoder=nn.Flatten(), lr=0.1, seed=0), trainer()
    fit.strategy.connect(model)
    fit.save_checkpoint(tmp_path / "x.ckpt")
    for passed in ({"params": model.params}, {"hparams": {"lr": 0.3}}):
        with pytest.raises(ValueError, match=f"^{next(iter(passed))}: a checkpoint has its own settings. Pass single"):
            build.load_from_checkpoint(tmp_path / "x.ckpt", encoder=nn.Flatten(), **passed)
    assert Mine.load_from_checkpoint(tmp_path / "x.ckpt", encoder=nn.Flatten(), params=3).hparams == model.hparams


def test_a_subclass_may_have_its_own_optimizer(small, trainer, tmp_path, caplog):
    class Own(SelfSupervisedMethod):
        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    model, plans = Own(small("byol", evaluations=[]), encoder=TinyEncoder()), []
    for n in (1, 2):  # the second training has a plan of its own
        trainer(max_epochs=n, logger=pl.loggers.CSVLogger(tmp_path)).fit(model)
        plans.append((model.plan.steps, model.plan.steps_per_epoch, model.plan.batch_size))
    assert plans == [(2, 2, 16), (4, 2, 16)] and model.plan.lr == 1e-3
    trainer().fit(Own(small("moco_v2", evaluations=[], K=4096, momentum=0.5), encoder=TinyEncoder()))
    (line,) = [message for message in caplog.messages if message.startswith("warning: ")]  # of the queue alone
    assert line.startswith("warning: K=4096: the queue has random vectors until step")


@pytest.mark.parametrize("decay", [{"weight_decay": 0.1}, {}])
def test_groups_of_an_own_optimizer_are_described_as_they_are(decay, small, trainer, caplog):
    """Without a schedule, which would add `initial_lr`; Lightning's LearningRateMonitor reads the names."""

    class Own(SelfSupervisedMethod):
        def configure_optimizers(self):
            parts = {"encoder": self.model, "heads": self.projection_model}
            lrs = dict(zip(parts, (1e-4, 1e-3), strict=True))
            names = dict.fromkeys(parts) if not decay else {part: {"name": part} for part in parts}
            groups = [{"params": parts[p].parameters(), "lr": lrs[p], **(names[p] or {})} for p in parts]
            return torch.optim.SGD(groups, lr=0.1, **decay)

    trainer().fit(Own(small("simclr", evaluations=[]), encoder=TinyEncoder()))
    (said,) = [message for message in caplog.messages if "parameter" in message and "steps" in message]
    lines = [" ".join(line.split()) for line in said.splitlines()]
    if decay:
        assert lines[-2:] == ["encoder 2 0.0001 0.1", "heads 4 0.001 0.1"]
    else:
        assert said.endswith("; parameters: 2 and 4")


def test_patterns_may_name_a_network_that_a_subclass_adds(small, trainer):
    class Own(SelfSupervisedMethod):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            self.extra = nn.Linear(2, 2)

    options = [{"pattern": "extra", "lr_mult": 10}]
    model = Own(small("simclr", evaluations=[], parameter_options=options), encoder=TinyEncoder())
    assert {row.name: row.lr for row in model.parameter_table()}["extra.weight"] == 10 * model.params.lr
    lost = Own(small("simclr", parameter_options=[{"pattern": "extr_", "lr_mult": 10}]), encoder=TinyEncoder())
    with pytest.raises(ValueError, match="the pattern 'extr_' matches none of"):
        trainer().fit(lost)


def test_seed_decides_the_weights_and_defaults_to_that_of_seed_everything():
    def weights(**fields):
        fields = {"encoder_arch": "shufflenet_v2_x0_5", "dataset_name": "digits", "K": 8, **fields}
        model = SelfSupervisedMethod(**fields)
        return model.params.seed, torch.cat([p.flatten() for p in model.parameters()] + [model.queue.keys.flatten()])

    assert torch.equal(weights(seed=1)[1], weights(seed=1)[1])
    assert not torch.equal(weights(seed=1)[1], weights(seed=2)[1])
    pl.seed_everything(7, verbose=False)
    seed, values = weights()
    assert seed == 7 and torch.equal(values, weights(seed=7)[1])


def test_constructing_touches_no_data(monkeypatch, tmp_path):
    monkeypatch.setenv("DATA_PATH", str(tmp_path))
    SelfSupervisedMethod(K=8)
    assert list(tmp_path.iterdir()) == []


def test_optimizer_schedules_and_lagging_model_follow_optimizer_steps(small, trainer):
    """With two accumulated batches, learning rate, m and lagging weights change once per optimizer step."""
    params = small(
        "byol", optimizer_name="sgd", lr=0.2, final_lr_schedule_value=0.02, warmup_epochs=1, m=0.9, evaluations=[]
    )
    model, rates, momenta, expected = SelfSupervisedMethod(params, encoder=TinyEncoder()), [], [], []
    lagging = model.lagging_projection_model.net[0].weight.clone()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])
            momenta.append(trainer.callback_metrics["m"].item())
            if index % 2:
                online = module.projection_model.net[0].weight.detach()
                expected[0] = momenta[-1] * expected[0] + (1 - momenta[-1]) * online
            assert torch.allclose(module.lagging_projection_model.net[0].weight, expected[0], atol=1e-6)

    expected.append(lagging)
    fit = trainer(
        max_epochs=3, limit_train_batches=4, accumulate_grad_batches=2, callbacks=[Watch()], log_every_n_steps=1
    )
    fit.fit(model)
    assert fit.global_step == 6
    assert momenta == pytest.approx([schedules.cosine(0.9, 1, (i // 2) / 6) for i in range(12)])
    after_step = [0.2 * schedules.warmup(s, 2) if s < 2 else schedules.cosine(0.2, 0.02, (s - 2) / 4) for s in range(7)]
    assert rates == pytest.approx([after_step[(i + 1) // 2] for i in range(12)])
    assert schedules.cosine(0.9, 1.0, 1.0) == 1.0


def test_a_warmup_that_does_not_end_is_named(small, trainer, caplog):
    for epochs, said in ((10, True), (1, True), (0.5, False)):
        caplog.clear()
        params = small("byol", warmup_epochs=None, lars_warmup_epochs=epochs, evaluations=[])
        trainer().fit(SelfSupervisedMethod(params, encoder=TinyEncoder()))
        assert ("is as long as the training, or longer: lr=0.5 is reached at" in caplog.text) == said
    params = attrs.evolve(params, lars_warmup_epochs=1, lr_scaling="linear", lr_batch_size=64)  # batch_size=16
    trainer().fit(SelfSupervisedMethod(params, encoder=TinyEncoder()))
    assert "or longer: lr=0.125 is reached at" in caplog.text  # as the log says: the peak after lr_scaling


def test_moving_towards_is_the_moving_average():
    target, source = nn.Linear(3, 2), nn.Linear(3, 2)
    expected = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    ema_update(target, source, 0.1)
    assert torch.allclose(target.weight, expected)
    ema_update(nn.Identity(), nn.Identity(), 0.1)


def test_the_queue_takes_the_keys_after_they_were_compared(small, trainer):
    model = SelfSupervisedMethod(small(K=40, evaluations=[]), encoder=TinyEncoder())
    before, seen = model.queue.keys.clone(), []
    encode_lagging = model.encode_lagging
    model.encode_lagging = lambda *args: seen.append(encode_lagging(*args)) or seen[-1]
    trainer().fit(model)
    assert torch.equal(model.queue.keys[:32], torch.cat(seen)) and torch.equal(model.queue.keys[32:], before[32:])
    assert model.queue.position == 32
    both = SelfSupervisedMethod(small("sce", K=40, evaluations=[]), encoder=TinyEncoder())
    trainer(limit_train_batches=1).fit(both)
    assert both.queue.position == 32  # both views' keys of 16 images


def test_the_optimizers_groups(small, trainer):
    for name in ("sgd", "lars", "adamw"):
        patterns = {"exclude_matching_parameters_from_lars": [".bias", ".bn"]}
        model = SelfSupervisedMethod(small("byol", optimizer_name=name, evaluations=[], **patterns))
        fit = trainer(limit_train_batches=1)
        fit.fit(model)
        adapted, excluded = fit.optimizers[0].param_groups
        assert (adapted["weight_decay"], excluded["weight_decay"]) == (1e-4, 0)
        assert all(p.ndim > 1 for p in adapted["params"]) and all(p.ndim == 1 for p in excluded["params"])
        assert (adapted.get("adapt"), excluded.get("adapt")) == ((True, False) if name == "lars" else (None, None))
        adapts = {row.name: row.adapted for row in model.parameter_table()}
        assert not adapts["projection_model.net.1.weight"] and adapts["projection_model.net.0.weight"]


def test_logged_names(small, trainer):
    expected = {"step_train_loss", "step_pos_cos", "step_neg_cos", "step_projection_std", "T", "m"}
    contrastive = {"step_train_acc1", "step_train_acc5"}
    parts = {"loss_invariance", "loss_variance", "loss_covariance"}
    scores = {"train_class_acc", "valid_class_acc", "valid_knn20_acc", "valid_knn200_acc", "valid_rank_me",
              "valid_embedding_std"}  # fmt: skip
    for name, more in (("moco_v2", contrastive), ("byol", set()), ("vicreg", parts)):
        fit = trainer(limit_val_batches=4)
        fit.fit(SelfSupervisedMethod(small(name), encoder=TinyEncoder()))
        assert set(fit.callback_metrics) == expected | more | scores


def test_evaluations_are_chosen_and_timed(small, trainer):
    epochs = []

    class Watch(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            found = trainer.callback_metrics.pop("valid_rank_me", None)
            epochs.append(found is not None)

    params = small(evaluations=["rank_me"], evaluate_every_n_epochs=2)
    fit = trainer(max_epochs=4, callbacks=[Watch()])
    fit.fit(SelfSupervisedMethod(params, encoder=TinyEncoder()))
    assert epochs == [False, True, False, True] and "valid_class_acc" not in fit.callback_metrics


def test_probe_on_the_training_set(small, trainer):
    model = SelfSupervisedMethod(small(probe_on_training_set=True, batch_size=500), encoder=TinyEncoder())
    found = trainer(limit_val_batches=1.0).validate(model, verbose=False)[0]
    assert found["valid_class_acc_trainset"] > 50 and "valid_class_acc" not in found


def test_the_sanity_check_scores_nothing(small, trainer):
    trainer(num_sanity_val_steps=2, limit_val_batches=0).fit(SelfSupervisedMethod(small(), encoder=TinyEncoder()))
    fit = trainer(num_sanity_val_steps=1)
    fit.fit(SelfSupervisedMethod(small(evaluations=["rank_me"]), encoder=TinyEncoder()))
    assert fit.callback_metrics["valid_rank_me"] > 1


def loader(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=8)


class Views(torch.utils.data.Dataset):
    """Data set with a two-crop transform."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return [torch.randn(1, 8, 8), torch.randn(1, 8, 8)], index % 3


OWN_LOADERS = {
    "uint8 images with labels": lambda: loader(torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8), torch.arange(16)),
    "uint8 images": lambda: DataLoader(torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8), batch_size=8),
    "stacked views": lambda: loader(torch.randn(16, 2, 1, 8, 8), torch.arange(16)),
    "list of views with labels": lambda: DataLoader(Views(), batch_size=8),
    "images and views flat with labels": lambda: loader(
        *(torch.randn(16, 1, 8, 8) for _ in range(2)), torch.arange(16)
    ),
    "tensors of images alone": lambda: loader(torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8)),
    "views without labels": lambda: loader(torch.randn(16, 1, 8, 8), torch.randn(16, 1, 8, 8)),
}


@pytest.mark.parametrize("kind", OWN_LOADERS)
def test_a_loader_of_the_users_own_always_works(kind, small, trainer, monkeypatch):
    """`dataset_name` is not read."""
    monkeypatch.setattr(data_sets, "prepare_data", lambda name: pytest.fail("touched the data set"))
    fit = trainer(num_sanity_val_steps=2)
    fit.fit(SelfSupervisedMethod(small("simclr"), encoder=TinyEncoder()), OWN_LOADERS[kind]())
    assert fit.global_step == 2


@pytest.mark.parametrize("fields", [{"mlp_hidden_dim": 32}, {"projection_mlp_last_normalization": "same", "dim": 32}])
def test_group_norm_of_single_units_is_refused_at_the_start(fields, small, trainer):
    params = small("simclr", mlp_normalization="gn", **{"mlp_hidden_dim": 64, **fields})
    with pytest.raises(ValueError, match="(mlp_hidden_dim|dim)=32: group norm has 32 groups"):
        trainer().fit(SelfSupervisedMethod(params, encoder=TinyEncoder()))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(8, 8)] * 2, "yields 2 of the 3 views needed of each image"),
        ([(8, 9)] * 3, "must be square, not 8 x 9 pixels"),
        ([(6, 6)] * 3, "views of 6 pixels are too small to be blurred. Set transform_apply_blur=False"),
    ],
)
def test_lists_of_uint8_views_that_do_not_fit_are_refused(shapes, message, small, trainer):
    images = [[torch.zeros(1, *shape, dtype=torch.uint8) for shape in shapes] for _ in range(8)]
    with pytest.raises(ValueError, match=message):
        model = SelfSupervisedMethod(
            small("simclr", n_large_views=3, transform_blur_probability=1.0), encoder=TinyEncoder()
        )
        trainer().fit(model, DataLoader(images, batch_size=8))


def test_what_is_not_a_view_of_the_same_images_is_refused(trainer):
    """Masks next to the images, and batches of two loaders."""
    images = torch.randint(256, (16, 3, 8, 8), dtype=torch.uint8)
    fields = {"encoder": nn.Flatten(), "dataset_name": "cifar10", "transform_crop_size": 8, "batch_size": 8}

    def model(build=SelfSupervisedMethod, **settings):
        return build("simclr", **fields, **settings, evaluations=[])

    for both in (loader(images, images[:, :1]), loader(images / 64 - 2, images[:, :1] / 64 - 2)):
        with pytest.raises(ValueError, match=r"images=\[\[8, 3, 8, 8\], \[8, 1, 8, 8\]\]: views .* channels"):
            trainer().fit(model(), both)
    with pytest.raises(ValueError, match=r"^images=torch.int64 \[8, 8, 8\]: .* or leave out what is not an image"):
        trainer().fit(model(), loader(images, images[:, 0].long()))

    class Joined(SelfSupervisedMethod):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return torch.cat(batch)

    both = [DataLoader(images, batch_size=8), DataLoader(images[:8], batch_size=8)]
    with pytest.raises(ValueError, match="train_dataloaders: a batch of each of the 2 loaders .*ConcatDataset"):
        trainer().fit(model(), both)
    trainer().fit(model(Joined), both)
    for settings in ({}, {"lr_scaling": "linear"}):
        with pytest.raises(ValueError, match="train_dataloaders: a list with one loader. Pass the loader itself"):
            trainer().fit(model(**settings), both[:1])

    class First(SelfSupervisedMethod):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return super().on_after_batch_transfer(batch[0], dataloader_idx)

    trainer().fit(model(First), both)


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # from Lightning
@pytest.mark.parametrize("trains", [False, True])
def test_a_frozen_encoder_is_named_and_one_in_eval_mode_is_trained(trains, small, trainer, caplog):
    own = frozen_encoder.Encoder(nn.Sequential(TinyEncoder(), nn.BatchNorm1d(6)), small("byol"), None)
    own.requires_grad_(trains)
    before = copy.deepcopy(own.state_dict())
    with caplog.at_level("INFO"):
        model = SelfSupervisedMethod(small("byol"), encoder=own)
    assert ("no weight of the encoder requires a gradient" in caplog.text) is not trains
    trainer().fit(model)
    changed = [name for name, value in own.state_dict().items() if not torch.equal(value, before[name])]
    assert bool(changed) is trains
    model.train(not trains)
    model.train()
    modes = {part.training for network in (model.model, model.lagging_model) for part in network.modules()}
    assert modes == {trains}  # of the lagging model, too


@pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode")  # from Lightning
def test_an_encoder_that_becomes_trainable_after_construction_is_in_train_mode(small, trainer):
    own = frozen_encoder.Encoder(nn.Sequential(TinyEncoder(), nn.BatchNorm1d(6)), small("byol"), None)
    model, modes = SelfSupervisedMethod(small("byol", evaluations=[]), encoder=own), []
    own.requires_grad_()
    networks = (model.model, model.lagging_model)
    model.on_train_batch_start = lambda *_: modes.extend(part.training for net in networks for part in net.modules())
    trainer(limit_train_batches=1).fit(model)
    assert modes and all(modes)


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(2, 1, 8, 8), 0


def test_a_loader_without_length(small, trainer):
    fit = trainer(max_epochs=-1, max_steps=3, limit_train_batches=None)
    fit.fit(SelfSupervisedMethod(small("byol", m=0.9), encoder=TinyEncoder()), DataLoader(Endless(), batch_size=4))
    assert fit.global_step == 3 and fit.callback_metrics["m"].item() == pytest.approx(schedules.cosine(0.9, 1, 2 / 3))
    with pytest.raises(ValueError, match="max_steps=-1: the loader has no length"):
        model = SelfSupervisedMethod(small("byol"), encoder=TinyEncoder())
        trainer(max_epochs=2, limit_train_batches=None).fit(model, DataLoader(Endless(), batch_size=4))


@pytest.mark.parametrize("batch", [{"image": torch.zeros(2, 1, 8, 8)}, [torch.zeros(2, 1, 8, 8), "cat"], []])
def test_other_batches_are_refused_in_words(batch):
    """The message shows what the batch holds."""
    of_list = "list with [(2, 1, 8, 8), 'str']" if batch else "list with []"
    shown = "dict with ['image']" if isinstance(batch, dict) else of_list
    message = f"batch={shown}: this format is unknown. A loader yields images [N, C, H, W], (images, labels)"
    with pytest.raises(ValueError, match=re.escape(message)):
        images_and_labels(batch)


def test_gray_images_of_a_loader_of_ones_own_are_normalized_with_the_mean_over_colors(small, trainer):
    images = torch.randint(256, (16, 1, 8, 8), dtype=torch.uint8)
    params = small("simclr", dataset_name="cifar10", in_channels=1, evaluations=[])
    assert params.mean == (pytest.approx((0.4914 + 0.4822 + 0.4465) / 3, abs=1e-3),)
    trainer().fit(SelfSupervisedMethod(params), loader(images))


def test_images_of_other_channels_are_refused_in_words(small, trainer):
    images = torch.randint(256, (16, 5, 8, 8), dtype=torch.uint8)
    with pytest.raises(ValueError, match="5 channels cannot be normalized with 1 means. Set image_mean and image_std"):
        trainer().fit(SelfSupervisedMethod(small("simclr", in_channels=5)), loader(images))
    constants = {"image_mean": [0.5] * 5, "image_std": [0.2] * 5}
    trainer().fit(SelfSupervisedMethod(small("simclr", in_channels=5, **constants)), loader(images))


def test_two_validation_loaders_are_scored_one_by_one(small, trainer):
    labels = torch.arange(40) % 4
    sets = [loader(torch.randn(40, 1, 8, 8) + shift * labels.view(-1, 1, 1, 1), labels) for shift in (0, 9)]
    found = {}
    for result in trainer(limit_val_batches=1.0).validate(
        SelfSupervisedMethod(small(), encoder=TinyEncoder()), sets, verbose=False
    ):
        found |= {name.split("/")[0]: value for name, value in result.items()}
    assert found["valid_class_acc"] < found["valid_class_acc_1"] and "valid_class_acc_trainset" not in found


@pytest.mark.parametrize("evaluations", [["linear_probe"], []])
def test_a_test_loader_of_the_users_own_is_scored_as_in_validation(evaluations, small, trainer):
    labels = torch.arange(40) % 4
    images = loader(torch.randn(40, 1, 8, 8) + labels.view(-1, 1, 1, 1), labels)
    model = SelfSupervisedMethod(small(evaluations=evaluations), encoder=TinyEncoder())
    fit = trainer(limit_test_batches=1.0)
    validated = trainer(limit_val_batches=1.0).validate(model, images, verbose=False)[:1]
    tested = fit.test(model, images, verbose=False)[:1]
    assert tested == [{name.replace("valid_", "test_"): value for name, value in row.items()} for row in validated]
    assert any("test_class_acc" in row for row in (*tested, *fit.test(model, verbose=False))) == bool(evaluations)


def test_own_training_and_validation_loaders_and_a_data_module(small, trainer, monkeypatch):
    monkeypatch.setattr(data_sets, "prepare_data", lambda name: pytest.fail("touched the data set"))
    train, labels = OWN_LOADERS["stacked views"](), torch.arange(40) % 4
    valid = loader(torch.randn(40, 1, 8, 8) + labels.view(-1, 1, 1, 1), labels)

    class Module(pl.LightningDataModule):
        def train_dataloader(self):
            return train

        def val_dataloader(self):
            return valid

    for data_of_fit in ({"train_dataloaders": train, "val_dataloaders": valid}, {"datamodule": Module()}):
        fit = trainer(limit_val_batches=1.0)
        fit.fit(SelfSupervisedMethod(small(), encoder=TinyEncoder()), **data_of_fit)
        assert "valid_class_acc" in fit.callback_metrics


def test_one_float_view_is_refused_in_words(small, trainer):
    with pytest.raises(ValueError, match="yields 1 of the 2 views needed of each image"):
        trainer().fit(
            SelfSupervisedMethod(small(), encoder=TinyEncoder()), loader(torch.randn(16, 1, 8, 8), torch.arange(16))
        )


@pytest.mark.parametrize("devices", [2, 3])
def test_no_key_shares_its_batch_statistics_with_its_own_query(devices):
    """On one process the shuffled keys are encoded in parts, and every key is returned at its place."""
    parts = []
    keys = distributed.shuffled(lambda x: parts.append(x) or x * 2, torch.arange(12.0).view(12, 1), (1, 2), devices)
    assert torch.equal(keys, torch.arange(12.0).view(12, 1) * 2)
    assert len(parts) == devices and {len(part) for part in parts} == {12 // devices}
    assert not torch.equal(torch.cat(parts), torch.arange(12.0).view(12, 1))


def test_shuffled_batch_norm_trains(small, trainer):
    model = SelfSupervisedMethod(small(shuffle_batch_norm=True, n_virtual_devices=4, evaluations=[]))
    passes = []
    model.lagging_projection_model.register_forward_hook(lambda module, inputs, output: passes.append(len(output)))
    trainer(limit_train_batches=1).fit(model)
    assert passes == [4, 4, 4, 4]


@pytest.mark.parametrize("name", ["moco_v2", "vicreg", "sce"])
def test_losses_are_float32_under_autocast(name, small, trainer, monkeypatch):
    model = SelfSupervisedMethod(small(name), encoder=TinyEncoder())
    dtypes, seen, get_loss = [], [], losses.get_loss
    model.projection_model.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))

    def recorded(params, labels=None):
        def loss(*inputs):
            inputs = [x if x is None else x.clone() for x in inputs]  # the queue changes later
            seen.append((inputs, get_loss(params)(*inputs)["loss"].detach()))
            return get_loss(params)(*inputs)

        return loss

    monkeypatch.setattr(losses, "get_loss", recorded)
    fit = trainer(precision="bf16-mixed", limit_val_batches=4)
    fit.fit(model)
    assert dtypes[0] == torch.bfloat16 and fit.callback_metrics["valid_class_acc"] > 0
    for inputs, loss in seen:  # equal to the loss outside of autocast, which bfloat16 products are not
        assert loss.dtype == torch.float32 and torch.equal(loss, get_loss(model.params)(*inputs)["loss"])


def test_checkpoints_of_the_original_load(small, tmp_path):
    """Its queue is [dim, K], its pointer a vector of one element, and its settings lack our fields."""
    model = SelfSupervisedMethod(small())
    state = model.state_dict()
    state["queue"], state["queue_ptr"] = state.pop("queue.keys").T.clone(), state.pop("queue.position").reshape(1) + 5
    settings = {k: v for k, v in model.hparams.items() if not k.startswith(("sce_", "transform_c", "evaluat", "seed"))}
    version = {"pytorch-lightning_version": pl.__version__, "global_step": 10, "epoch": 1}
    torch.save({"state_dict": state, "hyper_parameters": settings, **version}, tmp_path / "original.ckpt")
    loaded = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "original.ckpt")
    assert torch.equal(loaded.queue.keys, model.queue.keys) and loaded.queue.position == 5
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_a_checkpoint_does_not_need_the_weights_it_started_from(small, trainer, tmp_path):
    started = SelfSupervisedMethod(small()).model
    torch.save(started.state_dict(), tmp_path / "start.pt")
    model = SelfSupervisedMethod(small(encoder_weights=str(tmp_path / "start.pt"), seed=1, evaluations=[]))
    for key, value in started.state_dict().items():
        assert torch.equal(model.model.state_dict()[key], value)
        assert torch.equal(model.lagging_model.state_dict()[key], value)
    fit = trainer(limit_train_batches=1)
    fit.strategy.connect(model)
    fit.save_checkpoint(tmp_path / "example.ckpt")
    (tmp_path / "start.pt").unlink()
    SelfSupervisedMethod.load_from_checkpoint(tmp_path / "example.ckpt")


def test_training_leaves_the_seed_as_it_was(small, trainer):
    """A model that is built afterwards gets the seed of `pl.seed_everything`, not that of the last training step."""
    pl.seed_everything(7, verbose=False)
    trainer().fit(SelfSupervisedMethod(small(evaluations=[]), encoder=TinyEncoder()))
    assert SelfSupervisedMethod(encoder=TinyEncoder(), dataset_name="digits", K=8).params.seed == 7


def test_building_a_method_leaves_cuda_alone_before_it_is_initialized(small, monkeypatch):
    """A process that has initialized CUDA cannot be forked, and the user's seed of CUDA holds until then."""
    seeds, reads = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: reads.append(1) or [])
    for encoder in (None, TinyEncoder()):
        SelfSupervisedMethod(small(encoder_arch="small_cnn"), encoder=encoder)
        LinearClassifierMethod(dataset_name="digits", encoder_arch="small_cnn", encoder=encoder)
    assert (seeds, reads) == ([], [])


def test_a_training_leaves_the_seeds_of_initialized_gpus_as_they_were(small, trainer, monkeypatch):
    states, drawn, fit = [5, 6], set(), trainer()

    def seed_all(seed: int) -> None:
        drawn.add(seed)
        states[:] = seed, seed

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seed_all)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: states.__setitem__(device, state))
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: list(states))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda old: states.__setitem__(slice(None), old))
    model = SelfSupervisedMethod(small(seed=3, evaluations=[]), encoder=TinyEncoder())
    assert states == [5, 6] and 3 in drawn
    images = torch.randint(256, (32, 1, 8, 8), dtype=torch.uint8)
    fit.fit(model, DataLoader(TensorDataset(images, torch.zeros(32).long()), batch_size=16))
    assert states == [5, 6] and len(drawn) > 3


def test_one_image_without_batch_statistics_is_refused_in_words(small, trainer):
    """At construction if settings say so; otherwise in training: of 1,297 digits, batches of 648 leave one image."""
    with pytest.raises(ValueError, match="a batch of 1 image has no batch statistics: choose a larger batch_size"):
        SelfSupervisedMethod(small(batch_size=1, encoder_arch="resnet18"))  # its last map is a single pixel
    SelfSupervisedMethod(small(batch_size=1), encoder=TinyEncoder())
    with pytest.raises(ValueError, match="if it is the last one, drop_last_batch=True"):
        params = small("byol", batch_size=648, drop_last_batch=False, evaluations=[])
        model = SelfSupervisedMethod(params, encoder=TinyEncoder())
        trainer(limit_train_batches=None, limit_val_batches=0).fit(model)
    assert model.global_step == 0  # the start tells, not the end of an epoch
    trainer(limit_train_batches=2, limit_val_batches=0).fit(model)  # without the last batch
    SelfSupervisedMethod(small("simclr", batch_size=1, global_batch_size=16, encoder_arch="resnet18"))


@pytest.mark.parametrize("preset", ["simclr", "dcl", "supcon", "moco_v3", "vicreg", "barlow_twins"])
def test_one_image_that_the_loss_compares_with_nothing_is_refused_at_the_start(preset, small, trainer):
    """Of the user's own loader, which has no batch_size of the settings. Most losses would be 0."""
    x, y = torch.randint(256, (33, 1, 8, 8), dtype=torch.uint8), torch.arange(33) % 10

    def steps(n: int, size: int, loss=None) -> int:
        params = small(preset, mlp_normalization=None, evaluations=[], lr=0.01, optimizer_name="sgd")
        model = SelfSupervisedMethod(params, encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 6)), loss=loss)
        try:
            trainer(limit_train_batches=1.0).fit(model, DataLoader(TensorDataset(x[:n], y[:n]), batch_size=size))
        except ValueError as error:
            assert re.search("no other image to compare with.* If it is the last one, set drop_last_", str(error))
        return model.global_step

    assert (steps(3, 1), steps(1, 16), steps(33, 16), steps(32, 16)) == (0, 0, 0, 2)
    assert steps(3, 1, loss=squared) == 3  # which may need no others


def test_an_interrupted_validation_leaves_nothing_for_the_next(small, trainer):
    class Stop(pl.Callback):
        stops = True

        def on_validation_batch_end(self, *args):
            if self.stops:
                raise KeyError("an error of the user's code")

    stop = Stop()
    model, fit = SelfSupervisedMethod(small(), encoder=TinyEncoder()), trainer(limit_val_batches=9, callbacks=[stop])
    with pytest.raises(KeyError):
        fit.validate(model, verbose=False)
    stop.stops = False
    found = fit.validate(model, verbose=False)
    assert found == trainer(limit_val_batches=9).validate(model, verbose=False)


# ---- A loss of the user's own ----


def squared(q, k, queue):
    return (q - k).square().sum(1).mean()


@pytest.mark.parametrize("name", ["moco_v2", "simclr", "vicreg"])
def test_the_loss_of_the_settings_passed_as_ones_own_trains_to_the_same_bits(name, small, trainer):
    params = small(name, evaluations=[])
    weights, encoder = [], TinyEncoder()
    for loss in (None, losses.get_loss(params), losses.get_loss(attrs.evolve(params, T=5.0, variance_loss_weight=0))):
        model = SelfSupervisedMethod(params, encoder=copy.deepcopy(encoder), loss=loss)
        fit = trainer()
        fit.fit(model)
        weights.append(torch.cat([value.flatten() for value in model.state_dict().values()]))
        assert ("loss_variance" if name == "vicreg" else "step_train_acc1") in fit.callback_metrics
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_loss_of_ones_own_is_minimized_and_is_passed_again_to_load(small, trainer, tmp_path):
    """On the sphere |q - k|^2 = 2 (1 - q·k), of which "ip" minimizes 1 - q·k."""
    params = small("byol", evaluations=[], lr=0.01)
    steps = []
    more = {"n": torch.tensor(3), "T": torch.tensor(7.0)}
    for loss in (None, squared, lambda q, k, queue: {"loss": nn.MSELoss()(q, k), **more}):
        model, fit = SelfSupervisedMethod(params, loss=loss), trainer(limit_train_batches=1)
        fit.fit(model)
        steps.append(fit.callback_metrics)
    per_pair = [float(step["step_train_loss"]) / params.loss_factor for step in steps]
    assert per_pair[1] == pytest.approx(2 * per_pair[0], abs=1e-5)
    assert per_pair[2] == pytest.approx(per_pair[1] / params.dim, abs=1e-5)
    assert (steps[2]["n"], steps[2]["T"]) == (3, 7)  # a whole number, and the name of a setting

    fit.save_checkpoint(tmp_path / "mine.ckpt")
    assert SelfSupervisedMethod.load_from_checkpoint(tmp_path / "mine.ckpt").custom_loss is None
    again = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "mine.ckpt", loss=squared)
    assert again.custom_loss(torch.ones(2, 3), torch.zeros(2, 3), None) == {"loss": torch.tensor(3.0)}
    assert again.params == attrs.evolve(params, embedding_dim=256) and "loss" not in again.hparams


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("ce", TypeError, "loss='ce': not a function"),
        (lambda q, k: q.mean(), TypeError, "loss: too many positional arguments. Pass a function of"),
        (nn.Linear(2, 2), ValueError, "loss: a module with weights"),
        (lambda q, k, queue: {"los": q.mean()}, TypeError, 'loss: it returned .* dict of tensors with "loss"'),
        (lambda q, k, queue: 0.5, TypeError, "loss: it returned 0.5"),
        (lambda q, k, queue: {"loss": q.mean(), "mine": 0.5}, TypeError, "loss: it returned"),
    ],
)
def test_what_is_no_loss_is_refused(loss, error, message):
    with pytest.raises(error, match=f"^{message}"):
        as_pair_loss(loss)(torch.ones(2, 3), torch.ones(2, 3), None)
