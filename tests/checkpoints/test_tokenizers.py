"""A tokenizer gives the ids of its tokenizer.json, and a model carries it as TransformerLens would."""

import json
import logging
from pathlib import Path

import pytest
import torch
from helpers.hub_folders import KINDS, WRITES_BOS, write_model, write_pair, write_tokenizer
from helpers.random_models import random_model
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tl_adapters import PairedModel, attribute, encode_traces, train
from tl_adapters.checkpoints.tokenizers import PROBES, TokenizerError, give_tokenizer, load_tokenizer, without_embedding
from tl_adapters.cli.main import main
from tl_adapters.config import RunConfig
from tl_adapters.data.traces import DataError, Trace
from tl_adapters.study.doctor import diagnose


def raw(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_the_file_on_every_kind_of_text(name: str, tmp_path: Path) -> None:
    write_model(tmp_path, name)
    tokenizer, file = load_tokenizer(tmp_path), raw(tmp_path)
    assert tokenizer is not None
    for text in (
        *PROBES,
        "A  text\n\n\nthat is no probe: 3.14159, ŵ, 👩‍🚀, </think>x",
        *file.get_added_tokens_decoder(),
    ):
        text = str(text)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == file.encode(text, add_special_tokens=False).ids
    assert tokenizer.get_vocab().items() <= file.get_vocab(with_added_tokens=True).items()
    kind = KINDS[name]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template) == (kind.bos, kind.eos, kind.template)


@pytest.mark.parametrize(
    ("name", "declared"),
    [
        ("Qwen2 with its own", "Qwen2Tokenizer"),
        ("Qwen2 with its own", None),
        ("Llama 2", "LlamaTokenizer"),
        ("Qwen3", "LlamaTokenizer"),
        ("R1-Distill-Llama", "GemmaTokenizer"),
    ],
)
def test_a_class_with_other_ids_than_the_file_is_not_used(
    name: str, declared: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The last two are declared as no published model is; the guard does not know names."""
    write_model(tmp_path, name)
    write_tokenizer(tmp_path, name, tokenizer_class=declared)
    with caplog.at_level(logging.INFO):
        tokenizer = load_tokenizer(tmp_path)
    text = " How are you?\n\n12 345 "
    assert (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        == raw(tmp_path).encode(text, add_special_tokens=False).ids
    )
    if name in ("Qwen2 with its own", "Llama 2"):  # which published transformers read otherwise
        assert "gives other ids than tokenizer.json: from token" in caplog.text


def test_where_no_class_gives_the_ids_both_are_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path, "Qwen3")
    wrong = load_tokenizer(tmp_path)
    wrong.backend_tokenizer.normalizer = normalizers.Lowercase()
    for cls in (AutoTokenizer, PreTrainedTokenizerFast):
        monkeypatch.setattr(cls, "from_pretrained", lambda *args, **options: wrong)
    with pytest.raises(TokenizerError, match=r"has the ids \[\d+.*\] in .* and \[\d+.*\] in the file") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokens_that_only_the_configuration_names_are_kept(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path, "Llama 3.2")
    more = {str(tokenizer.get_vocab_size()): {"content": "<more>", "special": True}}
    write_tokenizer(tmp_path, "Llama 3.2", added_tokens_decoder=more)
    assert load_tokenizer(tmp_path).get_vocab()["<more>"] == tokenizer.get_vocab_size()


def test_a_given_tokenizer_that_differs_from_the_folders_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base, target = write_pair(tmp_path, "Llama 2")
    own = AutoTokenizer.from_pretrained(target)
    PairedModel.from_pretrained(base, target, tokenizer=own)
    assert "differs from the one in" in caplog.text
    caplog.clear()
    PairedModel.from_pretrained(base, target, tokenizer=load_tokenizer(target))
    assert "differs from the one in" not in caplog.text


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", KINDS)
def test_prepend_bos_prepends_bos(name: str, backend: str, tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, name)
    model = PairedModel.from_pretrained(base, target, backend=backend).model
    bos, text = model.tokenizer.bos_token_id, "How are you?"
    ids = raw(target).encode(text, add_special_tokens=False).ids
    for asked, expected in ((False, ids), (True, [bos, *ids] if bos is not None else ids), (None, ids)):
        options = {} if asked is None else {"prepend_bos": asked}
        assert model.to_tokens(text, **options)[0].tolist() == expected
    batch = model.to_tokens([text, "Hi"], prepend_bos=False)
    assert (batch == bos).sum() == 0 if bos is not None and bos != model.tokenizer.pad_token_id else True
    assert model.cfg.tokenizer_prepends_bos == (name in WRITES_BOS)


def test_a_rendered_prompt_is_read_with_one_bos(bos_pair: PairedModel) -> None:
    model = bos_pair.model
    prompt = model.tokenizer.apply_chat_template([{"role": "user", "content": "1+1=?"}], tokenize=False)
    assert model.to_tokens(prompt, prepend_bos=False)[0].tolist() == raw_ids(model.tokenizer, prompt)
    assert model.to_tokens(prompt)[0].tolist().count(model.tokenizer.bos_token_id) == 1


def raw_ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("backend", ["hooked", "bridge"])
@pytest.mark.parametrize("name", ["Llama 2", "Llama 3.2"])
def test_a_tokenizer_without_a_pad_token_works_and_is_not_changed(name: str, backend: str, tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, name)
    own = load_tokenizer(target)
    own.padding_side = "left"
    assert own.pad_token is None
    pair = PairedModel.from_pretrained(base, target, tokenizer=own, backend=backend)
    assert own.pad_token is None and pair.model.tokenizer.pad_token == own.eos_token
    tokens = torch.arange(20, 32)[None]
    assert pair.model.run_with_cache(tokens)[0].shape == pair.model(tokens).shape
    traces = encode_traces([("1+1=?", "<think>1+1=2.</think>2")] * 2, own)
    train(pair, traces, stages=("end_to_end",), steps=1, n_features=4, progress=False)
    attribute(pair, traces[0].tokens, progress=False)


@pytest.mark.parametrize("cut", [1, 2, 5])
def test_ids_without_an_embedding_are_refused_before_anything_is_written(cut: int, tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, "Qwen3", vocab_size=raw_size("Qwen3", tmp_path) - cut)
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "1+1=?", "response": "<think>a</think>2"}) + "\n")
    names = ["--base", str(base), "--target", str(target), "--data", str(tmp_path / "d.jsonl")]
    assert main(["train", *names, "--out", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()
    with pytest.raises(TokenizerError, match=r"no embedding for .*'</think>'"):
        PairedModel.from_pretrained(base, target)
    found = [str(f) for f in diagnose(RunConfig(base=str(base), target=str(target)), tmp_path) if f.level == "error"]
    assert len(found) == 1 and "vocabulary" in found[0] and "</think>" in found[0]


def raw_size(name: str, folder: Path) -> int:
    return write_tokenizer(folder / "size", name).get_vocab_size()


def test_a_class_that_adds_a_token_of_its_own_makes_no_model_wrong(tmp_path: Path) -> None:
    """Embeddings of exactly the file's tokens, and no <|endoftext|> among them, which Qwen2Tokenizer adds."""
    folder = tmp_path / "target"
    write_tokenizer(folder, "Qwen3", pad_token="<|pad|>")
    text = (folder / "tokenizer.json").read_text().replace("<|endoftext|>", "<|pad|>")
    write_model(tmp_path / "base", "Qwen3")
    write_model(folder, "Qwen3")
    (folder / "tokenizer.json").write_text(text)
    write_tokenizer_config(folder, pad_token=None)
    chosen = AutoTokenizer.from_pretrained(folder)
    assert without_embedding(load_tokenizer(folder), raw(folder).get_vocab_size()) == {}
    findings = diagnose(RunConfig(base=str(tmp_path / "base"), target=str(folder)), tmp_path)
    assert [str(f) for f in findings if f.level == "error"] == []
    model = PairedModel.from_pretrained(tmp_path / "base", folder, tokenizer=chosen).model  # a pad token is no error
    assert model.tokenizer is not None


def write_tokenizer_config(folder: Path, **changes: str | None) -> None:
    path = folder / "tokenizer_config.json"
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def test_traces_of_another_tokenizer_are_refused_when_training_begins_and_later(tmp_path: Path) -> None:
    models = [random_model(seed, torch.float32, num_hidden_layers=2) for seed in (1, 2)]
    pair = PairedModel.from_pretrained(*models)
    with pytest.raises(DataError, match=r"token id 61.* 0 to 60\."):
        train(
            pair,
            [Trace((5, 6, 61), 1)],
            stages=("end_to_end",),
            steps=1,
            n_features=4,
            folder=tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()
    later = [Trace((5, 6, 7), 1)] * 3 + [Trace((5, 6, 99), 1)]
    with pytest.raises(DataError, match="Document 3 holds the token id 99"):
        train(pair, later, stages=("end_to_end",), steps=8, n_features=4, tokens_per_batch=3, progress=False)


def test_a_tokenizer_that_was_changed_in_memory_is_refused(tmp_path: Path) -> None:
    base, target = write_pair(tmp_path, "Qwen3")
    model = PairedModel.from_pretrained(base, target).model

    class Lowering(PreTrainedTokenizerFast):
        def __call__(self, text, *args, **options):  # type: ignore[no-untyped-def]
            return super().__call__(text.lower() if isinstance(text, str) else text, *args, **options)

    own = Lowering(tokenizer_object=raw(target), eos_token="<|im_end|>")
    own.add_tokens([AddedToken("<more>")])
    with pytest.raises(TokenizerError):
        give_tokenizer(model, own)
