"""The targets of an attribution graph: a logit, a difference of two logits, or a feature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_adapters.attribution.gradient import PromptModel
from tl_adapters.attribution.graph import GraphError, GraphTarget
from tl_adapters.data.tokens import single_token, token_text
from tl_adapters.data.words import hesitation_tokens
from tl_adapters.models.paired_model import PairedModel


@dataclass(frozen=True)
class LogitTarget:
    """The logit of a token minus the mean logit, before any soft cap."""

    token: int | str
    """Vocabulary index, or the text of one token."""
    position: int = -1
    """The position that predicts the token."""


@dataclass(frozen=True)
class DifferenceTarget:
    """The logit of one token minus the logit of another."""

    token: int | str
    """The token whose logit counts positively."""
    against: int | str
    """The token whose logit is subtracted."""
    position: int = -1
    """The position that predicts the tokens."""


@dataclass(frozen=True)
class FeatureTarget:
    """The pre-activation of a feature."""

    layer: int
    """Layer of the feature."""
    index: int
    """Index of the feature in its layer."""
    position: int
    """Position in the prompt."""


Target = LogitTarget | DifferenceTarget | FeatureTarget


class ResolvedTarget(NamedTuple):
    """A target as a `PromptModel` takes it."""

    layer: int
    """Layer of the feature; n_layers for a logit."""
    position: int
    """Position in the prompt, from 0."""
    vector: Tensor
    """The direction that is read: an encoder column or an unembedding column, [d_model]."""
    value: float
    """The value of the target in the forward pass."""
    constant: float
    """The part of the value that is the target's own bias."""
    about: GraphTarget
    """The target as the graph records it."""


def cut_before(
    pair: PairedModel, tokens: Int[Tensor, "pos"], word: str, start: int = 0
) -> tuple[Int[Tensor, "before"], int]:
    """The tokens before the first place where a text says a word, and the token that says it.

    Args:
        word: in any spelling that is one token ("Wait", "wait", " Wait", ...), or the text of one token.
        start: the first position where the word is looked for; before the word there is at least one token.

    Raises:
        GraphError: the text does not say the word.
        VocabularyError: no spelling of the word is a single token.
    """
    is_word = len(word.split()) == 1 and word == word.strip()
    spelled = set(hesitation_tokens(pair.model.tokenizer, [word]).values()) if is_word else set()
    spelled = spelled or {single_token(pair.model.tokenizer, word)}
    said = [place for place in range(max(start, 1), len(tokens)) if int(tokens[place]) in spelled]
    if not said:
        raise GraphError(f"The text does not say {word!r}; give one that does, or name the token in targets.")
    return tokens[: said[0]], int(tokens[said[0]])


def token_id(pair: PairedModel, token: int | str) -> int:
    """The vocabulary index of a token given as index or text. Raises GraphError or VocabularyError if there is none."""
    if isinstance(token, int):
        if not 0 <= token < pair.model.cfg.d_vocab:
            raise GraphError(f"There is no token {token}; token ids are from 0 to {pair.model.cfg.d_vocab - 1:,}.")
        return token
    return single_token(pair.model.tokenizer, token)


def likeliest_next_tokens(
    pair: PairedModel, model: PromptModel, position: int, mass: float, max_logits: int
) -> list[LogitTarget]:
    """The likeliest next tokens at ``position``, until their probabilities reach ``mass``, at most ``max_logits``."""
    probabilities = _probabilities(pair, model, position)
    top = probabilities.topk(min(max_logits, len(probabilities)))
    enough = int((top.values.cumsum(0) < mass).sum()) + 1
    return [LogitTarget(int(token), position) for token in top.indices[:enough]]


@torch.no_grad()
def _probabilities(pair: PairedModel, model: PromptModel, position: int) -> Tensor:
    residual = model.final_residual[position].to(pair.model.W_E.dtype)
    return pair.unembed(residual[None])[0].to(model.dtype).softmax(-1)


def absolute_position(position: int, n: int) -> int:
    """``position`` counted from the start of a prompt of ``n`` tokens; a negative one counts from the end.

    Raises:
        GraphError: the position is outside the prompt.
    """
    if not -n <= position < n:
        raise GraphError(f"There is no position {position} in a prompt of {n} tokens.")
    return position % n


def resolve_target(pair: PairedModel, model: PromptModel, target: Target | str | int, position: int) -> ResolvedTarget:
    """The layer, position, direction and value of a target on one prompt.

    Args:
        pair: the pair whose unembedding and tokenizer are read.
        model: the linearized model (or the gradients) of the prompt.
        target: the text or id of a token means its logit at ``position``.
        position: position in the prompt; a negative one counts from the end.

    Raises:
        GraphError: the position, the token or the feature does not exist.
        VocabularyError: the text is not a single token.
    """
    if isinstance(target, (str, int)):
        target = LogitTarget(target, position)
    position = absolute_position(target.position, model.n_tokens)
    if isinstance(target, FeatureTarget):
        layer, index = target.layer, target.index
        if not 0 <= layer < model.n_layers or not 0 <= index < model.encoders[0].shape[1]:
            raise GraphError(
                f"There is no feature {layer}/{index}: there are {model.n_layers} layers of "
                f"{model.encoders[0].shape[1]} features."
            )
        value, constant = float(model.pre_activations[layer][position, index]), float(model.b_enc[layer][index])
        about = GraphTarget(f"feature {layer}/{index}", position, 1.0)
        return ResolvedTarget(layer, position, model.encoders[layer][:, index], value, constant, about)
    token = token_id(pair, target.token)
    name = token_label(pair, token)
    if isinstance(target, DifferenceTarget):
        against = token_id(pair, target.against)
        about = GraphTarget(f"{name!r} - {token_label(pair, against)!r}", position, 1.0, token, against=against)
    else:
        probability = float(_probabilities(pair, model, position)[token])
        about = GraphTarget(name, position, probability, token, probability)
    vector = unembedding_column(pair, token, about.against, model.dtype)
    value = float(model.read_by_unembedding[position] @ vector)
    return ResolvedTarget(model.n_layers, position, vector, value, 0.0, about)


def unembedding_column(
    pair: PairedModel, token: int, against: int | None, dtype: torch.dtype
) -> Float[Tensor, "d_model"]:
    """The direction of a logit: the token's unembedding column minus another token's, or minus the mean column."""
    columns = pair.backend.unembedding().detach()
    other = columns.mean(0, dtype=dtype) if against is None else columns[against].to(dtype)
    return columns[token].to(dtype) - other


def token_label(pair: PairedModel, token: int) -> str:
    """The text of a token; its id if the model has no tokenizer."""
    return token_text(pair.model.tokenizer, token)
