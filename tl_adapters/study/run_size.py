"""The size of a study; estimated memory, disk space and time of a training run and of a search, by shapes alone.

Bytes of adapters in float32: 4 for a weight, 4 for its gradient, 8 for Adam's two moments. The local stage trains them
in coordinates of their own, which are d_model^2 numbers a layer, and keeps the tokens that it trains on; the end-to-end
stage after it keeps the adapters in both coordinates. Operations are those of matrix products, with attention between
all positions of the longest document.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig

from tl_adapters.circuits.onsets import MOST_KEPT_BYTES
from tl_adapters.circuits.roles import EDGE_DOCUMENTS, MAX_EDGE_TARGETS
from tl_adapters.circuits.search import SearchOptions, round_sizes
from tl_adapters.circuits.study import StudyOptions
from tl_adapters.config import LocalConfig, RunConfig, StageName, TrainingConfig
from tl_adapters.local_stage.feature_polish import GROUP_TOKENS
from tl_adapters.local_stage.layer_run import REVISION_TOKENS
from tl_adapters.models.routed_model import kept_per_token, rows_at_once
from tl_adapters.study.hesitation import ORGANISM_PROBLEM_COUNTS
from tl_adapters.study.open_run import ORGANISM_TRACES
from tl_adapters.training.kl_divergence import LOGPROBS_KEPT, logprob_rows_at_once
from tl_adapters.utils.devices import seconds_of, seconds_to_write
from tl_adapters.utils.precision import adapter_dtype

BYTES_OF_DTYPE = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LOGIT_COPIES = 4
"""Tensors of the size of the logits that a search computes at a time: logits, log-probabilities, probabilities, KLs."""
TOKENS_PER_LOGITS = 8
"""In a search logits are computed at onsets, control positions and continuations: about one of so many tokens."""
POLISHED_TOKENS = 3 * GROUP_TOKENS
"""Most tokens to which one encoder is fitted."""
BIRTH_COPIES = 12
"""Tensors of the size of a layer's inputs that are in memory where features are born."""
NEWTON_STEPS, NEWTON_TOKENS = 3, GROUP_TOKENS // 2
"""Newton's steps of a fit, and the tokens of which each forms a matrix, about."""
ROLE_PASSES = 4
"""Passes over all texts, with a gradient, by which features get their roles."""


@dataclass(frozen=True)
class StudyScale:
    """How many documents, problems and steps each stage of a study uses. The defaults are those of the full demo."""

    training_traces: int = ORGANISM_TRACES
    """Training documents of the model organism."""
    problems: int = 1_000
    """Held-out problems whose answers are compared between models."""
    documents: int = 1_800
    """Greedy traces of the target for KL, NMSE, L0 and alive features; the first ``problems`` of them are shared."""
    baseline_documents: int = 200
    """How many of these the baselines are measured on."""
    max_new_tokens: int = 160
    """Longest answer in tokens."""
    hesitation: tuple[int, int] = ORGANISM_PROBLEM_COUNTS
    """Problems on which the hesitation circuit is selected, and other problems on which it is reported."""
    circuit: StudyOptions = field(default_factory=StudyOptions)
    """Options of the hesitation study."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Options of the training run."""


@dataclass(frozen=True)
class StageSize:
    """Estimated memory, disk space and operations of one stage."""

    stage: StageName
    """The stage."""
    adapters: int
    """Bytes of adapters, their gradients, Adam's moments, and coordinates."""
    activations: int
    """Bytes of activations kept for one backward pass, and of the logits that are computed at a time."""
    tokens: int
    """Bytes of the tokens that the local stage keeps."""
    checkpoint: int
    """Bytes of one saved training state on disk."""
    operations: float
    """Floating-point operations of all its steps."""
    written: float = 0.0
    """Bytes that elementwise operations write, where these take a part of the time that products do not tell."""

    def seconds(self, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
        """The time that it takes on a device, by the speeds of a product and of an elementwise operation there."""
        return seconds_of(self.operations, device, dtype) + (
            seconds_to_write(self.written, device) if self.written else 0.0
        )

    @property
    def memory(self) -> int:
        """Bytes that are in memory at once, beside the models."""
        return self.adapters + self.activations + self.tokens


@dataclass(frozen=True)
class SearchSize:
    """Estimated size of the search of a circuit, with the roles and edges of its features."""

    models: int
    """Bytes of the models, and of the adapters in float32."""
    activations: int
    """Bytes kept for a gradient, of one batch of texts."""
    rounds: int
    """Rounds of the search."""
    tokens: int
    """Tokens that are read with a gradient: in all rounds of the search, and for the roles."""
    search_passes: float
    """Passes over all texts in the search itself, each forwards or backwards."""
    passes: float
    """Passes over all texts, those for roles and edges included."""
    model_operations: float
    """Operations of the models' products, in their own dtype."""
    adapter_operations: float
    """Operations of the adapters' products, in float32."""

    @property
    def memory(self) -> int:
        """Bytes that are in memory at once."""
        return self.models + self.activations


@dataclass(frozen=True)
class RunSize:
    """Estimated size of a run."""

    dtype: str
    """Dtype of the models' weights."""
    models: int
    """Bytes of the weights of the target and of the base's MLPs."""
    stages: tuple[StageSize, ...]
    """Its stages, one after another."""
    result: int
    """Bytes of the trained adapters."""
    tokens: int
    """Tokens of the largest batch."""

    @property
    def largest(self) -> StageSize:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.memory)

    @property
    def memory(self) -> int:
        """Bytes that are in memory at once."""
        return self.models + self.largest.memory

    @property
    def checkpoint(self) -> int:
        """Bytes of the largest saved training state."""
        return max(stage.checkpoint for stage in self.stages)


def stored_dtype(described: PretrainedConfig) -> str:
    """The dtype of a model's weights in its files, as its configuration says it; float32 where it does not."""
    dtype = str(getattr(described, "dtype", None) or "float32").removeprefix("torch.")
    return dtype if dtype in BYTES_OF_DTYPE else "float32"


def estimate_size(
    config: RunConfig, described: PretrainedConfig, longest: int = 0, device: torch.device | None = None
) -> RunSize:
    """The size of a run (a test compares it with what autograd and the stages keep).

    Args:
        config: stages, width of the adapters, dtype, tokens per batch.
        described: the target's configuration.
        longest: tokens of the longest document, which is a batch of its own where it exceeds ``tokens_per_batch``.
        device: where the run computes, which decides the adapters' precision and the logits at a time; None is the CPU.
    """
    device = device or torch.device("cpu")
    dtype = config.dtype or stored_dtype(described)
    precision = config.training.adapter_precision
    rounded = adapter_dtype(getattr(torch, dtype), device, precision) is not None
    training = config.training
    tokens = max(training.tokens_per_batch, min(longest, described.max_position_embeddings))
    shapes = _Shapes.of(described, BYTES_OF_DTYPE[dtype], 2 if rounded else 4, min(longest or tokens, tokens), device)
    n_layers = shapes.n_layers
    estimates = {"local": _local_stage, "end_to_end": _end_to_end_stage}
    return RunSize(
        dtype=dtype,
        models=shapes.models,
        stages=tuple(estimates[stage](shapes, training, tokens) for stage in training.stages),
        result=4 * n_layers * shapes.adapter(training.n_features),
        tokens=tokens,
    )


def estimate_search(
    described: PretrainedConfig,
    n_features: int,
    chosen: int,
    texts: int,
    tokens: int,
    options: SearchOptions | None = None,
    dtype: str | None = None,
    device: torch.device | None = None,
) -> SearchSize:
    """The size of a search by rounds (a test compares it with what autograd keeps and the rounds read).

    Args:
        described: the target's configuration.
        n_features: features per layer.
        chosen: features of the circuit.
        texts: texts that a round reads, or of which it reads a part.
        tokens: of a text.
        options: of the search; its share and documents are not read.
        dtype: of the models; None is the target's own.
        device: where the search computes; None is the CPU.
    """
    options, device = options or SearchOptions(), device or torch.device("cpu")
    shapes = _Shapes.of(described, BYTES_OF_DTYPE[dtype or stored_dtype(described)], 4, tokens, device)
    batch = max(tokens, options.tokens_per_batch // tokens * tokens)
    block = batch * (shapes.width * shapes.per_token + 4 * n_features)
    kept = shapes.n_layers * block
    if kept > MOST_KEPT_BYTES:  # the residual stream between blocks, and one block at a time
        kept = shapes.n_layers * batch * shapes.width * shapes.d_model + 2 * block
    recorded = 4 * shapes.n_layers * batch * n_features  # all activations, where roles are assigned
    parts = min(options.parts, texts) if options.method == "sampled" else 1
    rounds = len(round_sizes(chosen, round(options.further * chosen), options))
    read = texts * tokens
    # Two passes of a round, each forwards, again, and backwards; the end; the target's own.
    search_passes = 3 * 2 * rounds / parts + 2 + 1
    # Edges take one pass forwards and, for each output feature, one again and backwards.
    edges = (1 + 2 * MAX_EDGE_TARGETS) * min(1, EDGE_DOCUMENTS / texts)
    passes = search_passes + 3 * ROLE_PASSES + edges
    products = shapes.mlp + shapes.attention + shapes.attended
    return SearchSize(
        models=shapes.models + 4 * shapes.n_layers * shapes.adapter(n_features),
        activations=kept + recorded + shapes.logits(batch // TOKENS_PER_LOGITS),
        rounds=rounds,
        tokens=round(read * (rounds / parts + ROLE_PASSES)),
        search_passes=search_passes,
        passes=passes,
        model_operations=2.0 * passes * read * shapes.n_layers * products,
        adapter_operations=2.0 * passes * read * shapes.n_layers * 2 * shapes.d_model * n_features,
    )


@dataclass(frozen=True)
class _Shapes:
    """Numbers of weights of a model, each of one layer, and the bytes of a weight."""

    n_layers: int
    d_model: int
    d_mlp: int
    per_token: int
    """Numbers per token and layer that a backward pass through frozen weights keeps."""
    mlp: int
    attention: int
    attended: int
    """Multiplications of a token with those before it, in scores and values, in the longest document."""
    embeddings: int
    """Of the embedding and the unembedding, which may be one matrix."""
    unembedding: int
    width: int
    """Bytes of a weight."""
    acts_width: int
    """Bytes of an adapter's activation."""
    logits_at_once: int
    """Most logits that are formed at a time."""
    logprobs_at_once: int
    """Most log-probabilities that a training step computes from them at a time."""
    workers: int
    """Layers that the local stage trains side by side on one device, unless it is told."""

    @classmethod
    def of(
        cls, described: PretrainedConfig, width: int, acts_width: int, longest: int, device: torch.device
    ) -> _Shapes:
        """The shapes that a target's configuration describes, for documents of at most so many tokens."""
        d, d_mlp = described.hidden_size, described.intermediate_size
        heads, kv = described.num_attention_heads, described.num_key_value_heads
        d_head = getattr(described, "head_dim", None) or d // heads
        vocab = described.vocab_size
        unembedding = vocab * d
        soft_capped = bool(getattr(described, "attn_logit_softcapping", None))
        patterns = heads * longest if soft_capped else 0
        post_norms = described.model_type.startswith("gemma")
        rows = rows_at_once(vocab, device)
        return cls(
            n_layers=described.num_hidden_layers,
            d_model=d,
            d_mlp=d_mlp,
            per_token=kept_per_token(d, d_mlp, d_head * (heads + 2 * kv), patterns, post_norms),
            mlp=3 * d * d_mlp,
            attention=d * d_head * (2 * heads + 2 * kv),
            attended=heads * d_head * longest,  # two products, half of each behind the mask
            embeddings=unembedding * (1 if described.tie_word_embeddings else 2),
            unembedding=unembedding,
            width=width,
            acts_width=acts_width,
            logits_at_once=rows * vocab,
            logprobs_at_once=logprob_rows_at_once(rows, vocab, device) * vocab,
            workers=torch.get_num_threads() if device.type == "cpu" else 1,
        )

    def logits(self, tokens: int) -> int:
        """Bytes of the logits that a search computes at a time, and of what is made of them."""
        return LOGIT_COPIES * 4 * min(self.logits_at_once, self._all_logits(tokens))

    def logits_of_step(self, tokens: int) -> int:
        """Bytes of logits and of what is made of them in a training step.

        They are the target's log-probabilities, of all tokens where they are kept; logits and their gradient; and at
        fewer tokens log-probabilities and probabilities.
        """
        every = self._all_logits(tokens)
        chunk, piece = min(self.logits_at_once, every), min(self.logprobs_at_once, every)
        return 4 * ((every if every <= LOGPROBS_KEPT else chunk) + 2 * chunk + 2 * piece)

    def _all_logits(self, tokens: int) -> int:
        return tokens * self.unembedding // self.d_model

    @property
    def models(self) -> int:
        """Bytes of the target and of the base's MLPs."""
        return self.width * (self.n_layers * (2 * self.mlp + self.attention) + self.embeddings)

    def adapter(self, n_features: int) -> int:
        """Weights of one layer's adapter."""
        return 2 * self.d_model * n_features + n_features + self.d_model


def _end_to_end_stage(shapes: _Shapes, training: TrainingConfig, tokens: int) -> StageSize:
    n, n_layers, per_batch = training.n_features, shapes.n_layers, training.tokens_per_batch
    adapters, coordinates = n_layers * shapes.adapter(n), 0
    if "local" in training.stages:  # weights and gradients in the local stage's coordinates, too
        coordinates = 8 * adapters + 4 * n_layers * shapes.d_model**2
    products = shapes.mlp + shapes.attention + shapes.attended
    # Three forward passes (target, replacement, and two halves of bridges), two backward passes to the inputs, and of
    # adapters one and a half of each, with the gradient of their weights; logits of four streams, and three gradients.
    forward_and_backward = n_layers * (5 * products + 1.5 * 3 * 2 * shapes.d_model * n) + 9 * shapes.unembedding
    if training.recompute:  # the passes that have a backward pass run twice
        forward_and_backward += n_layers * (2 * products + 1.5 * 2 * shapes.d_model * n)
    if training.loss_weights.local:
        forward_and_backward += n_layers * (2 * shapes.mlp + 3 * 2 * shapes.d_model * n)
    return StageSize(
        stage="end_to_end",
        adapters=16 * adapters + coordinates,
        activations=_held_in_backward(shapes, training, tokens) + shapes.logits_of_step(tokens),
        tokens=0,
        checkpoint=12 * adapters + coordinates - (4 * adapters if coordinates else 0),
        operations=2.0 * forward_and_backward * per_batch * training.steps * training.batches_per_step,
    )


def _held_in_backward(shapes: _Shapes, training: TrainingConfig, tokens: int) -> int:
    """Bytes that a backward pass of the replacement holds when it begins, with the target's residual stream."""
    n, d, n_layers = training.n_features, shapes.d_model, shapes.n_layers
    # of a block: the model's own, which the adapter reads too; the adapter's activations; the error of the NMSE.
    # On a CPU sparse adapters keep less, but half of the features are active when training begins.
    block = tokens * (shapes.width * shapes.per_token + shapes.acts_width * n + 4 * d)
    if shapes.acts_width < 4:  # what was cast: the input, pre-activations, and weights
        block += shapes.acts_width * (tokens * (d + n) + shapes.adapter(n))
    streams = 2 * tokens * n_layers * shapes.width * d
    gradients = 2 * tokens * shapes.acts_width * n  # of one layer's activations and pre-activations
    return streams + gradients + block * (1 if training.recompute else n_layers)


def _local_stage(shapes: _Shapes, training: TrainingConfig, tokens: int) -> StageSize:
    local, n, n_layers = training.local, training.n_features, shapes.n_layers
    adapters, matrices = n_layers * shapes.adapter(n), 4 * n_layers * shapes.d_model**2
    # Of the model only what one layer's MLP computes is kept at a time, in float32, and the inputs of all of them.
    read = tokens * (n_layers * shapes.width * shapes.d_model + 4 * 3 * shapes.d_mlp)
    step = 4 * local.tokens_per_step * (4 * shapes.d_model + 6 * n)
    # Where features are revised, a layer has inputs, differences and what is left of them in float32; births take more.
    revision = (3 + BIRTH_COPIES) * 4 * shapes.d_model * local.max_tokens
    side_by_side = min(local.workers or shapes.workers, n_layers)
    return StageSize(
        stage="local",
        adapters=(4 + 16) * adapters + matrices,
        activations=max(read + step, side_by_side * revision),
        tokens=local.max_tokens * n_layers * 2 * shapes.width * shapes.d_model,
        checkpoint=(4 + 12) * adapters + matrices,
        operations=_local_operations(shapes, local, training),
        written=_written_by_local_stage(shapes, local, training),
    )


def _local_operations(shapes: _Shapes, local: LocalConfig, training: TrainingConfig) -> float:
    """A forward pass of the target and both MLPs per new token, the steps, and all tokens per revision; the polish."""
    n_layers, n_features, d = shapes.n_layers, training.n_features, shapes.d_model
    new_tokens = local.max_tokens + (local.steps * local.tokens_per_step if local.streaming else 0)
    collecting = new_tokens * n_layers * (shapes.attention + 3 * shapes.mlp)
    encoder = d * n_features
    step = local.tokens_per_step * n_layers * (3 * 2 * encoder + d**2)
    revised = min(REVISION_TOKENS, local.max_tokens) * n_layers * (2 * encoder + d**2)
    polished = 0.0
    if local.polish and training.activation == "relu":
        # Three products of a feature with all tokens; Newton's steps form a matrix from some tokens and solve with it.
        newton = NEWTON_STEPS * (min(NEWTON_TOKENS, local.max_tokens) * d**2 + d**3 // 3)
        polished = 2 * n_layers * n_features * (3 * local.max_tokens * d + newton)
    return 2.0 * (collecting + local.steps * step + (len(local.revisions) + 1) * revised + polished)


def _written_by_local_stage(shapes: _Shapes, local: LocalConfig, training: TrainingConfig) -> float:
    """Bytes that elementwise operations write in steps, in revisions (births among them), and in the polish.

    How many numbers a step, a revision and a fit write for each number that they hold was fitted to the times of these
    parts on the built-in pair with 128 features; `benchmarks/planner.py` and other widths test it.
    """
    n_features, d = training.n_features, shapes.d_model
    step = local.tokens_per_step * (12 * n_features + 12 * d) + 10 * 2 * d * n_features
    revised = min(REVISION_TOKENS, local.max_tokens)
    revision = revised * (2 * (5 * d + 5 * n_features) + 2 * d + 18 * d)
    polish = 0
    if local.polish and training.activation == "relu":
        polish = 2 * n_features * (6 * d * min(POLISHED_TOKENS, local.max_tokens) + 24 * local.max_tokens)
    return 4.0 * shapes.n_layers * (local.steps * step + len(local.revisions) * revision + polish)
