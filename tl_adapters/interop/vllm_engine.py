"""Completions by vLLM in place of our own engine: in this process, or at the address of a `vllm serve`.

Prompts go in as token ids and completions come out as token ids, so both engines read and write the same tokens. Greedy
completions are the same, except where two tokens are as likely as rounding allows, which vLLM does not report
(`Completion.near_ties` is 0). Sampled ones are drawn from vLLM's own random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from tl_adapters.checkpoints.model_files import locate, read_config
from tl_adapters.checkpoints.tokenizers import load_tokenizer
from tl_adapters.errors import UserError, first_line
from tl_adapters.generation.decoding import DecodedRow
from tl_adapters.generation.likelihoods import Likelihood
from tl_adapters.generation.sampling import SamplingParameters, seed_of
from tl_adapters.interop.vllm_checkpoint import read_served_folder
from tl_adapters.utils.devices import free_memory, total_memory
from tl_adapters.utils.reading import UnreadableFileError, as_record, parse_json
from tl_adapters.vllm_plugin.served_conditions import CONDITIONS_FOLDER, WORKER_EXTENSION, Condition, lora_options

_SCORING = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
"""Parameters with which vLLM tells the log-probability and rank of every token of a prompt."""
CONNECT_TIMEOUT_SECONDS = 30.0
"""Seconds in which a connection must stand; a completion may take any time."""
_LARGEST_SEED = 2**31 - 1
_SHARE_OF_FREE_MEMORY = {"cuda": 0.8, "cpu": 0.5}
"""What an engine in this process takes of the memory that is free when it starts; the rest is for the pair."""


class VllmError(UserError, RuntimeError):
    """vLLM is not installed, does not start, does not answer, or serves other adapters or conditions."""


class CompletionRequest(NamedTuple):
    """One prompt and how it is completed."""

    prompt: list[int]
    """Token ids."""
    max_new_tokens: int
    """Limit of the completion."""
    temperature: float
    """0 is greedy."""
    top_p: float
    """Nucleus; 1 is all tokens."""
    top_k: int
    """Number of likeliest tokens; 0 is all tokens."""
    seed: int
    """Seed of the draws."""
    stop_at: list[int]
    """Ids of the tokens that end the completion."""

    @property
    def parameters(self) -> dict[str, Any]:
        """vLLM's own parameters; those that a generation_config.json may set are set to have no effect."""
        return {
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": self.seed,
            "stop_token_ids": self.stop_at,
            "ignore_eos": True,  # the end tokens are among those to stop at, and only these end a completion
        }


class ScoredToken(NamedTuple):
    """How likely a token of a text is."""

    log_probability: float
    """In nats."""
    likeliest: bool
    """Whether no other token is as likely."""


@runtime_checkable
class VllmEngine(Protocol):
    """One engine with several conditions."""

    dtype: str
    """Dtype of the models; "unknown" where the engine does not tell."""
    max_model_len: int
    """Longest prompt and completion together, in tokens."""
    spare: Sequence[str]
    """Names of the conditions that `define` defines; a server has none."""

    def serves(self, condition: str) -> bool:
        """Whether the engine serves a condition of this name."""
        ...

    def require(self, condition: str) -> None:
        """Raises VllmError where the engine does not serve a condition of this name."""
        ...

    def define(self, condition: Condition, factors: Sequence[Float[Tensor, "n_features"]]) -> None:
        """Define a spare condition by what it computes and the factors of all features, by layer."""
        ...

    def generate(self, condition: str, requests: Sequence[CompletionRequest]) -> list[list[int]]:
        """Token ids of every completion, with the token that ended it."""
        ...

    def score(self, condition: str, texts: Sequence[list[int]]) -> list[list[ScoredToken]]:
        """How likely every token of a text is after those before it; the first token is left out."""
        ...

    def close(self) -> None:
        """Free what the engine holds."""
        ...


def require_vllm() -> None:
    """Raises VllmError where vLLM cannot be loaded into this process."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise VllmError(
            f"vLLM cannot be loaded ({first_line(error)}). Install it beside tl_adapters (docs/vllm.md), or give the "
            "address of a server with --engine http://127.0.0.1:8000."
        ) from error


def memory_options(device_type: str) -> dict[str, float]:
    """The options of `vllm.LLM` for an engine beside a pair that is in memory already.

    vLLM asks for nine tenths of all memory, on the CPU as well, and does not start where less than that is free.

    Args:
        device_type: of the device that vLLM takes; for one that tl_adapters does not run on, vLLM decides.
    """
    if device_type not in _SHARE_OF_FREE_MEMORY:
        return {}
    device = torch.device(device_type)
    return {
        "gpu_memory_utilization": _SHARE_OF_FREE_MEMORY[device_type] * free_memory(device) / total_memory(device),
    }


class LocalVllm:
    """vLLM in this process, with an exported folder.

    It takes half of the memory that is free on the CPU, or eight tenths of a GPU's; ``gpu_memory_utilization`` in the
    options, or vLLM's own variable ``VLLM_CPU_KVCACHE_SPACE`` (in GiB), decides otherwise.

    Args:
        folder: what `vllm_checkpoint.to_vllm` wrote.
        dtype: of the models; None is the target's own.
        options: further options of `vllm.LLM`.

    Raises:
        VllmError: vLLM is not installed or does not start.
    """

    def __init__(self, folder: str | Path, dtype: str | None = None, **options: Any) -> None:
        require_vllm()
        from vllm import LLM
        from vllm.platforms import current_platform

        self.folder = Path(folder)
        served = read_served_folder(self.folder)
        self._conditions = {condition.name: condition for condition in served.conditions}
        names = list(self._conditions)
        self.spare: Sequence[str] = names[len(names) - served.spare :]
        """Names of the conditions that `define` defines."""
        self._numbers = {name: number for number, name in enumerate(names, start=1)}
        chosen: dict[str, Any] = {
            "dtype": dtype or served.model_dtype,
            "max_model_len": -1,
            **memory_options(current_platform.device_type),
            **lora_options(len(names)),
            **options,
        }
        try:
            # The files are safetensors, and nothing else is read; captured passes would keep one condition.
            self._llm = LLM(
                model=str(folder),
                enforce_eager=True,
                load_format="safetensors",
                skip_tokenizer_init=True,
                trust_remote_code=False,
                worker_extension_cls=WORKER_EXTENSION,
                **chosen,
            )
        except Exception as error:  # vLLM raises whatever its parts raise
            raise VllmError(
                f"vLLM does not start ({type(error).__name__}: {first_line(error)}). Its own messages are above; what "
                "was tried is in docs/vllm.md."
            ) from error
        config = self._llm.llm_engine.model_config
        self.dtype, self.max_model_len = str(config.dtype).removeprefix("torch."), config.max_model_len

    def generate(self, condition: str, requests: Sequence[CompletionRequest]) -> list[list[int]]:
        """Token ids of every completion, with the token that ended it. Raises VllmError for an unknown condition."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=request.prompt) for request in requests],
            [SamplingParams(detokenize=False, **request.parameters) for request in requests],
            lora_request=self._lora(condition),
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]

    def score(self, condition: str, texts: Sequence[list[int]]) -> list[list[ScoredToken]]:
        """How likely every token of a text is after those before it. Raises VllmError for an unknown condition."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=text) for text in texts],
            SamplingParams(detokenize=False, **_SCORING),
            lora_request=self._lora(condition),
            use_tqdm=False,
        )
        return [
            [ScoredToken(at[token].logprob, at[token].rank == 1) for token, at in zip(text, found, strict=True) if at]
            for text, found in zip(texts, (output.prompt_logprobs for output in outputs), strict=True)
        ]

    def serves(self, condition: str) -> bool:
        """Whether the engine serves a condition of this name."""
        return condition in self._numbers

    def require(self, condition: str) -> None:
        """Raises VllmError where the engine does not serve a condition of this name."""
        _require_condition(condition, self._numbers, str(self.folder))

    def define(self, condition: Condition, factors: Sequence[Float[Tensor, "n_features"]]) -> None:
        """Define a spare condition, or define it anew.

        Args:
            condition: what it computes; its name is one of `spare`, and the row of its factors is the name's own.
            factors: of all features, by layer.
        """
        _require_condition(condition.name, self.spare, f"As a condition to be defined, {self.folder}")
        own = condition.model_copy(update={"factors": self._conditions[condition.name].factors})
        number = self._numbers[condition.name] - 1
        rows = [row.tolist() for row in factors]
        self._llm.collective_rpc("define_condition", args=(number, own.model_dump(), rows))
        self._llm.reset_prefix_cache()  # it holds what this name computed before

    def close(self) -> None:
        """Free the engine's memory; one process has one engine at a time."""
        self._llm.llm_engine.engine_core.shutdown()

    def _lora(self, condition: str) -> Any:
        from vllm.lora.request import LoRARequest

        self.require(condition)
        return LoRARequest(condition, self._numbers[condition], str(self.folder / CONDITIONS_FOLDER / condition))


class _FromServer(BaseModel):
    """Base of the parts of a server's answers that are read; others are left out."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class _ServedName(_FromServer):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _ServedNames(_FromServer):
    data: tuple[_ServedName, ...]


class _Choice(_FromServer):
    token_ids: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    finish_reason: Literal["stop", "length"]


class _Choices(_FromServer):
    choices: tuple[_Choice, ...] = Field(min_length=1, max_length=1)


class _ServedLogprob(_FromServer):
    logprob: float
    rank: int = Field(ge=1)


class _ScoredChoice(_FromServer):
    prompt_logprobs: tuple[dict[str, _ServedLogprob] | None, ...]


class _ScoredChoices(_FromServer):
    choices: tuple[_ScoredChoice, ...] = Field(min_length=1, max_length=1)


class VllmServer:
    """A `vllm serve` of an exported folder, by its address.

    Args:
        url: such as http://127.0.0.1:8000.
        served_name: `vllm_checkpoint.served_model_name` of the adapters that it has to serve.
        parallel: requests that are sent at a time.

    Raises:
        VllmError: an address that cannot be used, no answer, or other adapters.
    """

    dtype = "unknown"
    spare: Sequence[str] = ()

    def __init__(self, url: str, served_name: str, parallel: int = 64) -> None:
        import httpx  # not at the top: its import draws from the user's random numbers

        try:
            host = httpx.URL(url).host
        except httpx.InvalidURL:
            host = ""
        if not url.startswith(("http://", "https://")) or not host:
            raise VllmError(f"The engine is {url!r}; give vllm, or the address of a server: http://127.0.0.1:8000.")
        self.url, self.parallel = url.rstrip("/").removesuffix("/v1"), parallel
        self._client = httpx.Client(
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_SECONDS),
            trust_env=host not in ("127.0.0.1", "localhost", "::1"),  # a proxy cannot reach this machine's servers
            limits=httpx.Limits(max_connections=parallel),
        )
        names = self._exchange("GET", "/v1/models", None, _ServedNames).data
        own = next((name for name in names if name.id == served_name and name.parent is None), None)
        if own is None or own.max_model_len is None:
            raise VllmError(
                f"{self.url} serves {', '.join(name.id for name in names[:5])}, and these adapters are {served_name}: "
                "they or their models are others. Export this run (tl-adapters export --to vllm) and serve it with "
                "the command that the export prints."
            )
        self.max_model_len = own.max_model_len
        self.conditions = [name.id for name in names if name.parent == served_name]

    def generate(self, condition: str, requests: Sequence[CompletionRequest]) -> list[list[int]]:
        """Token ids of every completion, with the token that ended it. Raises VllmError."""
        self.require(condition)

        def completed(request: CompletionRequest) -> list[int]:
            body = {"model": condition, "prompt": request.prompt, "return_token_ids": True, **request.parameters}
            return list(self._exchange("POST", "/v1/completions", body, _Choices).choices[0].token_ids)

        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(completed, requests))

    def score(self, condition: str, texts: Sequence[list[int]]) -> list[list[ScoredToken]]:
        """How likely every token of a text is after those before it. Raises VllmError."""
        self.require(condition)

        def scored(text: list[int]) -> list[ScoredToken]:
            body = {"model": condition, "prompt": text, **_SCORING}
            found = self._exchange("POST", "/v1/completions", body, _ScoredChoices).choices[0].prompt_logprobs
            at_tokens = [at.get(str(token)) for token, at in zip(text, found, strict=False) if at]
            if len(at_tokens) != len(text) - 1 or None in at_tokens:
                raise VllmError(f"{self.url} does not say how likely every token of a text is; use vllm 0.32.")
            return [ScoredToken(at.logprob, at.rank == 1) for at in at_tokens if at]

        with ThreadPoolExecutor(self.parallel) as threads:
            return list(threads.map(scored, texts))

    def serves(self, condition: str) -> bool:
        """Whether the server serves a condition of this name."""
        return condition in self.conditions

    def require(self, condition: str) -> None:
        """Raises VllmError where the server does not serve a condition of this name."""
        _require_condition(condition, self.conditions, self.url)

    def define(self, condition: Condition, factors: Sequence[Float[Tensor, "n_features"]]) -> None:
        """Raises VllmError: a server's conditions are those of its export."""
        raise VllmError(f"The conditions of {self.url} were exported; export and serve {condition.name}.")

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _exchange(self, method: str, path: str, body: Any, record: Any) -> Any:
        """The answer to one request, as a record. Raises VllmError."""
        import httpx

        try:
            answer = self._client.request(method, self.url + path, json=body)
        except (httpx.HTTPError, OSError) as error:
            raise VllmError(
                f"{self.url} does not answer ({type(error).__name__}: {first_line(error)}). Start the server with the "
                "command that tl-adapters export --to vllm prints, or correct --engine."
            ) from error
        if answer.status_code != 200:
            raise VllmError(
                f"{self.url}{path} answered with status {answer.status_code}: {answer.text[:300]}. Serve the folder "
                "with the command that its export prints."
            )
        try:
            return as_record(record, parse_json(answer.text, self.url + path), self.url + path)
        except UnreadableFileError as error:
            raise VllmError(f"{error} A vllm serve of version 0.32 answers with token ids; use that one.") from error


def _require_condition(condition: str, served: Any, where: str) -> None:
    if condition not in served:
        raise VllmError(
            f"{where} does not serve {condition}; it serves {', '.join(served)}. Export the run with these features "
            "(--ablate, --insert or --scale) and serve that folder."
        )


@dataclass(frozen=True)
class VllmModel:
    """One condition of an engine, where `complete`, `respond` and `sample_responses` take a model of ours."""

    engine: VllmEngine
    """The engine, which several models share."""
    condition: str
    """Name of the condition."""
    tokenizer: PreTrainedTokenizerBase | None
    """The target's tokenizer."""
    generation_config: GenerationConfig | None
    """The target's generation_config.json."""
    cfg: SimpleNamespace
    """``n_ctx`` and ``d_vocab``, as a model of TransformerLens has them."""

    @classmethod
    def of(cls, engine: VllmEngine, condition: str, target: str | Path) -> VllmModel:
        """A condition with tokenizer and configuration of the target, a folder or hub name."""
        folder = locate(target, weights=False)
        config = read_config(folder)
        has_generation = (folder / "generation_config.json").is_file()
        return cls(
            engine,
            condition,
            load_tokenizer(folder),
            GenerationConfig.from_pretrained(folder) if has_generation else None,
            SimpleNamespace(n_ctx=engine.max_model_len, d_vocab=config["vocab_size"]),
        )

    def decode(
        self,
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        stop_at: Sequence[int],
        sampling: SamplingParameters,
        keys: Sequence[object],
    ) -> list[DecodedRow]:
        """What the condition generates after all prompts; arguments as in `generation.decoding.decode_batch`.

        Raises VllmError where the engine does not answer.
        """
        chosen = (sampling.temperature, sampling.top_p, sampling.top_k)
        requests = [
            CompletionRequest(list(prompt), limit, *chosen, seed_of(key) & _LARGEST_SEED, list(stop_at))
            for prompt, limit, key in zip(prompts, limits, keys, strict=True)
        ]
        return [DecodedRow(tokens, near_ties=0) for tokens in self.engine.generate(self.condition, requests)]

    @property
    def longest_text(self) -> int:
        """Tokens of a text that can be scored: vLLM generates one token behind it."""
        return self.engine.max_model_len - 1

    def score(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """The likelihood of every (context, continuation), as in `generation.likelihoods.log_likelihoods`.

        Raises VllmError where the engine does not answer.
        """
        scored = self.engine.score(self.condition, [[*context, *continuation] for context, continuation in texts])
        found = []
        for (_, continuation), tokens in zip(texts, scored, strict=True):
            own = tokens[len(tokens) - len(continuation) :]
            found.append(Likelihood(sum(one.log_probability for one in own), all(one.likeliest for one in own)))
        return found
