"""Names and lists of settings as users see them: presets, short reprs, and errors that name what is near."""

import inspect
import pickle
import pydoc
import re

import attrs
import pytest

import linear_classifier
import model_params
from linear_classifier import LINEAR_PRESETS, LinearClassifierMethod, LinearClassifierMethodParams
from moco import SelfSupervisedMethod
from model_params import PRESETS, BYOLParams, MoCoV2Params, ModelParams, SCEParams, SimCLRParams, SimSiamParams
from self_supervised.fields import Preset, as_path, suggestion
from self_supervised.recipes import recipe, tried_with
from self_supervised.training.hyperparameters import resolve

ROWS = {
    f"{table.kind.__name__} {name}": (module, preset)
    for module, table in ((model_params, PRESETS), (linear_classifier, LINEAR_PRESETS))
    for name, preset in table.items()
    if preset is not table.kind
}


@pytest.mark.parametrize("row", ROWS)
def test_a_preset_shows_its_name_paper_and_settings(row):
    module, preset = ROWS[row]
    assert getattr(module, preset.__name__) is preset  # the name is that of the variable
    assert repr(preset) == f"<preset {preset.__name__} of {preset.kind.__name__}>"
    shown = pydoc.plain(pydoc.render_doc(preset))
    assert re.search("https://(arxiv|doi).org/", shown) or preset.__name__ == "SemiSupervised10Params"
    signature = inspect.signature(preset)
    assert list(signature.parameters) == [field.name for field in attrs.fields(preset.kind)]
    for name, value in preset.settings.items():
        assert f"{name}={value!r}" in shown and signature.parameters[name].default == getattr(preset(), name) == value


def test_a_preset_is_called_like_its_class():
    params = PRESETS["byol"](lr=0.3, loss_constant_factor=1)
    assert isinstance(params, ModelParams) and type(params) is ModelParams and MoCoV2Params is ModelParams
    assert (params.lr, params.loss_constant_factor, params.loss_type) == (0.3, 1, "ip")
    assert BYOLParams() == BYOLParams(**BYOLParams.settings) and "lr" not in BYOLParams.settings  # calls do not add up
    assert attrs.evolve(params, lr=0.4).loss_type == "ip"
    assert pickle.loads(pickle.dumps(params)) == params
    assert pickle.loads(pickle.dumps(BYOLParams))(lr=0.3) == BYOLParams(lr=0.3)
    mine = Preset(SimSiamParams, "mine", "Mine.", lr=0.1, name_of_none=1)
    assert mine.settings["stop_gradient_of_keys"] and SimSiamParams.settings["lr"] == 0.05
    with pytest.raises(TypeError, match="pass fields by name"):
        BYOLParams("cifar10")
    with pytest.raises(TypeError, match="name_of_none: ModelParams has no such field"):
        mine()


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_are_instances_of_the_preset_that_made_them_and_of_no_other(preset):
    recipes = [recipe(preset, name) for name in tried_with(preset)]
    changed = {"weight_decay": 0.01, "batch_size": 64, "grad_clip_lars": False}
    for params in (PRESETS[preset](lr=0.07, optimizer_name="adamw", **changed), *recipes):
        params = ModelParams(**attrs.asdict(params))  # as from a checkpoint
        is_instance = [name for name, other in PRESETS.items() if isinstance(params, other)]
        assert is_instance == list(dict.fromkeys(["moco_v2", preset]))
    assert not isinstance(LinearClassifierMethodParams(), SimCLRParams) and not isinstance(None, SimCLRParams)
    loaded = pickle.loads(pickle.dumps(SimCLRParams))
    assert isinstance(SimCLRParams(), loaded) and not isinstance(BYOLParams(), loaded)


def test_settings_of_a_preset_of_the_users_own_are_its_instances():
    mine = Preset(SimSiamParams, "mine", "Mine.", lr=0.1, m=0.9)
    assert isinstance(mine(T=0.3), mine) and not isinstance(SimSiamParams(), mine) and isinstance(mine(), SimSiamParams)
    assert not isinstance(ModelParams(), Preset(ModelParams, "mine", "Mine.", loss_type="ip"))


@pytest.mark.parametrize("preset", [*PRESETS.values(), *LINEAR_PRESETS.values()])
def test_the_repr_is_short_and_can_be_evaluated(preset):
    params = preset(dataset_name="cifar10", lr=0.25)
    assert eval(repr(params)) == params
    assert repr(params).startswith(f"{type(params).__name__}(") and "dataset_name='cifar10'" in repr(params)
    assert repr(ModelParams()) == "ModelParams()"
    assert repr(ModelParams(T=0.1, K=2)) == "ModelParams(K=2, T=0.1)"


@pytest.mark.parametrize("kind", [ModelParams, LinearClassifierMethodParams, SimCLRParams])
@pytest.mark.parametrize(
    ("unknown", "near"),
    [("learning_rate", r"lr\?"), ("bach_size", "batch_size"), ("qqq", r"help\(\w+\) shows all fields")],
)
def test_an_unknown_field_names_the_nearest(kind, unknown, near):
    for build in (kind, lambda **fields: attrs.evolve(kind(), **fields)):
        with pytest.raises(TypeError, match=rf"^{unknown}: \w+ has no such field. .*\b{near}"):
            build(**{unknown: 0.1})


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(KeyError, match="preset=barlow: unknown preset. Did you mean barlow_twins"):
        PRESETS["barlow"]
    with pytest.raises(KeyError, match="preset=mae: unknown preset. .*moco_v2, .*sce_video"):
        PRESETS["mae"]
    with pytest.raises(KeyError, match="Did you mean linear_sgd"):
        LINEAR_PRESETS["linear_sdg"]
    assert "mae" not in PRESETS and PRESETS.get("mae") is None
    assert set(pickle.loads(pickle.dumps(PRESETS))) == set(PRESETS)


@pytest.mark.parametrize("kind", [ModelParams, LinearClassifierMethodParams])
def test_a_change_says_how_to_evolve(kind):
    params = kind()
    advice = r"^lr=0.3: .*attrs.evolve\(params, lr=0.3\)"
    with pytest.raises(attrs.exceptions.FrozenInstanceError, match=advice) as caught:
        params.lr = 0.3
    assert isinstance(caught.value, AttributeError) and params == kind()


def test_suggestions_are_spelled_alike_or_have_the_initials():
    names = ("lr", "lr_scaling", "T", "max_epochs", "batch_size")
    assert suggestion("bacth_size", names, "--") == " Did you mean --batch_size?"
    assert suggestion("learning_rate", names) == " Did you mean lr?"
    assert suggestion("temperature", names) == " Did you mean T?"
    assert suggestion("learning_rate", names[1:]) == " Did you mean lr_scaling?"
    assert suggestion("xyz", names, otherwise=" None.") == " None."


@pytest.mark.parametrize("given", ["sce", SCEParams, {**SCEParams.settings}, SCEParams()])
def test_settings_are_taken_in_every_form(given):
    assert resolve(PRESETS, given, None, {"lr": 0.3, "seed": 1})[0] == SCEParams(lr=0.3, seed=1)
    assert resolve(PRESETS, None, None, {"seed": 1})[0] == resolve(PRESETS, MoCoV2Params, None, {"seed": 1})[0]


@pytest.mark.parametrize(
    ("method", "names"),
    [(SelfSupervisedMethod, ("simclr", SimCLRParams)), (LinearClassifierMethod, ("linear_sgd", "fine_tune"))],
)
def test_a_method_takes_a_preset_and_its_name(method, names):
    presets = PRESETS if method is SelfSupervisedMethod else LINEAR_PRESETS
    small = {"dataset_name": "digits", "encoder_arch": "shufflenet_v2_x0_5", "seed": 0}
    for name in names:
        assert method(name, **small).params == (presets[name] if isinstance(name, str) else name)(**small)
    other = LinearClassifierMethodParams if method is SelfSupervisedMethod else SimCLRParams
    for wrong in (3, ["simclr"], other(), other, print):
        with pytest.raises(TypeError, match=f"^params: .* is not {presets.kind.__name__}. Pass .* {names[0]}"):
            method(wrong)
    with pytest.raises(KeyError, match="unknown preset"):
        method("mae")


def test_a_tilde_of_no_user_stays(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert str(as_path("~/a")) == "/home/me/a" and str(as_path("~nobody_of_this_name/a")) == "~nobody_of_this_name/a"
