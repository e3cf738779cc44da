"""docs/options.md is current, and its tables can be generated for any settings class."""

import re
from functools import partial

import attrs
import options_page
import pytest

from self_supervised.fields import choice, positive

TEXT = options_page.PAGE.read_text()


@attrs.frozen(kw_only=True)
class BaseSettings:
    """Settings of both stages."""

    # the data
    folder: str = "a|b"  # pairs like <a> and *b*, or `*c*`


@attrs.frozen(kw_only=True)
class TrainingSettings(BaseSettings):
    """Settings of the training."""

    rate: float = positive(0.1)  # of each step

    # what it minimizes
    loss: str = choice("ce", ("ce", "ip"))


FastSettings = TrainingSettings
SlowSettings = partial(TrainingSettings, rate=0.01)
TRAINING_PRESETS = {"fast": FastSettings, "slow": SlowSettings}


def test_page_is_current():
    generated = options_page.generated(options_page.CLASSES)
    assert options_page.updated(TEXT, generated) == TEXT, "run: python docs/options_page.py"


def test_every_setting_has_one_row_in_its_class():
    for kind in options_page.CLASSES:
        (section,) = re.findall(rf"^## {kind.__name__}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE)
        settings = section.partition("\n### Presets")[0]
        named = re.findall(r"^\| `(\w+)` \|", settings, re.MULTILINE)
        for known in re.findall(r"^These settings are as above: (.*)\.$", settings, re.MULTILINE):
            named += re.findall(r"`(\w+)`", known)
        assert sorted(named) == sorted(field.name for field in attrs.fields(kind))


def test_explained_settings_exist():
    fields = {field.name for kind in options_page.CLASSES for field in attrs.fields(kind)}
    explained = re.findall(r"\*\*(\w+)\*\*", options_page.MARKER.split(TEXT)[0])
    assert len(explained) > 30 and set(explained) <= fields


@pytest.mark.parametrize(
    "line",
    [
        "### the data",
        r"| `folder` | `a\|b` | pairs like \<a> and \*b\*, or `*c*` | text |",
        "| `rate` | `0.1` | of each step | number |",
        "| `loss` | `ce` |  | `ce`, `ip` |",
        "These settings are as above: `folder`.",
        "| `fast` | `FastSettings` | the defaults |",
        "| `slow` | `SlowSettings` | `rate=0.01` |",
    ],
)
def test_tables_of_other_classes(line):
    assert line in options_page.generated([BaseSettings, TrainingSettings]).splitlines()
