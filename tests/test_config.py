"""Options: both ways through JSON and YAML, and errors that name the nearest."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import tl_adapters
from tl_adapters.config import LOSS_WEIGHTS, ConfigError, LossWeights, TrainingConfig


def test_round_trip(tmp_path: Path) -> None:
    config = TrainingConfig(steps=7, lr=0.5, beta1=0.5, loss_weights=LOSS_WEIGHTS["public_code"])
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert TrainingConfig.load(tmp_path / "c.json") == config == TrainingConfig.load(tmp_path / "c.yaml")


def test_published_weights() -> None:
    assert TrainingConfig().loss_weights == LossWeights(1, 1, 1, 1, lowest_cut=1)
    assert TrainingConfig.from_dict({"loss_weights": "public_code"}).loss_weights == LossWeights(1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l1_wieght": 1}, "l1_wieght.*Did you mean l1_weight"),
        ({"loss_weights": {"nsme": 1}}, "loss_weights.nsme.*Did you mean loss_weights.nmse"),
        ({"loss_weights": "papers"}, "papers.*paper.*public_code"),
        ({"steps": 0}, "steps is 0; allowed is a whole number >= 1"),
        ({"steps": "many"}, "steps is 'many'; allowed is int"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"beta2": 1.0}, "beta2"),
        ({"warmup_fraction": 2}, "from 0 to 1"),
        ({"loss_weights": {"lowest_cut": 2}}, "0 or 1"),
    ],
)
def test_what_cannot_be_is_said(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainingConfig.from_dict(values)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ConfigError, match="neither valid JSON nor YAML"):
        TrainingConfig.load(tmp_path / "c.json")
    (tmp_path / "c.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="list"):
        TrainingConfig.load(tmp_path / "c.yaml")


def test_every_option_is_read_and_documented() -> None:
    package = Path(tl_adapters.__file__).parent
    sources = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "config.py")
    text = (package / "config.py").read_text()
    for cls in (TrainingConfig, LossWeights):
        for field in dataclasses.fields(cls):
            assert re.search(rf"\.{field.name}\b", sources), f"nothing reads {field.name}"
            assert re.search(rf'^    {field.name}: .*\n    """', text, re.MULTILINE), f"{field.name} has no docstring"
