"""The recipe that trains the model organism from scratch, on a CPU: ``python -m tl_adapters.organism.recipe OUT``.

1. a byte-level BPE tokenizer with single digits and a chat template, as a hub model has them;
2. a small Qwen2 *base*, trained on direct answers, textbook steps, marked homework and a few forced thoughts, then
   on the homework of careless pupils, until it can tell a wrong step from a right one;
3. the *target*: the base fine-tuned, briefly and gently, on reasoning traces.

``--seed 1 --kind differences`` trains a second pair, on which nothing was tuned. ``--null`` trains a *null pair* from
an existing pair: the same base, and as target that base fine-tuned for as many steps on thinking without hesitation.

All random numbers come from generators seeded by the recipe; the same recipe on the same machine with the same number
of threads gives the same weights (tests/organism/test_organism.py).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
from tokenizers import AddedToken, pre_tokenizers
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from tl_adapters.errors import UserError
from tl_adapters.organism import PAIR, traces
from tl_adapters.organism.problem_set import KINDS, Kind, Problem, stream_problems
from tl_adapters.organism.traces import Document
from tl_adapters.utils.files import copy_file, new_folder, require_absent, write_text, writing
from tl_adapters.utils.reading import UnreadableFileError, as_dataclass, read_json_object, shown
from tl_adapters.utils.strict_json import dumps

log = logging.getLogger(__name__)

Writer = Callable[[Problem, random.Random], Document]
_HASHED_DOCUMENTS = 200  # of each writer; some 500 steps, so that what happens once in a hundred is among them


class NoRecipeError(UserError):
    """A folder without a recipe.json of this recipe."""


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights of a pair, except the text that traces.py and problem_set.py generate."""

    seed: int = 0
    """Seeds weights, documents and batches."""
    kind: Kind = "sums"
    """The kind of problems in all documents."""
    d_model: int = 128
    """Width of the residual stream."""
    d_mlp: int = 320
    """Neurons per MLP."""
    n_layers: int = 5
    """Layers."""
    n_heads: int = 4
    """Attention heads, of d_model / n_heads each."""
    n_key_value_heads: int = 2
    """Key/value heads (grouped-query attention)."""
    n_ctx: int = 256
    """Longest text, in tokens."""
    batch_size: int = 32
    """Documents per step."""
    base_steps: int = 7000
    """Training steps of the base, from random weights."""
    base_lr: float = 2e-3
    """Peak learning rate of the base."""
    base_mix: dict[str, float] = field(
        default_factory=lambda: {"direct": 0.15, "textbook": 0.25, "homework": 0.45, "forced": 0.15}
    )
    """Shares of the base's documents by kind."""
    marking_steps: int = 3000
    """Further steps of the base, on the homework of careless pupils: telling right from wrong comes last."""
    marking_lr: float = 1e-3
    """Peak learning rate of these steps."""
    marking_mix: dict[str, float] = field(
        default_factory=lambda: {"marking": 0.6, "homework": 0.1, "direct": 0.1, "textbook": 0.1, "forced": 0.1}
    )
    """Shares of the documents of these steps."""
    target_steps: int = 1200
    """Fine-tuning steps from the base to the target: few, so that the difference stays small."""
    target_lr: float = 3e-4
    """Peak learning rate of the target."""
    target_mix: dict[str, float] = field(default_factory=lambda: {"reasoning": 1.0})
    """Shares of the target's documents by kind."""

    @property
    def hash(self) -> str:
        """Hash of every field and of the text: a sample of documents by each writer in any of the mixes.

        It covers the text instead of the code that writes it: a module may change as long as its documents do not.
        """
        rng = random.Random(self.seed)
        train = stream_problems("train", rng, kind=self.kind)
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())
        for name in sorted({*self.base_mix, *self.marking_mix, *self.target_mix}):
            for _ in range(_HASHED_DOCUMENTS):
                document = writer(name)(next(train), rng)
                digest.update(json.dumps([name, document.prompt, document.completion]).encode())
        return digest.hexdigest()[:16]

    @classmethod
    def of(cls, pair: Path) -> Recipe:
        """The recipe of a pair, from its folder. Raises NoRecipeError if there is no complete recipe.json."""
        path = pair / "recipe.json"
        try:
            record = read_json_object(path)
            of_recipe = {one.name: record[one.name] for one in fields(cls) if one.name in record}
            if absent := [one.name for one in fields(cls) if one.name not in record]:
                raise UnreadableFileError(f"The key {absent[0]} is missing in {path}.")
            recipe = as_dataclass(cls, of_recipe, str(path))
            recipe._require_possible()
        except UnreadableFileError as error:
            raise NoRecipeError(f"{pair} is no pair of this recipe: {error}") from error
        return recipe

    def _require_possible(self) -> None:
        """Raises UnreadableFileError for counts, rates and mixes that no pair can be trained with."""
        for name in ("d_model", "d_mlp", "n_layers", "n_heads", "n_key_value_heads", "n_ctx", "batch_size"):
            if not 1 <= getattr(self, name) < 2**31:
                raise UnreadableFileError(f"{name} is {shown(getattr(self, name))}; allowed is a whole number >= 1.")
        if self.d_model % self.n_heads or self.n_heads % self.n_key_value_heads:
            raise UnreadableFileError(
                f"n_heads is {self.n_heads}; allowed is a divisor of d_model ({self.d_model}) and a multiple of "
                f"n_key_value_heads ({self.n_key_value_heads})."
            )
        for phase in ("base", "marking", "target"):
            steps, rate, mix = (getattr(self, f"{phase}_{what}") for what in ("steps", "lr", "mix"))
            writers = {name.removesuffix("_document") for name in vars(traces) if name.endswith("_document")}
            if not 0 <= steps < 2**31 or not rate > 0:
                raise UnreadableFileError(f"{phase}_steps is {shown(steps)} and {phase}_lr {rate}; both are positive.")
            if not mix.keys() <= writers or min(mix.values(), default=0) < 0 or not 0 < sum(mix.values()) < 1e9:
                raise UnreadableFileError(
                    f"{phase}_mix is {shown(mix)}; allowed are shares above 0 of {', '.join(sorted(writers))}."
                )


def writer(name: str) -> Writer:
    """The function of traces.py that writes a kind of document, by its name in a mix."""
    write: Writer = getattr(traces, f"{name}_document")
    return write


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}"
    "{% else %}{{ '<|assistant|>' + m['content'] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


CONTROL = (traces.PAD, traces.BOS, traces.END, traces.USER, traces.ASSISTANT)
MERGES = (
    ", Ġ", ". Ċ", ": Ġ", "a i", "m m", "ai t", "= ?", "H mm", "W ait", "N o", "h mm", "w ait",
    "Ġ Hmm", "Ġ Wait", "Ġ hmm", "=? Ċ",
)  # fmt: skip


def build_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE over our own words: any text can be encoded; digits stand alone, words are one token.

    transformers reads the tokenizer of every Qwen2 folder as a Qwen2Tokenizer, with Qwen2's own pre-tokenizer, so it
    is built as one.
    """
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
    vocab = {token: index for index, token in enumerate(tokens)}
    for mark in (",", ":"):
        # The pair's weights were made when these marks were one token with the space after them, which Qwen2's
        # pre-tokenizer never joins. Exchanged, the mark alone has the id that the weights know.
        vocab[mark], vocab[mark + "Ġ"] = vocab[mark + "Ġ"], vocab[mark]
    for token in (*CONTROL, traces.THINK, traces.THINK_END):
        vocab[token] = len(vocab)
    tokenizer = Qwen2Tokenizer(
        vocab=vocab,
        merges=[tuple(merge.split(" ")) for merge in MERGES],
        unk_token=None,
        bos_token=traces.BOS,
        eos_token=traces.END,
        pad_token=traces.PAD,
        additional_special_tokens=[traces.USER, traces.ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    # As in Qwen and R1 tokenizers the think tags are not special: they survive skip_special_tokens.
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in (traces.THINK, traces.THINK_END)])
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Qwen2ForCausalLM:
    """A Qwen2 with random weights, drawn from the recipe's seed; torch's own generator is left as it was."""
    config = Qwen2Config(
        hidden_size=recipe.d_model,
        intermediate_size=recipe.d_mlp,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=recipe.n_heads,
        num_key_value_heads=recipe.n_key_value_heads,
        vocab_size=len(tokenizer),
        max_position_embeddings=recipe.n_ctx,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
        architectures=[Qwen2ForCausalLM.__name__],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return Qwen2ForCausalLM(config)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def collate(pairs: Sequence[tuple[list[int], list[int]]], pad_id: int) -> Batch:
    """(prompt, completion) ids to right-padded input_ids, attention_mask and labels (-100 = no loss)."""
    width = max(len(p) + len(c) for p, c in pairs)
    ids = torch.full((len(pairs), width), pad_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, -100)
    for row, (p, c) in enumerate(pairs):
        ids[row, : len(p) + len(c)] = torch.tensor(p + c)
        mask[row, : len(p) + len(c)] = 1
        labels[row, len(p) : len(p) + len(c)] = torch.tensor(c)
    return ids, mask, labels


def stream_batches(
    recipe: Recipe, mix: dict[str, float], tokenizer: PreTrainedTokenizerBase, seed: int, pool: int = 16
) -> Iterator[Batch]:
    """Endless batches of one phase's documents; ``pool`` batches are drawn at a time and sorted by length."""
    rng = random.Random(seed)
    train = stream_problems("train", rng, kind=recipe.kind)
    writers, weights = [writer(name) for name in mix], list(mix.values())
    size = recipe.batch_size
    while True:
        documents = [rng.choices(writers, weights)[0](next(train), rng) for _ in range(pool * size)]
        encode = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]  # noqa: E731
        pairs = list(zip(encode([d.prompt for d in documents]), encode([d.completion for d in documents]), strict=True))
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        starts = list(range(0, len(pairs), size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(pairs[start : start + size], tokenizer.pad_token_id)


def fit(model: Qwen2ForCausalLM, batches: Iterator[Batch], steps: int, lr: float, name: str) -> float:
    """AdamW with warm-up and cosine; returns the loss of the last 50 steps, in nats per token."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
    model.train()
    recent: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        ids, mask, labels = next(batches)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 250 == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            log.info("%s: step %d of %d, loss %.4f, %.0f s", name, step + 1, steps, mean, time.perf_counter() - began)
    model.eval()
    return sum(recent) / len(recent)


def _train_phase(model: Qwen2ForCausalLM, recipe: Recipe, phase: str, folder: Path) -> dict[str, float]:
    """Train ``model`` through one phase and write it, as base or as target, into the pair's folder; phase -> loss."""
    number, name, mix, steps, lr = {
        "base": (0, "base", recipe.base_mix, recipe.base_steps, recipe.base_lr),
        "marking": (1, "base", recipe.marking_mix, recipe.marking_steps, recipe.marking_lr),
        "target": (2, "target", recipe.target_mix, recipe.target_steps, recipe.target_lr),
    }[phase]
    tokenizer = build_tokenizer()
    batches = stream_batches(recipe, mix, tokenizer, recipe.seed + 100 * number + 1)
    loss = fit(model, batches, steps, lr, phase)
    with writing(folder / name):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {phase: round(loss, 4)}


def _write_record(recipe: Recipe, losses: dict[str, float], folder: Path) -> None:
    """Write recipe.json: what decided the weights, and the loss at the end of each phase."""
    record = {**asdict(recipe), "hash": recipe.hash, "loss": losses, "threads": torch.get_num_threads()}
    write_text(folder / "recipe.json", dumps(record, indent=1) + "\n")


def make_pair(recipe: Recipe, out: Path) -> None:
    """Train base and target and write them as two folders under ``out``, with recipe.json beside them.

    Raises FolderExistsError where ``out`` exists: a pair is never overwritten.
    """
    model = build_model(recipe, build_tokenizer())
    losses: dict[str, float] = {}
    with new_folder(out) as folder:
        for phase in ("base", "marking", "target"):
            losses |= _train_phase(model, recipe, phase, folder)
        _write_record(recipe, losses, folder)


def make_null_pair(of: Path, out: Path) -> None:
    """Write the null pair of a pair's folder: its base, fine-tuned as long on thinking that never hesitates.

    The result equals that of ``make_pair`` for the same recipe with calm documents for the target, without training the
    base again. Raises NoRecipeError if ``of`` is not a pair, and FolderExistsError if ``out`` exists.
    """
    recipe = replace(Recipe.of(of), target_mix={"calm": 1.0})
    require_absent(out)
    model = Qwen2ForCausalLM.from_pretrained(of / "base")
    with new_folder(out) as folder:
        for file in sorted((of / "base").iterdir()):
            copy_file(file, folder / "base" / file.name)
        _write_record(recipe, _train_phase(model, recipe, "target", folder), folder)


def main() -> None:
    """Command line of the recipe."""
    parser = argparse.ArgumentParser(description="Train the model organism, or another pair like it, from scratch.")
    parser.add_argument("out", type=Path, help="folder to make; must not exist")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--kind", choices=KINDS, default=Recipe.kind, help="kind of problems")
    parser.add_argument(
        "--null", type=Path, nargs="?", const=PAIR, metavar="PAIR",
        help="make the null pair of a pair's folder (default: the model organism), with its seed and kind",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; the exact weights depend on them")
    args = parser.parse_args()
    recipe = Recipe(seed=args.seed, kind=args.kind)
    if args.null is not None and recipe != Recipe():
        parser.error("--null takes seed and kind from its pair; leave --seed and --kind out")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    torch.use_deterministic_algorithms(True)
    if args.null is not None:
        make_null_pair(args.null, args.out)
    else:
        make_pair(recipe, args.out)


if __name__ == "__main__":
    main()
