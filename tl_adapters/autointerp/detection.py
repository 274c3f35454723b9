"""Explains features with a language model, and scores the explanations by how well they detect firings.

1. The documents of a feature are split: half of those in its random sample are for testing, all others for explaining.
   No document is in both (`detection_tasks`).
2. A model reads the top activating and some random examples of the explaining documents, and writes an explanation: one
   sentence that says when the feature fires.
3. The same model, in a new conversation, reads that sentence and excerpts in each of which one token stands apart. Half
   of these tokens are firings from the testing documents, spread over the feature's activations. The other half are
   negatives: tokens of other documents on which the feature is not known to fire, each in the trace region of one
   firing and as near to its position as possible. The model says on which of these tokens the feature fires.
4. The detection score is the balanced accuracy: the mean of the true positive rate and the true negative rate. To
   answer "on all" and to answer at random both score 0.5. Features are compared with MLP neurons of the same layers,
   and the model is shown neither which is which nor whose excerpts these are.

A store holds a sample of the firings only. Tokens that are likely to be firings that it does not hold are not used as
negatives, and the expected share that remains is reported (`expected_firing_negatives`); it lowers the score of a
perfect explanation by half of that share. The question is about one token rather than the whole excerpt, because a
feature that fires on every tenth token fires somewhere in nearly every excerpt.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.autointerp.detection_tasks import DetectionTask, detection_tasks
from tl_adapters.autointerp.endpoint import Endpoint, EndpointUsage, Failure, Messages
from tl_adapters.autointerp.judge import JudgingError, one_line
from tl_adapters.autointerp.prompts import (
    DETECTION_PROMPT,
    EXPLANATION_PROMPT,
    chat_messages,
    detection_excerpt,
    feature_profile,
)
from tl_adapters.features.feature import Label
from tl_adapters.features.store import FeatureStore
from tl_adapters.utils.clustered_intervals import clustered_share, difference_of_means
from tl_adapters.utils.measurement import Measurement
from tl_adapters.utils.notebook import ResultRecord, records_frame

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class DetectionScore(ResultRecord):
    """How well one explanation predicts where its feature fires."""

    name: str
    """ "layer.index"."""
    explanation: str
    """The model's explanation."""
    score: float
    """Balanced accuracy."""
    true_positive_rate: float = field(metadata={"json_key": "found"})
    """Share of the firings that were detected."""
    true_negative_rate: float = field(metadata={"json_key": "passed"})
    """Share of the negatives on which the model says that the feature does not fire."""
    excerpts: int
    """Number of excerpts, firings and negatives together."""
    expected_firing_negatives: float = field(metadata={"json_key": "unsure"})
    """Expected share of the negatives on which the feature fires although the store does not hold the firing."""


@dataclass(frozen=True)
class DetectionScores:
    """The detection scores of several features, or neurons."""

    score: Measurement
    """Mean score."""
    true_positive_rate: float = field(metadata={"json_key": "found"})
    """Mean true positive rate."""
    true_negative_rate: float = field(metadata={"json_key": "passed"})
    """Mean true negative rate."""
    expected_firing_negatives: float = field(metadata={"json_key": "unsure"})
    """Mean expected share of the negatives on which the feature fires."""
    skipped: dict[str, int]
    """Number of drawn features that could not be tested, by reason."""
    failed: dict[str, str]
    """Features without a usable reply, and the reason."""
    units: tuple[DetectionScore, ...]
    """The score of each feature."""


@dataclass(frozen=True)
class InterpretationReport(ResultRecord):
    """Detection scores of features and of neurons, and their difference."""

    model: str
    """The model that explains and judges."""
    features: DetectionScores
    """Scores of the adapters' features."""
    neurons: DetectionScores | None
    """Scores of neurons of the target's MLPs in the same layers; None if there was no store of neurons."""
    difference: Measurement | None
    """Mean score of the features minus that of the neurons."""
    usage: EndpointUsage = field(metadata={"json_key": "spent"})
    """Requests and tokens that were used."""
    seed: int
    """Seed of the random draws."""

    def row(self) -> dict[str, Any]:
        """The mean scores, and how many features and neurons have one."""
        units = {"features": self.features, **({"neurons": self.neurons} if self.neurons else {})}
        scores = {f"score of {name}": of.score for name, of in units.items()}
        counts = {f"{name} with a score": len(of.units) for name, of in units.items()}
        return {"model": self.model, **scores, "difference": self.difference, **counts}

    def to_pandas(self) -> DataFrame:
        """A DataFrame with a row for each feature and neuron: its explanation and score."""
        kinds = {"feature": self.features, **({"neuron": self.neurons} if self.neurons else {})}
        return records_frame([{"kind": kind, **unit.row()} for kind, of in kinds.items() for unit in of.units])


def auto_interpret(
    store: FeatureStore,
    neuron_store: FeatureStore | None,
    endpoint: Endpoint,
    *,
    n: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> InterpretationReport:
    """Explain random alive features and as many neurons of the same layers, and score the explanations.

    Explanations and scores are written to the stores as labels; a label's category, if there was one, stays.

    Args:
        store: features of adapters.
        neuron_store: neurons of the target's MLPs; None compares with none.
        endpoint: the model that explains and judges.
        n: number of features.
        seed: seed of the random draws.
        progress: show progress bars.

    Raises:
        JudgingError: no feature can be tested, or no reply can be used.
        EndpointError: what `Endpoint.ask_all` raises.
    """
    alive = store.ids()
    if n < 1 or not alive:
        raise JudgingError(f"Asked for {n} features of {len(alive)} that are alive; give n >= 1 and a store in which"
                           " something fires.")  # fmt: skip
    if store.about.kind != "feature" or (neuron_store is not None and neuron_store.about.kind != "neuron"):
        raise JudgingError(
            "The first store must hold features and the second one neurons (collected with kind='neuron')."
        )
    per_layer = Counter(id.layer for id in random.Random(f"{seed} layers").sample(alive, min(n, len(alive))))
    stores = {"feature": store} | ({"neuron": neuron_store} if neuron_store is not None else {})
    tasks, skipped = {}, {}
    for kind, one in stores.items():
        tasks[kind], skipped[kind] = _drawn_tasks(one, per_layer, seed)
    mixed = [(kind, task) for kind, of_kind in tasks.items() for task in of_kind]
    random.Random(f"{seed} order").shuffle(mixed)
    used_before = endpoint.usage
    outcomes = _explain_and_detect(endpoint, [task for _, task in mixed], progress)
    results = {}
    for kind, one in stores.items():
        of_kind = [(task, outcome) for (k, task), outcome in zip(mixed, outcomes, strict=True) if k == kind]
        results[kind] = _scores(of_kind, skipped[kind], one.about.split, kind)
        _set_labels(one, results[kind], endpoint.model)
    features, neurons = results["feature"], results.get("neuron")
    used = endpoint.usage.since(used_before)
    return InterpretationReport(endpoint.model, features, neurons, _difference(features, neurons), used, seed)


def _drawn_tasks(
    store: FeatureStore, per_layer: Mapping[int, int], seed: int
) -> tuple[list[DetectionTask], dict[str, int]]:
    """Tasks of random features, as many in each layer as asked for where so many can be tested; and those skipped."""
    by_layer: dict[int, list[FeatureId]] = defaultdict(list)
    for id in store.ids():
        by_layer[id.layer].append(id)
    tasks: list[DetectionTask] = []
    skipped = Counter[str]()
    for layer, wanted in sorted(per_layer.items()):
        ids, n_before = by_layer[layer], len(tasks)
        random.Random(f"{seed} layer {layer}").shuffle(ids)
        for task in detection_tasks(store, ids, seed):
            if isinstance(task, DetectionTask):
                tasks.append(task)
            else:
                skipped[task] += 1
            if len(tasks) - n_before == wanted:
                break
    return tasks, dict(skipped)


def _explain_and_detect(
    endpoint: Endpoint, tasks: Sequence[DetectionTask], progress: bool
) -> list[tuple[str, set[int]] | Failure]:
    """For each task, the explanation and the numbers of the excerpts on which the feature is said to fire."""
    explanation_questions = [explanation_question(task) for task in tasks]
    replies = endpoint.ask_all(explanation_questions, _read_explanation, progress=progress, what="explain")
    explanations = {i: text for i, text in enumerate(replies) if isinstance(text, str)}
    detection_questions = [detection_question(tasks[i], text) for i, text in explanations.items()]
    readers = [partial(_read_numbers, highest=len(tasks[i].excerpts)) for i in explanations]
    detected = endpoint.ask_all(detection_questions, readers, progress=progress, what="detect")
    outcomes: list[tuple[str, set[int]] | Failure] = [
        reply if isinstance(reply, Failure) else Failure("") for reply in replies
    ]
    for (i, text), numbers in zip(explanations.items(), detected, strict=True):
        outcomes[i] = numbers if isinstance(numbers, Failure) else (text, numbers)
    return outcomes


def explanation_question(task: DetectionTask) -> Messages:
    """The question that asks for an explanation."""
    return chat_messages(EXPLANATION_PROMPT, feature_profile(task.feature, task.explanation_examples))


def detection_question(task: DetectionTask, explanation: str) -> Messages:
    """The question that tests an explanation: the excerpts in the task's order, numbered from 1."""
    excerpts = [{"number": i, **detection_excerpt(e)} for i, e in enumerate(task.excerpts, start=1)]
    return chat_messages(DETECTION_PROMPT, {"fires": explanation, "excerpts": excerpts})


# The texts of these errors are sent to the model, so cached replies are found by them; see `Endpoint.ask_all`.


def _read_explanation(reply: Any) -> str:
    if not isinstance(reply, dict) or not isinstance(reply.get("explanation"), str):
        raise ValueError('it is no object with the text "explanation"')
    return one_line(reply["explanation"])


def _read_numbers(reply: Any, highest: int) -> set[int]:
    numbers = reply.get("fires") if isinstance(reply, dict) else None
    if not isinstance(numbers, list) or not all(type(i) is int and 1 <= i <= highest for i in numbers):
        raise ValueError(f'it is no object with a list "fires" of whole numbers from 1 to {highest}')
    return set(numbers)


def detection_score(task: DetectionTask, explanation: str, detected: set[int]) -> DetectionScore:
    """The score of one reply.

    Args:
        task: the task.
        explanation: the explanation that was tested.
        detected: numbers of the excerpts, from 1, on which the model says that the feature fires.
    """
    says_fires = [i in detected for i in range(1, len(task.fires) + 1)]
    right = [says == fires for says, fires in zip(says_fires, task.fires, strict=True)]
    positive_rate = _mean([r for r, fires in zip(right, task.fires, strict=True) if fires])
    negative_rate = _mean([r for r, fires in zip(right, task.fires, strict=True) if not fires])
    return DetectionScore(
        name=task.feature.name,
        explanation=explanation,
        score=(positive_rate + negative_rate) / 2,
        true_positive_rate=positive_rate,
        true_negative_rate=negative_rate,
        excerpts=len(task.fires),
        expected_firing_negatives=task.expected_firing_negatives,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _scores(
    outcomes: Sequence[tuple[DetectionTask, tuple[str, set[int]] | Failure]],
    skipped: dict[str, int],
    split: str,
    kind: str,
) -> DetectionScores:
    """The scores of all features, or of all neurons. Raises JudgingError where there are none."""
    units = tuple(detection_score(task, *out) for task, out in outcomes if not isinstance(out, Failure))
    failed = {task.feature.name: out.reason for task, out in outcomes if isinstance(out, Failure)}
    if not units:
        reason = min(failed.values()) if failed else f"none can be tested ({skipped or 'none is alive'})"
        raise JudgingError(f"No {kind} got a detection score: {reason}. Collect more documents, or ask another model.")
    scores = torch.tensor([unit.score for unit in units], dtype=torch.float64)
    return DetectionScores(
        score=clustered_share(scores).measurement(len(units), "balanced accuracy", split),
        true_positive_rate=_mean([unit.true_positive_rate for unit in units]),
        true_negative_rate=_mean([unit.true_negative_rate for unit in units]),
        expected_firing_negatives=_mean([unit.expected_firing_negatives for unit in units]),
        skipped=skipped,
        failed=failed,
        units=units,
    )


def _difference(features: DetectionScores, neurons: DetectionScores | None) -> Measurement | None:
    if neurons is None:
        return None
    a, b = (torch.tensor([unit.score for unit in d.units], dtype=torch.float64) for d in (features, neurons))
    n = min(len(a), len(b))
    return difference_of_means(a, b).measurement(n, "balanced accuracy", features.score.split)


def _set_labels(store: FeatureStore, scores: DetectionScores, model: str) -> None:
    """Write explanations and scores to a store, as labels."""
    labels = {}
    for unit in scores.units:
        id = FeatureId(*map(int, unit.name.split(".")))
        before = store.labels.get(id)
        labels[id] = Label(unit.explanation, before.category if before else "", model, unit.score)
    store.set_labels(labels)
