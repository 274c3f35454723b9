"""Options: round trips through JSON and YAML, and errors that name the nearest option."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

import tl_adapters
from tl_adapters.cli.main import main
from tl_adapters.config import (
    LOSS_WEIGHTS,
    ConfigError,
    DataConfig,
    LossWeights,
    RunConfig,
    TrainingConfig,
    commented_yaml,
    field_docs,
    shipped_configs,
)


def test_a_configuration_survives_json_and_yaml(tmp_path: Path) -> None:
    training = TrainingConfig(steps=7, lr=1e-5, loss_weights=LOSS_WEIGHTS["public_code"], count=("answer",))
    config = RunConfig(base="b", target="t", data=DataConfig(source="x.jsonl", max_tokens=9), training=training)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(commented_yaml(config))
    assert RunConfig.load(tmp_path / "c.json") == config == RunConfig.load(tmp_path / "c.yaml")


def test_options_that_an_activation_does_not_read_are_not_recorded() -> None:
    """Otherwise a run's own file would be refused once a default has changed."""
    recorded = {
        name: set(RunConfig(training=TrainingConfig(activation=name)).to_dict()["training"])
        for name in ("relu", "jumprelu", "topk", "batchtopk")
    }
    everything = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert everything - recorded["relu"] == {"l0_weight", "k", "bandwidth"}
    assert everything - recorded["jumprelu"] == {"l1_weight", "k"}
    assert recorded["topk"] == recorded["batchtopk"]
    assert everything - recorded["topk"] == {"l1_weight", "l0_weight", "l1_warmup_fraction", "bandwidth"}
    for name in recorded:
        config = RunConfig(training=TrainingConfig(activation=name))
        assert RunConfig.from_dict(config.to_dict()) == config


def test_published_weights() -> None:
    assert TrainingConfig().loss_weights == LossWeights(1, 1, 1, 1, lowest_cut=1)
    assert RunConfig.from_dict({"training": {"loss_weights": "public_code"}}).training.loss_weights == LossWeights(
        1, 2, 2, 1, 0
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"l1_wieght": 1}, "l1_wieght.*Did you mean training.l1_weight"),
        ({"loss_weights": {"nsme": 1}}, "loss_weights.nsme.*Did you mean training.loss_weights.nmse"),
        ({"loss_weights": "papers"}, "papers.*paper.*public_code"),
        ({"steps": 0}, "steps is 0; allowed is a whole number >= 1"),
        ({"steps": "many"}, "steps is 'many'; allowed is a whole number"),
        ({"steps": True}, "steps is True"),
        ({"keep_checkpoints": 0}, "keep_checkpoints is 0"),
        ({"count": []}, "one or more of prompt, thinking, answer"),
        ({"count": ["prompts"]}, "count is 'prompts'; allowed is .*thinking"),
        ({"count": "answer"}, "allowed is a list"),
        ({"tracker": "wand"}, 'allowed is "none", "tensorboard"'),
        ({"loss_weights": 3}, "loss_weights is 3; allowed is a mapping"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"beta2": 1.0}, "beta2"),
        ({"warmup_fraction": 2}, "from 0 to 1"),
        ({"loss_weights": {"lowest_cut": 2}}, "0 or 1"),
        ({"activation": "gelu"}, 'activation is \'gelu\'; allowed is "relu", "jumprelu", "topk", "batchtopk"'),
        ({"k": 7}, "k is 7, and activation 'relu' does not read it; only topk and batchtopk do. Leave it out"),
        ({"activation": "jumprelu", "k": 7}, "k is 7, and activation 'jumprelu' does not read it"),
        ({"activation": "topk", "l1_weight": 0.01}, "l1_weight is 0.01, and activation 'topk' .* only relu does"),
        ({"activation": "jumprelu", "l1_weight": 0.01}, "l1_weight is 0.01, and activation 'jumprelu'"),
        ({"activation": "batchtopk", "l1_warmup_fraction": 0.5}, "only relu and jumprelu do"),
        ({"bandwidth": 0.1}, "bandwidth is 0.1, and activation 'relu' does not read it; only jumprelu does"),
        ({"l0_weight": 0.1}, "l0_weight is 0.1, and activation 'relu'"),
        ({"activation": "jumprelu", "bandwidth": 0.0}, "bandwidth is 0.0; allowed is a number > 0"),
        ({"activation": "jumprelu", "l0_weight": -1}, "l0_weight is -1; allowed is a number >= 0"),
        ({"activation": "topk", "k": 0}, r"k is 0; allowed is a whole number from 1 to n_features \(512\)"),
        ({"activation": "batchtopk", "n_features": 4}, r"k is 6; allowed is .* n_features \(4\)"),
    ],
)
def test_an_impossible_training_option_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"training": values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3}, "Unknown option steps. Did you mean training.steps"),
        ({"data": {"sorce": "x"}}, "Unknown option data.sorce. Did you mean data.source"),
        ({"data": {"too_long": "cut"}}, 'data.too_long is \'cut\'; allowed is "truncate", "drop", "refuse"'),
        ({"data": {"max_tokens": 1}}, "data.max_tokens is 1; allowed is null or >= 2"),
        ({"data": {"streaming": "yes"}}, "data.streaming is 'yes'; allowed is true or false"),
        ({"data": {"validation_fraction": 1.0}}, "validation_fraction"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed is \"float32\", .* or null"),
        ({"base": "b"}, "give both, or neither"),
    ],
)
def test_an_impossible_option_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_a_file_without_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ConfigError, match="neither valid JSON nor YAML"):
        RunConfig.load(tmp_path / "c.json")
    (tmp_path / "c.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="list"):
        RunConfig.load(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="There is no file papr.*openthoughts3.*paper"):
        RunConfig.load("papr")


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_every_shipped_configuration_takes_every_activation(activation: str) -> None:
    for name in shipped_configs():
        training = dataclasses.replace(RunConfig.load(name).training, activation=activation)
        assert RunConfig.from_dict(yaml.safe_load(commented_yaml(RunConfig(training=training)))).training == training
    assert TrainingConfig(n_features=2).k == 6  # relu does not read it


def test_every_shipped_configuration_loads_and_begins_with_a_comment() -> None:
    configs = shipped_configs()
    assert {"builtin", "paper", "public_code", "openthoughts3"} <= set(configs)
    for name, path in configs.items():
        assert RunConfig.load(name) == RunConfig.load(path)
        assert path.read_text().startswith("# ")
    assert RunConfig.load("builtin") == RunConfig()
    paper, code = (RunConfig.load(name) for name in ("paper", "public_code"))
    weights = dataclasses.replace(code.training, loss_weights=LOSS_WEIGHTS["paper"])
    assert code.training.loss_weights == LOSS_WEIGHTS["public_code"]
    assert dataclasses.replace(code, training=weights) == paper


def test_the_printed_defaults_are_the_defaults_with_every_option_documented(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config"]) == 0
    text = capsys.readouterr().out
    assert RunConfig.from_dict(yaml.safe_load(text)) == RunConfig()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line and not line.lstrip().startswith("#"):
            assert lines[number - 1].lstrip().startswith("# "), line
    assert main(["config", "paper"]) == 0
    assert RunConfig.from_dict(yaml.safe_load(capsys.readouterr().out)) == RunConfig.load("paper")


def test_every_option_is_read_and_documented() -> None:
    package = Path(tl_adapters.__file__).parent
    sources = "".join(p.read_text() for p in package.rglob("*.py") if p.name != "config.py")
    for cls in (RunConfig, DataConfig, TrainingConfig, LossWeights):
        docs = field_docs(cls)
        for field in dataclasses.fields(cls):
            assert re.search(rf"\.{field.name}\b", sources), f"nothing reads {field.name}"
            assert docs[field.name].endswith("."), f"{field.name} has no docstring"
