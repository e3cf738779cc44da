"""What users put into a method, or change in it: encoders, losses, weights, lists of settings, loaders of their own."""

import attrs
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from linear_classifier import LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import PRESETS, BYOLParams, VICRegParams
from self_supervised.networks.pretrained import load_encoder


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


def test_a_lower_lr_lowers_the_ends_of_its_schedule(small):
    model = SelfSupervisedMethod(small("vicreg", lr=0.3, final_lr_schedule_value=0.002), encoder=Net())
    model.lr = 0.1
    assert model.params.final_lr_schedule_value == 0.002
    model.lr = 0.001
    assert model.params.final_lr_schedule_value == model.hparams.final_lr_schedule_value == pytest.approx(2e-5)


# ---- encoders ----


@pytest.mark.parametrize("build", [Hooked, patched])
def test_an_encoder_whose_copy_computes_with_the_original_is_refused(build, small):
    with pytest.raises(ValueError, match="encoder: a copy of it, the lagging model, computes with weights or features"):
        SelfSupervisedMethod(small("byol"), encoder=build())
    SelfSupervisedMethod(small("simclr"), encoder=build())  # without a lagging model, there is no copy


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


def test_a_head_that_is_replaced_without_its_lagging_copy_is_refused(small, trainer):
    model = SelfSupervisedMethod(small("byol"), encoder=Net())
    model.projection_model = nn.Linear(6, 16)
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


def test_the_last_of_own_validation_loaders_is_not_taken_for_the_training_set(small, trainer):
    labeled = DataLoader(
        TensorDataset(torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8), torch.arange(64) % 2), batch_size=16
    )
    params = small("simclr", probe_on_training_set=True, evaluations=["knn"])
    fit = trainer(limit_val_batches=1.0)
    fit.fit(SelfSupervisedMethod(params, encoder=Net()), images(), [labeled, labeled])
    names = {name for name in fit.callback_metrics if "knn20_" in name}
    assert names == {"valid_knn20_acc", "valid_knn20_acc_1"}
