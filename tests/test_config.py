"""Options: round trips through JSON and YAML, and errors that name the nearest option."""

import copy
import dataclasses
import json
import math
import pickle
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import yaml

import tl_adapters
from tl_adapters.cli.main import main
from tl_adapters.config import (
    LOSS_WEIGHTS,
    STAGE_ORDERS,
    ConfigError,
    DataConfig,
    LocalConfig,
    LossWeights,
    RunConfig,
    TrainingConfig,
    commented_yaml,
    field_docs,
    json_schema,
    option_path,
    parse_options,
    shipped_configs,
    with_options,
)

BOTH = ("local", "end_to_end")


def test_a_configuration_survives_json_and_yaml(tmp_path: Path) -> None:
    options = {"loss_weights": LOSS_WEIGHTS["public_code"], "count": ("answer",)}
    training = TrainingConfig(stages=("end_to_end",), steps=7, lr=1e-5, **options)  # type: ignore[arg-type]
    config = RunConfig(base="b", target="t", data=DataConfig(source="x.jsonl", max_tokens=9), training=training)
    (tmp_path / "c.json").write_text(json.dumps(config.to_dict()))
    (tmp_path / "c.yaml").write_text(commented_yaml(config))
    assert RunConfig.load(tmp_path / "c.json") == config == RunConfig.load(tmp_path / "c.yaml")


def test_options_that_an_activation_does_not_read_are_not_recorded() -> None:
    """Otherwise a run's own file would be refused once a default has changed."""
    recorded = {
        name: set(RunConfig(training=TrainingConfig(activation=name, stages=BOTH)).to_dict()["training"])
        for name in ("relu", "jumprelu", "topk", "batchtopk")
    }
    everything = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert everything - recorded["relu"] == {"l0_weight", "k", "bandwidth"}
    assert everything - recorded["jumprelu"] == {"l1_weight", "k"}
    assert recorded["topk"] == recorded["batchtopk"]
    assert everything - recorded["topk"] == {"l1_weight", "l0_weight", "l1_warmup_fraction", "bandwidth"}
    for name, stages in product(recorded, STAGE_ORDERS):
        config = RunConfig(training=TrainingConfig(activation=name, stages=stages))
        assert RunConfig.from_dict(config.to_dict()) == config


def test_options_that_no_stage_reads_are_not_recorded() -> None:
    everything = set(RunConfig(training=TrainingConfig(stages=BOTH)).to_dict()["training"])
    local, end_to_end = (
        everything - set(RunConfig(training=TrainingConfig(stages=stages)).to_dict()["training"])
        for stages in (("local",), ("end_to_end",))
    )
    assert end_to_end == {"local"}
    assert {"steps", "lr", "l1_weight", "loss_weights", "recompute"} < local


def test_a_record_of_an_earlier_version_is_read() -> None:
    """Before there were stages, runs were end to end; later ones recorded options that no stage reads."""
    assert RunConfig.from_record({"training": {"steps": 7}}).training == TrainingConfig(stages=("end_to_end",), steps=7)
    both = {"local": {"steps": 600, "penalty": "tanh"}, "steps": 7, "lr": 0.1}
    assert RunConfig.from_record({"training": {"stages": ["end_to_end"], **both}}).training == TrainingConfig(
        stages=("end_to_end",), steps=7, lr=0.1
    )
    assert RunConfig.from_record({"training": {"stages": ["local"], **both}}).training == TrainingConfig(
        local=LocalConfig(steps=600, penalty="tanh")
    )
    for damaged in (3, {"training": 3}, {"training": {"stages": 3}}, {"training": {"stages": [[]]}}):
        with pytest.raises(ConfigError):
            RunConfig.from_record(damaged)


def test_a_stage_is_left_out_with_its_options() -> None:
    """So `--config paper --set stages=[local]` is enough."""
    paper = RunConfig.load("paper")
    local = with_options(paper, {"stages": ["local"], "local.streaming": True}).training
    assert local == TrainingConfig(
        n_features=8192, tokens_per_batch=1, checkpoint_every=1000, validate_every=1000,
        local=LocalConfig(streaming=True),
    )  # fmt: skip
    with pytest.raises(
        ConfigError, match=r"lr is 0.1, and stages \[local\] do not read it.* give local.lr, or add the stage"
    ):
        with_options(paper, {"stages": ["local"], "lr": 0.1})


def test_a_short_name_is_the_shortest_path_that_ends_with_it() -> None:
    paths = {"lr": "training.lr", "local.lr": "training.local.lr", "steps": "training.steps", "local": "training.local"}
    paths |= {"max_tokens": "data.max_tokens", "loss_weights.local": "training.loss_weights.local", "data": "data"}
    assert {name: option_path(name) for name in paths} == paths
    changed = with_options(RunConfig(), parse_options(["stages=[local,end_to_end]", "local.steps=7", "steps=9"]))
    assert changed.training == TrainingConfig(stages=("local", "end_to_end"), local=LocalConfig(steps=7), steps=9)


def test_recipes_by_name_are_what_the_names_promise() -> None:
    """The paper's recipes have the paper's objective, whatever the default becomes."""
    for name in ("paper", "public_code"):
        training = RunConfig.load(name).training
        assert training.stages == ("end_to_end",) and training.loss_weights == LOSS_WEIGHTS[name]
        assert training.loss_weights.local == 0
    assert RunConfig.load("builtin_end_to_end").training.loss_weights == LossWeights()
    assert RunConfig().training.stages == ("local",)


def test_published_weights() -> None:
    assert TrainingConfig().loss_weights == LossWeights(1, 1, 1, 1, lowest_cut=1)
    assert RunConfig.from_dict(
        {"training": {"stages": BOTH, "loss_weights": "public_code"}}
    ).training.loss_weights == LossWeights(1, 2, 2, 1, 0)


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
        ({"count": []}, 'a list that is not empty of "prompt", "thinking", "answer"'),
        ({"count": ["prompts"]}, r"count\[0\] is 'prompts'; allowed is .*thinking"),
        ({"count": "answer"}, "allowed is a list"),
        ({"tracker": "wand"}, 'allowed is "none", "tensorboard"'),
        ({"loss_weights": 3}, "loss_weights is 3; allowed is a mapping"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"beta2": 1.0}, "beta2"),
        ({"warmup_fraction": 2}, "from 0 to 1"),
        ({"loss_weights": {"lowest_cut": 2}}, "0 or 1"),
        ({"activation": "gelu"}, 'activation is \'gelu\'; allowed is "relu", "jumprelu", "topk" or "batchtopk"'),
        ({"k": 7}, "k is 7, and activation 'relu' does not read it; only topk and batchtopk do. Leave it out"),
        ({"activation": "jumprelu", "k": 7}, "k is 7, and activation 'jumprelu' does not read it"),
        ({"activation": "topk", "l1_weight": 0.01}, "l1_weight is 0.01, and activation 'topk' .* only relu does"),
        ({"activation": "jumprelu", "l1_weight": 0.01}, "l1_weight is 0.01, and activation 'jumprelu'"),
        ({"activation": "batchtopk", "l1_warmup_fraction": 0.5}, "only relu and jumprelu do"),
        ({"bandwidth": 0.1}, "bandwidth is 0.1, and activation 'relu' does not read it; only jumprelu does"),
        ({"l0_weight": 0.1}, "l0_weight is 0.1, and activation 'relu'"),
        ({"activation": "jumprelu", "bandwidth": 0.0}, "bandwidth is 0.0; allowed is a number > 0"),
        ({"activation": "jumprelu", "l0_weight": -1}, "l0_weight is -1; allowed is a number >= 0"),
        ({"activation": "topk", "k": 0}, "k is 0; allowed is a whole number >= 1"),
        ({"activation": "batchtopk", "n_features": 4}, r"k is 6; allowed is .* n_features \(4\)"),
        ({"stages": []}, r"stages is \[\]: give \[local\], \[end_to_end\] or \[local, end_to_end\]"),
        ({"stages": ["end_to_end", "local"]}, r"give \[local\], \[end_to_end\] or \[local, end_to_end\]"),
        ({"stages": ["lokal"]}, r"stages\[0\] is 'lokal'; allowed is \"local\" or \"end_to_end\""),
        ({"stages": ["local"], "steps": 3}, r"steps is 3, and stages \[local\] do not read it; only end_to_end does"),
        ({"stages": ["local"], "l1_weight": 1}, "l1_weight is 1.0, .* Leave it out or add the stage"),
        ({"stages": ["end_to_end"], "local": {"steps": 3}}, r"local is .*steps=3.* \[end_to_end\] do not read it"),
        ({"local": {"stps": 3}}, "Unknown option training.local.stps. Did you mean training.local.steps"),
        ({"local": {"workers": 0}}, "training.local.workers is 0; allowed is a whole number >= 1 or null"),
    ],
)
def test_an_impossible_training_option_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"training": {"stages": list(BOTH), **values}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": 3}, "Unknown option steps. Did you mean training.steps"),
        ({"data": {"sorce": "x"}}, "Unknown option data.sorce. Did you mean data.source"),
        ({"data": {"too_long": "cut"}}, 'data.too_long is \'cut\'; allowed is "truncate", "drop" or "refuse"'),
        ({"data": {"max_tokens": 1}}, "data.max_tokens is 1; allowed is a whole number >= 2 or null"),
        ({"data": {"streaming": "yes"}}, "data.streaming is 'yes'; allowed is true or false"),
        ({"data": {"validation_fraction": 1.0}}, "validation_fraction"),
        ({"dtype": "int8"}, "dtype is 'int8'; allowed is \"float32\", .* or null"),
        ({"base": "b"}, "give both, or neither"),
        ({"data": {"source": "d\udcff.jsonl"}}, "data.source is .* not text in UTF-8. Give .* rename a file"),
    ],
)
def test_an_impossible_option_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict(values)


def test_a_file_without_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(ConfigError, match=r"c\.json is not valid JSON: .*Give a \.yaml"):
        RunConfig.load(tmp_path / "c.json")
    for text, message in (
        ("- a\n- b\n", r"not \['a', 'b'\]"),
        ("", "not None"),
        ("training: {lr: -1}", "training.lr is -1"),
    ):
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"c\.yaml: .*{message}"):
            RunConfig.load(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match="There is no file papr.*openthoughts3.*paper"):
        RunConfig.load("papr")


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk", "batchtopk"])
def test_every_shipped_configuration_takes_every_activation(activation: str) -> None:
    for name in shipped_configs():
        training = with_options(RunConfig.load(name), {"activation": activation}).training
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainingConfig(lr=-1), "lr is -1; allowed is a number > 0"),
        (lambda: LossWeights(-1), "output_kl is -1; allowed is a number >= 0"),
        (lambda: TrainingConfig(steps=True), "steps is True; allowed is a whole number >= 1"),
        (lambda: TrainingConfig(lr=True), "lr is True"),
        (lambda: TrainingConfig(lr="0.1"), "lr is '0.1'; allowed is a number > 0"),
        (lambda: TrainingConfig(lr=math.nan), "lr is nan; allowed is a finite number > 0"),
        (lambda: TrainingConfig(l1_weight=math.inf), "l1_weight is inf; allowed is a finite number >= 0"),
        (lambda: TrainingConfig(stpes=3), "Unknown option stpes. Did you mean steps?"),
        (lambda: TrainingConfig(loss_weights=3), "loss_weights is 3; allowed is an instance of LossWeights"),
        (lambda: RunConfig(base="b"), "base is 'b' and target is ''; give both, or neither"),
        (lambda: dataclasses.replace(TrainingConfig(), beta1=1), "beta1 is 1; allowed is a number >= 0 and < 1"),
        (lambda: dataclasses.replace(TrainingConfig(), k=7), "k is 7, and activation 'relu' does not read it"),
        (
            lambda: dataclasses.replace(DataConfig(), too_long="cut"),
            'too_long is \'cut\'; allowed is "truncate", "drop"',
        ),
    ],
)
def test_options_are_checked_in_python_as_in_files(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert message in str(error.value)
    assert error.value.__suppress_context__  # pydantic's own text would say the same in other words


def test_python_values_keep_their_types() -> None:
    config = TrainingConfig(stages=BOTH, lr=1, count=["answer"])  # type: ignore[arg-type]
    assert (config.lr, config.count, type(config.lr)) == (1.0, ("answer",), float)
    assert type(DataConfig(validation_fraction=0).validation_fraction) is int  # the fingerprint of data hashes its text
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="more values than it has options"):
        LossWeights(1, 1, 1, 1, 1, 1, 1, 1)  # type: ignore[call-arg]
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config


def test_numbers_in_yaml_are_numbers(tmp_path: Path) -> None:
    """PyYAML reads 1e-3 as text, and a date as a date."""
    path = tmp_path / "c.yaml"
    path.write_text("data: {template_date: 2026-02-28}\ntraining: {stages: [end_to_end], lr: 1e-3, l1_weight: 1}")
    assert RunConfig.load(path).training.lr == 0.001
    assert RunConfig.load(path).data.template_date == "2026-02-28"
    for text, message in (
        ("training: {lr: .nan}", "training.lr is nan"),
        ("training: {lr: .inf}", "training.lr is inf"),
        ("training: {steps: 1e3}", "training.steps is 1000.0; allowed is a whole number"),
        ("training: {lr: 1, lr: 2}", "the key lr is repeated"),
        ("data: {template_date: 3 Feb}", "data.template_date is '3 Feb': give a date such as 2026-02-28, or null"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            RunConfig.load(path)


def test_a_message_is_short_whatever_was_given(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    aliases = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10))
    for text in (aliases, "data: {source: [" + "1," * 10**5 + "1]}", "x" * 10**5 + ": 1", "[" * 10**4):
        path.write_text(text)
        with pytest.raises(ConfigError) as error:
            RunConfig.load(path)
        assert len(str(error.value)) < 1000


def test_options_are_changed_by_name() -> None:
    default = RunConfig(training=TrainingConfig(stages=BOTH))
    config = with_options(default, {"training.lr": 1e-3, "source": "x.jsonl", "nmse": 3, "count": ["answer"]})
    training = TrainingConfig(stages=BOTH, lr=1e-3, loss_weights=LossWeights(nmse=3), count=("answer",))
    assert config == RunConfig(data=DataConfig(source="x.jsonl"), training=training)
    assert with_options(config, {"loss_weights": "public_code"}).training.loss_weights == LOSS_WEIGHTS["public_code"]
    assert with_options(config, {}) == config
    assert with_options(RunConfig(), {"activation": "topk", "k": 9}).training.k == 9
    for changes, message in (
        ({"trainin.lr": 1}, "Unknown option trainin.lr. Did you mean training.lr?"),
        ({"weight": 1}, "Unknown option weight. Did you mean training"),
        ({"lr": 0}, "training.lr is 0; allowed is a number > 0"),
        ({"loss_weights": "paper", "nmse": 1}, "nmse is given beside loss_weights 'paper'"),
        ({"k": 9}, "k is 9, and activation 'relu' does not read it"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_options(default, changes)


def test_options_are_read_from_text() -> None:
    given = [
        "lr=1e-3",
        "data.source=a: b#c",
        "data.subset=null",
        "steps=7",
        "streaming=true",
        "count=[answer]",
        "base=1",
    ]
    assert parse_options(given) == {
        "training.lr": 0.001, "data.source": "a: b#c", "data.subset": None, "training.steps": 7, "data.streaming": True,
        "training.count": ["answer"], "base": "1",
    }  # fmt: skip
    for texts, message in (
        (["lr"], "'lr' sets no option; write OPTION=VALUE"),
        (["lr=1", "training.lr=2"], "Option training.lr is given twice"),
        (["rl=1"], "Unknown option rl"),
        (["steps=[1"], r"The value of training.steps, '\[1', is not valid YAML"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_options(texts)


def test_the_shipped_schema_is_the_schema_of_the_options() -> None:
    """Write it anew with: python -c "from tl_adapters.config import *; print(json.dumps(json_schema(), indent=1))"."""
    folder = Path(tl_adapters.__file__).parent / "configs"
    schema = json.loads((folder / "schema.json").read_text())
    assert schema == json_schema()
    training = schema["$defs"]["TrainingConfig"]["properties"]
    assert training["lr"]["exclusiveMinimum"] == 0 and "Adam" in training["lr"]["description"]
    assert training["loss_weights"]["anyOf"][1]["enum"] == list(LOSS_WEIGHTS)
    for path in shipped_configs().values():
        assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=schema.json"
