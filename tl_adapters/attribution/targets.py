"""What is attributed: a logit, a difference of logits, or a feature, and the prompt's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.attribution.gradient import GradientModel
from tl_adapters.attribution.graph import GraphError, GraphTarget
from tl_adapters.attribution.relp import LinearizedModel
from tl_adapters.data.tokens import single_token, token_text
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.utils.arguments import token_ids


@dataclass(frozen=True)
class LogitTarget:
    """A token's logit, less the mean logit, before any soft cap."""

    token: int | str
    """Vocabulary index, or the text of one token."""
    position: int = -1
    """The position that predicts it."""


@dataclass(frozen=True)
class DifferenceTarget:
    """One token's logit less another's."""

    token: int | str
    """What is asked for."""
    against: int | str
    """What it is compared with."""
    position: int = -1
    """The position that predicts them."""


@dataclass(frozen=True)
class FeatureTarget:
    """A feature's pre-activation."""

    layer: int
    """Of the feature."""
    index: int
    """Of the feature."""
    position: int
    """Where in the prompt."""


Target = LogitTarget | DifferenceTarget | FeatureTarget


class ResolvedTarget(NamedTuple):
    """A target as the linear model takes it."""

    layer: int
    position: int
    vector: Tensor
    value: float
    constant: float
    about: GraphTarget


def prompt_token_ids(pair: PairedModel, prompt: str | Sequence[int] | Tensor) -> Int[Tensor, "pos"]:
    """The prompt's token ids; nothing is added to text.

    Raises GraphError for an empty or too long one, ArgumentError for several prompts or what holds no token ids.
    """
    if isinstance(prompt, str):
        if pair.model.tokenizer is None:
            raise GraphError("This model has no tokenizer; give the prompt as token ids.")
        tokens = torch.tensor(pair.model.tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=torch.long)
    else:
        tokens = torch.tensor(token_ids(prompt, pair.model.cfg.d_vocab, "prompt"), dtype=torch.long)
    n_ctx = pair.model.cfg.n_ctx
    if not 0 < len(tokens) <= n_ctx:
        raise GraphError(f"The prompt has {len(tokens)} tokens; the model's context is 1 to {n_ctx:,}.")
    return tokens


def token_id(pair: PairedModel, token: int | str) -> int:
    """Vocabulary index of a token given as index or text. Raises GraphError and VocabularyError."""
    if isinstance(token, int):
        if not 0 <= token < pair.model.cfg.d_vocab:
            raise GraphError(f"There is no token {token}; the vocabulary has {pair.model.cfg.d_vocab:,}.")
        return token
    return single_token(pair.model.tokenizer, token)


def likeliest_next_tokens(
    pair: PairedModel, model: LinearizedModel | GradientModel, position: int, mass: float, most: int
) -> list[LogitTarget]:
    """The likeliest next tokens whose probabilities reach ``mass``, at most ``most``."""
    probabilities = _probabilities(pair, model, position)
    top = probabilities.topk(min(most, len(probabilities)))
    enough = int((top.values.cumsum(0) < mass).sum()) + 1
    return [LogitTarget(int(token), position) for token in top.indices[:enough]]


@torch.no_grad()
def _probabilities(pair: PairedModel, model: LinearizedModel | GradientModel, position: int) -> Tensor:
    residual = model.final_residual[position].to(pair.model.W_E.dtype)
    return pair.unembed(residual[None])[0].to(model.dtype).softmax(-1)


def absolute_position(position: int, n: int) -> int:
    """A position counted from the end becomes one counted from the start. Raises GraphError outside the prompt."""
    place = position + n if position < 0 else position
    if not 0 <= place < n:
        raise GraphError(f"There is no position {position} in a prompt of {n} tokens.")
    return place


def resolve_target(
    pair: PairedModel, model: LinearizedModel | GradientModel, target: Target | str | int, position: int
) -> ResolvedTarget:
    """Layer, position, direction and value of what is attributed, in the linearized model of one prompt.

    Args:
        pair: whose unembedding and tokenizer are read.
        model: the linearized model of the prompt.
        target: a token's text or id stands for its logit at ``position``.
        position: in the prompt; negative positions count from its end.

    Raises:
        GraphError: the position or the feature does not exist.
    """
    if isinstance(target, (str, int)):
        target = LogitTarget(target, position)
    place = absolute_position(target.position, model.n_tokens)
    if isinstance(target, FeatureTarget):
        layer, index = target.layer, target.index
        if not 0 <= layer < model.n_layers or not 0 <= index < model.encoders[0].shape[1]:
            raise GraphError(
                f"There is no feature {layer}/{index}: there are {model.n_layers} layers of "
                f"{model.encoders[0].shape[1]} features."
            )
        value, constant = float(model.pre_activations[layer][place, index]), float(model.b_enc[layer][index])
        about = GraphTarget(f"feature {layer}/{index}", place, 1.0)
        return ResolvedTarget(layer, place, model.encoders[layer][:, index], value, constant, about)
    token = token_id(pair, target.token)
    name = token_label(pair, token)
    if isinstance(target, DifferenceTarget):
        against = token_id(pair, target.against)
        about = GraphTarget(f"{name!r} - {token_label(pair, against)!r}", place, 1.0, token, against=against)
    else:
        probability = float(_probabilities(pair, model, place)[token])
        about = GraphTarget(name, place, probability, token, probability)
    vector = unembedding_column(pair, token, about.against, model.dtype)
    return ResolvedTarget(model.n_layers, place, vector, float(model.read_by_unembedding[place] @ vector), 0.0, about)


def unembedding_column(
    pair: PairedModel, token: int, against: int | None, dtype: torch.dtype
) -> Float[Tensor, "d_model"]:
    """A logit's direction: the token's column of the unembedding less another's, or less the mean column."""
    columns = pair.backend.unembedding().detach()
    other = columns.mean(0, dtype=dtype) if against is None else columns[against].to(dtype)
    return columns[token].to(dtype) - other


def token_label(pair: PairedModel, token: int) -> str:
    """A token's text; its number where the model has no tokenizer."""
    return token_text(pair.model.tokenizer, token)
