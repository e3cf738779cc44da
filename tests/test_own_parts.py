"""What users put into a method, or change in it: encoders, losses, weights, lists of settings, loaders of their own."""

import re
import warnings

import attrs
import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from linear_classifier import LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import PRESETS, BYOLParams, VICRegParams
from self_supervised.data.batches import ResumableDataLoader, ResumableSampler
from self_supervised.networks.pretrained import load_encoder
from self_supervised.training import advice, fit_checks


class Net(nn.Module):
    """Encoder [N, 1, 8, 8] -> [N, 6]."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6))

    def forward(self, x):
        return self.net(x)


class Hooked(Net):
    """Its features are found by a hook, which remains the original's when it is copied."""

    def __init__(self):
        super().__init__()
        self.net[1].register_forward_hook(lambda module, args, output: setattr(self, "features", output))

    def forward(self, x):
        self.net(x)
        return self.features


def patched() -> Net:
    encoder = Net()
    encoder.forward = lambda x: encoder.net(x)
    return encoder


def images(n_views: int = 1, **options) -> DataLoader:
    x = torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if n_views > 1:
        x = [x.float().div(255).sub(0.5).div(0.3)] * n_views
    rows = [([view[i] for view in x] if n_views > 1 else x[i]) for i in range(64)]
    return DataLoader(rows, batch_size=16, **options)


class Viewing(nn.Module):
    """Encoder [N, 3, 16, 16] -> [N, 6] that takes images and weights for contiguous, as many networks do."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride=2)
        self.linear = nn.Linear(6 * 6 * 6, 6)

    def forward(self, x):
        norm = self.conv.weight.view(len(self.conv.weight), -1).norm()
        return self.linear(self.conv(x).view(x.size(0), -1)) / norm


def color_images() -> DataLoader:
    return DataLoader(torch.randint(256, (32, 3, 16, 16), dtype=torch.uint8), batch_size=16)


# ---- settings ----


def test_settings_have_lists_of_their_own():
    mine = BYOLParams()
    copied = attrs.evolve(mine, lr=0.1)
    mine.exclude_matching_parameters_from_lars.append("projection")
    mine.evaluations.append("x")
    for others in (BYOLParams(), VICRegParams(), copied, PRESETS["byol"]()):
        assert others.exclude_matching_parameters_from_lars == [".bias", ".bn"]
        assert "x" not in others.evaluations
    LinearClassifierMethodParams().exclude_matching_parameters_from_lars.append("x")
    assert LinearClassifierMethodParams().exclude_matching_parameters_from_lars == []


def test_a_list_that_is_changed_after_the_method_was_built_is_refused(small, trainer):
    model = SelfSupervisedMethod(small(), encoder=Net())
    model.params.evaluations.clear()
    with pytest.raises(ValueError, match="evaluations=.*not the setting with which the method was built"):
        trainer().fit(model)


def test_another_lr_changes_that_of_the_encoder_in_proportion():
    """`lr_scaling` becomes None, so that an encoder's rate that stayed would be several times as high as before."""
    model = LinearClassifierMethod(encoder=Net(), dataset_name="digits", lr=0.1, encoder_lr=0.02, lr_scaling="linear")
    model.lr = 0.01
    assert (model.params.lr, model.params.encoder_lr, model.params.lr_scaling) == (0.01, pytest.approx(0.002), None)


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({}, []),
        ({"encoder_lr": 0.01}, ["lr=30 is meant for a frozen encoder and SGD"]),
        ({"optimizer_name": "adamw"}, ["lr=30 is meant for a frozen encoder and SGD"]),
        ({"encoder_lr": 0.01, "lr": 0.1}, []),
        ({"optimizer_name": "adamw", "lr": 1e-3, "momentum": 0.5}, ["momentum=0.5: no effect .* optimizer_name=sgd"]),
        ({"held_out_fraction": 0.5}, ["held_out_fraction=0.5: no effect .* validate_on=held_out"]),
        ({"held_out_fraction": 0.5, "validate_on": "held_out"}, []),
        ({"unfrozen": True}, ["encoder_lr=None: the encoder stays frozen"]),
        ({"unfrozen": True, "encoder_lr": 0.01, "lr": 0.1}, []),
    ],
)
def test_a_classifier_names_doubtful_settings(fields, lines, trainer, caplog):
    settings = {name: value for name, value in fields.items() if name != "unfrozen"}
    model = LinearClassifierMethod(encoder=Net(), dataset_name="digits", batch_size=16, num_data_workers=0, **settings)
    if "unfrozen" in fields:
        model.model.requires_grad_(True)
    trainer().fit(model)
    said = [line.message for line in caplog.records if line.message.startswith("warning: ")]
    assert len(said) == len(lines)
    assert all(re.search(pattern, line) for pattern, line in zip(lines, said, strict=True))


def test_what_only_the_training_of_an_encoder_has_is_named_if_it_is_frozen():
    of_training = {"activation_checkpointing": True, "drop_path_rate": 0.1, "encoder_arch": "timm:test_vit"}
    for fields, said in (({}, True), ({"encoder_lr": 0.01}, False)):
        params = LinearClassifierMethodParams(lr=0.1, **of_training, **fields)
        lines = advice.doubts_of_classifier(params, False)
        for name in ("activation_checkpointing=True", "drop_path_rate=0.1"):
            assert any(f"{name}: no effect on a frozen encoder" in line for line in lines) == said


def test_a_pattern_of_a_classifier_that_matches_nothing_is_refused(trainer):
    settings = {"lr": 0.1, "batch_size": 16, "num_data_workers": 0, "exclude_matching_parameters_from_lars": ["biass"]}
    model = LinearClassifierMethod(encoder=Net(), dataset_name="digits", **settings)
    with pytest.raises(ValueError, match="pattern 'biass' matches none of 6 parameters"):
        trainer().fit(model)


def test_a_batch_that_is_not_full_has_the_images_that_there_are(trainer, caplog):
    """lr_scaling, the log and the speed would count images that do not exist."""
    settings = {"labels_per_class": 1, "lr": 0.1, "lr_scaling": "linear", "drop_last_batch": None, "batch_size": 256}
    model = LinearClassifierMethod(encoder=Net(), dataset_name="digits", num_data_workers=0, **settings)
    trainer().fit(model)
    assert "x 10 (images) = 10 images per optimizer step" in caplog.text
    assert model.plan.lr == pytest.approx(0.1 * 10 / 256) and model.plan.step_sizes()["images"] == 256


def test_an_epoch_with_fewer_batches_than_are_accumulated(small, trainer, caplog):
    model = SelfSupervisedMethod(small("simclr", lr_scaling="linear", lr=0.1, evaluations=[]), encoder=Net())
    trainer(accumulate_grad_batches=100, limit_train_batches=1.0).fit(model, images())
    assert "x 4 (accumulated batches) x 16 (images) = 64 images per optimizer step" in caplog.text
    assert "an epoch has 4 batches, so a step gets only 4/100" in caplog.text
    assert model.plan.lr == pytest.approx(0.1 * 64 / 256) and model.plan.step_sizes()["accumulated"] == 100


@pytest.mark.parametrize(("batch", "said"), [(1, False), (2, True)])
def test_a_checkpoint_between_accumulated_batches_is_named(batch, said, small, trainer, tmp_path):
    def model() -> SelfSupervisedMethod:
        return SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Net())

    saving, path = pl.Callback(), tmp_path / "after_a_batch.ckpt"
    saving.on_train_batch_end = lambda trained, *given: given[-1] == batch and trained.save_checkpoint(path)
    length = {"max_epochs": 1, "limit_train_batches": 4, "accumulate_grad_batches": 2}
    trainer(callbacks=[saving], **length).fit(model())
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        trainer(**length).fit(model(), ckpt_path=path)
    assert any("between the accumulated batches" in str(warning.message) for warning in raised) == said


def test_shuffled_batch_norm_without_batch_norm_is_named(small, trainer, caplog):
    for norm, said in (("bn", False), (None, True)):
        caplog.clear()
        settings = {"mlp_normalization": norm, "projection_mlp_layers": 2, "shuffle_batch_norm": True}
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        trainer().fit(SelfSupervisedMethod(small(**settings, evaluations=[]), encoder=encoder), images())
        assert ("shuffle_batch_norm=True: no effect" in caplog.text) == said


@pytest.mark.parametrize(("norm", "world_size", "said"), [("bn", 2, True), ("bn", 1, False), ("br", 2, False)])
def test_shuffled_batch_norm_that_is_synchronized_is_named(norm, world_size, said, small, monkeypatch):
    """Not batch renorm, which stays as it is, nor a single process, on which nothing is synchronized."""
    settings = {"mlp_normalization": norm, "projection_mlp_layers": 2, "shuffle_batch_norm": True}
    model = SelfSupervisedMethod(
        small(**settings, evaluations=[]), encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
    )
    monkeypatch.setattr(fit_checks.distributed, "world_size", lambda: world_size)
    assert fit_checks.doubts_of_shuffling(model) == []
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # as Trainer(sync_batchnorm=True) does
    assert fit_checks.doubts_of_shuffling(model) == ([fit_checks.SYNCHRONIZED] if said else [])


def test_a_lower_lr_lowers_the_ends_of_its_schedule(small):
    model = SelfSupervisedMethod(small("vicreg", lr=0.3, final_lr_schedule_value=0.002), encoder=Net())
    model.lr = 0.1
    assert model.params.final_lr_schedule_value == 0.002
    model.lr = 0.001
    assert model.params.final_lr_schedule_value == model.hparams.final_lr_schedule_value == pytest.approx(2e-5)


# ---- encoders ----


@pytest.mark.parametrize("build", [Hooked, patched])
def test_an_encoder_whose_copy_computes_with_the_original_is_refused(build, small):
    with pytest.raises(ValueError, match="encoder: its copy, the lagging model, uses weights or features"):
        SelfSupervisedMethod(small("byol"), encoder=build())
    SelfSupervisedMethod(small("simclr"), encoder=build())  # without a lagging model, there is no copy


@pytest.mark.parametrize("preset", ["simclr", "byol"])
def test_an_encoder_that_needs_contiguous_images_and_weights_gets_them(preset, small, trainer):
    settings = {"dataset_name": "cifar10", "transform_crop_size": 16, "evaluations": []}
    model = SelfSupervisedMethod(small(preset, **settings), encoder=(encoder := Viewing()))
    trainer().fit(model, color_images())
    assert encoder.conv.weight.is_contiguous() and encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 6)  # as before
    other = nn.Sequential(nn.Conv2d(3, 6, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    SelfSupervisedMethod(small(preset, **settings), encoder=other)
    assert other[0].weight.is_contiguous(memory_format=torch.channels_last) and not other._forward_pre_hooks


def test_an_encoder_that_draws_in_eval_mode_can_be_copied(small):
    class Drawing(Net):
        def forward(self, x):
            return nn.functional.dropout(super().forward(x), 0.5)

    SelfSupervisedMethod(small("byol"), encoder=Drawing())


def test_trying_the_copy_changes_neither_the_encoder_nor_the_random_state(small):
    encoder, state = Net(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    model = SelfSupervisedMethod(small("byol"), encoder=encoder)
    assert torch.equal(state, torch.get_rng_state()) and model.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.model.state_dict().items())
    assert all(
        torch.equal(*pair) for pair in zip(model.model.parameters(), model.lagging_model.parameters(), strict=True)
    )


@pytest.mark.parametrize("encoder", ["resnet18", Net])
def test_an_encoder_that_is_no_module_is_named(encoder, small, tmp_path):
    for build in (lambda **own: SelfSupervisedMethod(small(), **own), LinearClassifierMethod):
        with pytest.raises(ValueError, match="is not a module. Pass an object of nn.Module"):
            build(encoder=encoder)
    for load in (load_encoder, LinearClassifierMethod.from_moco_checkpoint):
        with pytest.raises(ValueError, match="is not a module"):
            load(tmp_path / "weights.pth", encoder=encoder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("projection_model", lambda head: nn.Linear(6, 16)),
        ("model", lambda encoder: nn.Sequential(nn.Flatten(), nn.Linear(64, 6))),
        ("model", lambda encoder: nn.Sequential(encoder, nn.Dropout())),
    ],
)
def test_a_network_that_is_replaced_without_its_lagging_copy_is_refused(name, change, small, trainer):
    model = SelfSupervisedMethod(small("byol"), encoder=Net())
    setattr(model, name, change(getattr(model, name)))
    with pytest.raises(ValueError, match="a network was replaced after the method was built"):
        trainer().fit(model)


# ---- weights ----


def test_weights_that_do_not_reach_the_lagging_model_give_a_line(small, trainer, caplog):
    for loaded in (False, True):
        model = SelfSupervisedMethod(small("byol"), encoder=Net())
        if loaded:
            model.model.load_state_dict(Net().state_dict())
        trainer().fit(model)
        assert ("the lagging model starts from other weights than the model" in caplog.text) == loaded


def test_a_checkpoint_is_not_loaded_into_an_object(small):
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        SelfSupervisedMethod(small(), encoder=Net()).load_from_checkpoint("x.ckpt")
    with pytest.raises(TypeError, match="cannot be called on an instance"):
        LinearClassifierMethod(encoder=Net(), dataset_name="digits").from_moco_checkpoint("x.ckpt")


# ---- steps ----


def test_manual_optimization_is_refused(small, trainer):
    class Manual(SelfSupervisedMethod):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.automatic_optimization = False

    with pytest.raises(ValueError, match="automatic_optimization=False: the lagging model"):
        trainer().fit(Manual(small("byol"), encoder=Net()))


def test_a_lost_loss_is_named(small, trainer, tmp_path, caplog):
    def loss(q, k, queue):
        return (q - k).square().mean()

    fit = trainer()
    fit.fit(SelfSupervisedMethod(small("byol"), encoder=Net(), loss=loss))
    fit.save_checkpoint(tmp_path / "own.ckpt")
    for own in ({"loss": loss}, {}):
        resumed = SelfSupervisedMethod(small("byol"), encoder=Net(), **own)
        trainer(max_epochs=2).fit(resumed, ckpt_path=tmp_path / "own.ckpt")
        loaded = SelfSupervisedMethod.load_from_checkpoint(tmp_path / "own.ckpt", encoder=Net(), **own)
        trainer().fit(loaded)
        assert caplog.text.count("trained with a loss of your own") == (0 if own else 2)


# ---- loaders ----


def test_validation_and_prediction_encode_parts_of_a_batch_too(small, trainer):
    sizes = []
    model = SelfSupervisedMethod(small("simclr", micro_batch_size=5, evaluations=["rank_me"]), encoder=Net())
    model.model.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    fit = trainer()
    fit.validate(model, images(), verbose=False)
    whole = torch.cat(fit.predict(model, images()))
    assert max(sizes) <= 5
    model.params = attrs.evolve(model.params, micro_batch_size=None)
    assert torch.allclose(torch.cat(fit.predict(model, images())), whole, atol=1e-6)


def test_parts_of_a_batch_leave_the_order_of_an_own_loader(small, trainer):
    found = []
    for size in (None, 4):
        torch.manual_seed(0)
        params = small("simclr", mlp_normalization=None, micro_batch_size=size, batch_size=16, evaluations=[])
        model = SelfSupervisedMethod(params, encoder=nn.Sequential(nn.Flatten(), nn.Linear(64, 6)))
        trainer(max_epochs=3, limit_train_batches=1.0, limit_val_batches=0).fit(model, images(shuffle=True))
        found.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.allclose(*found, atol=1e-5)


def test_views_that_are_not_used_are_named(small, trainer, caplog):
    trainer(limit_val_batches=0).fit(SelfSupervisedMethod(small("simclr"), encoder=Net()), images(4))
    assert "the loader yields 4 views of each image, of which 2 are used" in caplog.text


@pytest.mark.parametrize("batches", [1, 1.0])
def test_a_validation_loader_without_a_length_has_a_verdict(batches, small, trainer, caplog):
    class Stream(IterableDataset):
        def __iter__(self):
            for i in range(32):
                yield torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8), i % 2

    fit = trainer(limit_val_batches=batches)
    method = SelfSupervisedMethod(small("simclr", evaluations=["knn"]), encoder=Net())
    fit.fit(method, images(), DataLoader(Stream(), batch_size=16))
    assert "verdict: valid_knn20_acc " in caplog.text


@pytest.mark.parametrize("resumable", [False, True])
def test_the_last_of_own_validation_loaders_is_not_taken_for_the_training_set(resumable, small, trainer):
    dataset = TensorDataset(torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 2)

    def own() -> DataLoader:
        if not resumable:
            return DataLoader(dataset, batch_size=16)
        return ResumableDataLoader(dataset, batch_size=16, sampler=ResumableSampler(dataset, 1, 0, seed=0))

    method = SelfSupervisedMethod(small("simclr", probe_on_training_set=True, evaluations=["knn"]), encoder=Net())
    fit = trainer(limit_val_batches=1.0)
    fit.fit(method, own(), [own(), own()])
    names = {name for name in fit.callback_metrics if "knn20_" in name}
    assert names == {"valid_knn20_acc", "valid_knn20_acc_1"}
    fit.test(method, [own(), own()], verbose=False)
    names = {name for name in fit.callback_metrics if "knn20_" in name}
    assert names == {"test_knn20_acc", "test_knn20_acc_1"}
    with pytest.raises(ValueError, match="data_fraction=0.5: no effect on your own loader"):
        trainer().fit(SelfSupervisedMethod(small("simclr", data_fraction=0.5), encoder=Net()), own())


@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_our_loaders_are_ours_if_lightning_builds_them_again(small, trainer):
    fit = trainer(overfit_batches=2)
    fit.fit(SelfSupervisedMethod(small("simclr", data_fraction=0.5), encoder=Net()))
    assert type(fit.train_dataloader.sampler) is torch.utils.data.SequentialSampler


def test_batches_without_a_size_have_draws_of_their_own(small, trainer):
    """The last batch, which is smaller, must not have the draws of the one before."""
    x = torch.randint(0, 256, (1, 8, 8), dtype=torch.uint8).repeat(16, 1, 1, 1)  # equal images: equal draws are seen
    seen = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch[0][0])

    loader = DataLoader([x, x[:8], x[:8]], batch_size=None)
    fit = trainer(limit_train_batches=1.0, callbacks=[Seen()])
    fit.fit(SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=Net()), loader)
    first, second, third = seen
    assert not any(torch.equal(*pair) for pair in ((first[:8], second), (first[8:], second), (second, third)))


def test_labels_of_some_batches_only_are_named(small, trainer):
    x = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)
    some = DataLoader([(x, torch.arange(16) % 2), x], batch_size=None)
    with pytest.raises(ValueError, match="the loader 0 yields labels with some batches only"):
        trainer(limit_val_batches=1.0).fit(
            SelfSupervisedMethod(small("simclr", evaluations=["knn"]), encoder=Net()), images(), some
        )


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_frozen_stages_keep_their_batch_statistics(small, trainer):
    """In whatever mode the encoder was before."""
    for mode in (True, False):
        encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6))
        encoder[:3].requires_grad_(False)
        trainer().fit(SelfSupervisedMethod(small("simclr", evaluations=[]), encoder=encoder.train(mode)), images())
        assert not encoder[2].running_mean.any() and encoder[4].running_mean.any()
