"""A model class for EleutherAI's lm-evaluation-harness (the extra ``lm-eval``), so that its tasks run on every route.

    from lm_eval import simple_evaluate
    from tl_adapters.evaluation.lm_eval_harness import HarnessModel

    with pair.routed("replacement") as model:
        print(simple_evaluate(model=HarnessModel(model), tasks=["arc_easy"])["results"])

The model runs with the route and hooks that it has during the evaluation, so interventions are entered around it. This
module translates the harness's requests; `likelihoods` and `completions` compute the results.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tl_adapters.data.chat_format import ChatFormat
from tl_adapters.errors import UserError
from tl_adapters.generation.completions import Completion, complete
from tl_adapters.generation.likelihoods import log_likelihoods, longest_text

log = logging.getLogger(__name__)


class HarnessMissingError(UserError, ImportError):
    """The harness is not installed."""


try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise HarnessMissingError(
        f'lm-evaluation-harness cannot be loaded ({error}). Run: pip install "tl-adapters[lm-eval]"'
    ) from error

MAX_GEN_TOKS = 256
"""Limit of a completion where a task names none, as in the harness's own models."""


class HarnessError(UserError, ValueError):
    """A request that this model cannot fulfill as given."""


class HarnessModel(TemplateLM):
    """A HookedTransformer, TransformerBridge or `vllm_engine.VllmModel` behind the model interface of the harness."""

    def __init__(
        self,
        model: Any,
        *,
        tokens_per_batch: int = 2048,
        batch_size: int = 16,
        seed: int = 0,
        think_end: str | None = None,
        think_start: str = ChatFormat.think_start,
    ) -> None:
        """Wrap a model, without changing it.

        Args:
            model: a HookedTransformer or TransformerBridge with its tokenizer; a pair's ``model`` on any route; or a
                condition of vLLM (`vllm_run.ServedRun.model_of`).
            tokens_per_batch: tokens scored in a forward pass, padding included.
            batch_size: completions generated at a time.
            seed: of the random numbers, where a task samples.
            think_end: the tag that ends the thinking. With it, the task gets only the text after the thinking, and an
                empty text where the thinking never ends; None keeps all of the text.
            think_start: the tag that opens the thinking.
        """
        super().__init__()
        self.model, self.tokenizer = model, model.tokenizer
        self.tokens_per_batch, self.batch_size = tokens_per_batch, batch_size
        self.seed, self.think_end, self.think_start = seed, think_end, think_start

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token. Raises HarnessError where the model has no tokenizer."""
        return self._tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The context of a text that has none: the tokenizer's first token, else its end token.

        Raises HarnessError where the model has no tokenizer.
        """
        first = self._tokenizer.bos_token_id
        return self.eot_token_id if first is None else first

    @property
    def max_length(self) -> int:
        """Tokens that the model reads at most."""
        return longest_text(self.model) - 1

    @property
    def max_gen_toks(self) -> int:
        """Limit of a completion where a task names none."""
        return MAX_GEN_TOKS

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for the harness's cache of requests. Raises HarnessError where there is none."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    @property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise HarnessError("The model has no tokenizer to encode a task with; give it the target's tokenizer.")
        return self.tokenizer

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text. The first token is not added to a text that begins with it, as rendered chats do.

        Raises HarnessError where the model has no tokenizer.
        """
        if add_special_tokens is None:
            first = self._tokenizer.bos_token
            add_special_tokens = not (first and string.startswith(first))
        return self._tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns of a chat, rendered with the target's chat template. Raises HarnessError where there is none."""
        return self._tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    # -- requests -------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        texts = []
        for _, context, continuation in requests:
            if len(continuation) > self.max_length:
                raise HarnessError(
                    f"A continuation has {len(continuation)} tokens, and the model's context only {self.max_length}."
                )
            texts.append((context[-(self.max_length + 1 - len(continuation)) :], continuation))
        likelihoods: dict[int, tuple[float, bool]] = {}
        scored = log_likelihoods(self.model, texts, self.tokens_per_batch)
        for number, one in tqdm(scored, total=len(texts), disable=disable_tqdm, desc="scoring"):
            likelihoods[number] = (one.log_probability, one.greedy)
            request = requests[number][0]
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, likelihoods[number])
        return [likelihoods[number] for number in range(len(texts))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts; each token is predicted once, with as much context as fits.

        Raises HarnessError where the model has no tokenizer.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text, add_special_tokens=False)
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for owner, (value, _) in zip(owners, scores, strict=True):
            sums[owner] += value
        for request, value in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Completions up to a stop string, an end token or a limit.

        Raises HarnessError for generation options that are not supported, completions that leave no room for a prompt,
        and a model without a tokenizer; and GenerationError for options out of range.
        """
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts: dict[int, str] = {}
        keys = self._keys(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="generating") as bar:
            for numbers in groups.values():
                options = _options(requests[numbers[0]].args[1])
                prompts = {number: self._prompt(requests[number].args[0], options) for number in numbers}
                numbers.sort(key=lambda number: len(prompts[number]))
                for start in range(0, len(numbers), self.batch_size):
                    batch = numbers[start : start + self.batch_size]
                    generated = self._generate([prompts[n] for n in batch], options, [keys[n] for n in batch])
                    for number, text in zip(batch, generated, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                    bar.update(len(batch))
        return [texts[number] for number in range(len(requests))]

    def _prompt(self, text: str, options: Mapping[str, Any]) -> list[int]:
        """Token ids of a prompt; only the last ones where it is too long for a completion to fit behind it."""
        n_prompt = self.max_length - options["max_gen_toks"]
        if n_prompt < 1:
            raise HarnessError(
                f"Completions of {options['max_gen_toks']} tokens leave no room for a prompt in a context of "
                f"{self.max_length}; set max_gen_toks lower."
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-n_prompt:]

    def _keys(self, requests: Sequence[Any]) -> list[object]:
        """What the random numbers of each request follow from: its text, and how many earlier requests repeat it."""
        seen: Counter[str] = Counter()
        keys: list[object] = []
        for request in requests:
            text = request.args[0]
            keys.append((self.seed, text, seen[text]))
            seen[text] += 1
        return keys

    def _generate(self, prompts: Sequence[list[int]], options: Mapping[str, Any], keys: Sequence[object]) -> list[str]:
        completions = complete(
            self.model,
            prompts,
            max_new_tokens=options["max_gen_toks"],
            batch_size=self.batch_size,
            temperature=options["temperature"],
            top_p=options.get("top_p", 1.0),
            top_k=0,
            keys=keys,
        )
        return [self._visible_text(completion, options["until"]) for completion in completions]

    def _visible_text(self, completion: Completion, until: Sequence[str]) -> str:
        """The text that the task gets: without the thinking, and up to a stop string."""
        text = completion.text
        if self.think_end and self._tokenizer.decode(completion.prompt).rstrip().endswith(self.think_start):
            text = self.think_start + text  # the prompt has opened the thinking
        return self._cut(text, until)

    def _cut(self, text: str, until: Sequence[str]) -> str:
        """A text without its thinking, up to a stop string; empty where the thinking is opened and never ended."""
        if self.think_end:
            after = text.rpartition(self.think_end)[2]
            if self.think_start in after:
                log.warning("The thinking of a completion never ends (it may be cut at the limit); its text is empty.")
                return ""
            text = after.lstrip()
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text


_SUPPORTED_OPTIONS = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """A request's options, with the harness's defaults. Raises HarnessError for an option that is not supported."""
    options = dict(normalize_gen_kwargs(dict(given), MAX_GEN_TOKS))
    options.setdefault("temperature", 1.0 if options.get("do_sample") else 0.0)
    if unsupported := sorted(set(options) - set(_SUPPORTED_OPTIONS)):
        raise HarnessError(
            f"The generation option {unsupported[0]} is not supported; supported are {', '.join(_SUPPORTED_OPTIONS)}."
        )
    return options
