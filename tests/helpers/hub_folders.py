# ruff: noqa: RUF001  # the tokens of DeepSeek are spelled with full-width bars
"""Tiny folders that look as models of the hub do: tokenizer, template, two end tokens, and small random weights.

Each `Kind` stands for a family whose tokenizer or template has once been read wrongly. The files are written by hand,
key by key as the hub has them, since what transformers would write itself hides what it would misread.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.random_models import random_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["Wait, 47+85=132. How are you doing?\n\nHmm, no: the answer is 132, say I. <Qq> [A] Today we add."]
"""What the vocabularies are learned from; they also hold every byte."""
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""What byte-level vocabularies are split by; digits in threes (Llama 3) or one by one (Qwen)."""

R1_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{% set content = message['content'] %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)
"""Opens the thinking in the prompt and strips it from finished turns."""
QWEN3_TEMPLATE = (
    "{% for message in messages %}{% set content = message.content %}"
    "{% if message.role == 'assistant' %}{% set thought = '' %}"
    "{% if message.reasoning_content is string %}{% set thought = message.reasoning_content %}"
    "{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}"
    "{% else %}{{ content }}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{% endif %}"
)
"""Keeps the thinking of the last turn (a field of its own included), strips earlier ones; `enable_thinking`."""
CLOSING_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}{% endif %}"
)
"""The prompt closes the thinking: the template of a model that is not to think."""
LLAMA2_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}"
    "{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Writes a space before a response that a prompt does not write, and BOS before every question."""
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Refuses system turns."""
DATED_TEMPLATE = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] | trim }}{% set messages = messages[1:] %}"
    "{% endif %}{{ '<|eot_id|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
"""Llama 3.2's: it writes the date of the day."""


@dataclass(frozen=True)
class Kind:
    """One family of models, as its folders look."""

    architecture: str
    """As config.json names it."""
    tokenizer_class: str
    """As tokenizer_config.json names it."""
    template: str
    """The chat template, in tokenizer_config.json."""
    special: Sequence[str]
    """Tokens of the special kind, in the order of their ids; BOS first where there is one."""
    eos: str
    """The token that ends a response."""
    ends: Sequence[str]
    """The end tokens of generation_config.json."""
    bos: str | None = None
    """The beginning of a sequence."""
    pad: str | None = None
    """What pads, where the folder names a token."""
    writes_bos: bool = False
    """The tokenizer writes BOS itself."""
    digits: str = "{1,3}"
    """Of a byte-level one: how many digits may be one token; "" as Qwen has it, one, and its normalizer too."""
    sentencepiece: bool = False
    """Spaces are ▁ and what is unknown is bytes; else byte-level BPE."""
    prefix_space: bool = False
    """Of a SentencePiece-like one: a space is put before the text."""
    plain_tokens: Sequence[str] = ()
    """Added tokens that are not special."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further entries of tokenizer_config.json."""


_THINK = ("<think>", "</think>")
_CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KINDS: dict[str, Kind] = {
    "R1-Distill-Llama": Kind(
        "LlamaForCausalLM", "LlamaTokenizerFast", R1_TEMPLATE,
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"), "<｜end▁of▁sentence｜>",
        ("<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"), bos="<｜begin▁of▁sentence｜>", pad="<｜end▁of▁sentence｜>",
        writes_bos=True, plain_tokens=("<｜User｜>", "<｜Assistant｜>", *_THINK),
        options={"add_bos_token": True, "add_eos_token": False, "legacy": True},
    ),
    "Qwen3": Kind(
        "Qwen3ForCausalLM", "Qwen2Tokenizer", QWEN3_TEMPLATE, _CHATML, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>", digits="", plain_tokens=_THINK,
        options={"add_bos_token": False, "add_prefix_space": False},
    ),
    "Llama 2": Kind(
        "LlamaForCausalLM", "LlamaTokenizer", LLAMA2_TEMPLATE, ("<unk>", "<s>", "</s>"), "</s>", ("</s>", "<unk>"),
        bos="<s>", writes_bos=True, sentencepiece=True, prefix_space=True,
        options={"add_bos_token": True, "add_eos_token": False, "legacy": False, "unk_token": "<unk>"},
    ),
    "Gemma": Kind(
        "Gemma2ForCausalLM", "GemmaTokenizer", GEMMA_TEMPLATE,
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"), "<eos>",
        ("<eos>", "<end_of_turn>"),
        bos="<bos>", pad="<pad>", writes_bos=True, sentencepiece=True, plain_tokens=("\n", "\n\n", "  "),
        options={"add_bos_token": True, "add_eos_token": False, "unk_token": "<unk>"},
    ),
    "Llama 3.2": Kind(
        "LlamaForCausalLM", "PreTrainedTokenizerFast", DATED_TEMPLATE,
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|eot_id|>", ("<|end_of_text|>", "<|eot_id|>"), bos="<|begin_of_text|>", writes_bos=True,
    ),
    "Qwen2 that closes": Kind(
        "Qwen2ForCausalLM", "Qwen2Tokenizer", CLOSING_TEMPLATE, _CHATML, "<|im_end|>", ("<|im_end|>", "<|endoftext|>"),
        pad="<|endoftext|>", digits="", plain_tokens=_THINK,
    ),
    "Qwen2 with its own": Kind(
        "Qwen2ForCausalLM", "PreTrainedTokenizerFast", CLOSING_TEMPLATE.replace("<think>\\n\\n</think>\\n\\n", ""),
        ("<unk>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", ("<|im_end|>", "<unk>"), sentencepiece=True,
        plain_tokens=_THINK, options={"unk_token": "<unk>"},
    ),
}  # fmt: skip
"""Kinds by name. The last has a tokenizer of another kind than its model type's class."""
WRITES_BOS = tuple(name for name, kind in KINDS.items() if kind.writes_bos)
"""Kinds whose tokenizers write BOS themselves."""


def backend_tokenizer(kind: Kind) -> Tokenizer:
    """What tokenizer.json holds."""
    if kind.sentencepiece:
        tokenizer = _sentencepiece(kind)
    else:
        tokenizer = Tokenizer(models.BPE())
        if not kind.digits:  # Qwen's
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT % kind.digits), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in kind.special])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in kind.plain_tokens])
    if kind.writes_bos and kind.bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{kind.bos} $A", pair=f"{kind.bos} $A {kind.bos} $B:1",
            special_tokens=[(kind.bos, tokenizer.token_to_id(kind.bos))],
        )  # fmt: skip
    return tokenizer


def _sentencepiece(kind: Kind) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    prepend = [normalizers.Prepend("▁"), spaces]
    tokenizer.normalizer = normalizers.Sequence(prepend) if kind.prefix_space else spaces
    strip = [decoders.Strip(" ", 1, 0)] if kind.prefix_space else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=[*kind.special, *bytes_], show_progress=False)
    words = [word for text in TEXTS for word in text.replace(" ", " \0").split("\0")]  # merges stay within words
    tokenizer.train_from_iterator(words, trainer)
    raw = json.loads(tokenizer.to_str())  # the bytes are ordinary tokens of the vocabulary, as in SentencePiece
    raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in kind.special]
    return Tokenizer.from_str(json.dumps(raw))


def write_tokenizer(folder: Path, name: str, **changes: Any) -> Tokenizer:
    """tokenizer.json, tokenizer_config.json and generation_config.json of a kind; returns what tokenizer.json holds.

    ``changes`` replaces entries of tokenizer_config.json; None drops one.
    """
    kind = KINDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = backend_tokenizer(kind)
    tokenizer.save(str(folder / "tokenizer.json"))
    entries = {
        "tokenizer_class": kind.tokenizer_class,
        "bos_token": kind.bos,
        "eos_token": kind.eos,
        "pad_token": kind.pad,
        "chat_template": kind.template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        **kind.options,
        **changes,
    }
    kept = {key: value for key, value in entries.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(kept, indent=1, ensure_ascii=False))
    ends = {
        "eos_token_id": [tokenizer.token_to_id(token) for token in kind.ends],
        "bos_token_id": tokenizer.token_to_id(kind.bos) if kind.bos else None,
        "pad_token_id": tokenizer.token_to_id(kind.pad) if kind.pad else None,
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
    }
    (folder / "generation_config.json").write_text(json.dumps({k: v for k, v in ends.items() if v is not None}))
    return tokenizer


def write_model(folder: Path, name: str, seed: int = 1, dtype: torch.dtype = torch.float64, **overrides: Any) -> Path:
    """A whole folder: tokenizer and weights. ``overrides`` are of the model's configuration; returns the folder."""
    tokenizer = write_tokenizer(folder, name)
    options: dict[str, Any] = {
        "vocab_size": tokenizer.get_vocab_size(), "max_position_embeddings": 128, "num_hidden_layers": 2, **overrides,
    }  # fmt: skip
    model = random_model(seed, dtype, KINDS[name].architecture, **options)
    written = (folder / "generation_config.json").read_text()
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(written)
    return folder


def write_pair(folder: Path, name: str, **options: Any) -> tuple[Path, Path]:
    """(base, target): two folders of one kind with other weights. ``options`` as `write_model`."""
    base, target = (write_model(folder / role, name, seed, **options) for seed, role in ((1, "base"), (2, "target")))
    return base, target
