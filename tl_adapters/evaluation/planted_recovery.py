"""A test of adapters with a known answer: how many planted features does training recover?

1. Known features are made for a base model and calibrated on text (`planted_features.plant_features`).
2. The target is the base with these features added to its MLPs (`PairedModel.plant`), so that its difference from the
   base is known.
3. Adapters are trained on that pair as on any other.
4. Trained and planted features are matched one to one (`feature_matching`). Precision is the share of the adapters'
   alive features that are planted features; recall is the share of the planted features that were found, by firing
   rate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from tl_adapters.adapters.adapter_set import AdapterSet
from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.checkpoints.model_reference import ModelReference
from tl_adapters.config import TrainingConfig
from tl_adapters.data.traces import Trace
from tl_adapters.evaluation.faithfulness import faithfulness_block, measure_faithfulness
from tl_adapters.evaluation.feature_matching import Matching, Share, match_features, shares_table
from tl_adapters.evaluation.planted_features import PlantedSet, plant_features
from tl_adapters.models.paired_model import PairedModel
from tl_adapters.training.trainer import train
from tl_adapters.utils.html import measurement_cell
from tl_adapters.utils.notebook import tables_view
from tl_adapters.utils.results import plain

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class PlantedReport:
    """How many of the planted features training recovered."""

    plant: PlantedSet = field(repr=False)
    """The planted features."""
    adapters: AdapterSet = field(repr=False)
    """The trained adapters."""
    matching: Matching = field(repr=False)
    """The matching of trained features (a) and planted features (b)."""
    faithfulness: dict[str, Any] = field(repr=False)
    """KL, NMSE and L0 with intervals (`faithfulness.faithfulness_block`)."""

    @property
    def precision(self) -> Share:
        """The share of the alive trained features that are planted features."""
        return self.matching.shares("a")["all"]

    @property
    def recall(self) -> dict[str, Share]:
        """The share of the alive planted features that were found: "all", and by firing rate."""
        return self.matching.shares("b")

    @property
    def recall_by_kind(self) -> dict[str, Share]:
        """The same for text features and direction features."""
        same = {FeatureId(m.layer, m.b) for m in self.matching.matches if m.same}
        alive = [f for f in self.plant.features if f.feature in self.matching.b]
        kinds = {kind: [f.feature for f in alive if f.kind == kind] for kind in ("text", "direction")}
        return {kind: Share(len(same.intersection(features)), len(features)) for kind, features in kinds.items()}

    def to_dict(self) -> dict[str, Any]:
        """Everything except the weights, as JSON values."""
        as_dict = lambda shares: {k: {**s._asdict(), "interval": s.interval} for k, s in shares.items()}  # noqa: E731
        figures = ("kl", "kl_of_hybrid", "l0_all_tokens")
        return {
            "precision": as_dict({"all": self.precision})["all"],
            "recall": as_dict(self.recall),
            "recall_by_kind": as_dict(self.recall_by_kind),
            "not_judged": len(self.plant.features) - len(self.matching.b),
            "alive": len(self.matching.a),
            "tokens": self.matching.tokens,
            "features": [asdict(f) for f in self.plant.features],
            "matches": [asdict(m) for m in self.matching.matches],
            "rates_of_planted": [[*feature, rate] for feature, rate in self.matching.b.items()],
            **{name: plain(self.faithfulness[name]) for name in figures},
        }

    def __repr__(self) -> str:
        found, precision = self.recall["all"], self.precision
        return (
            f"PlantedReport: {found.k} of {found.n} alive planted features were found, and {precision.k} of "
            f"{precision.n} alive trained features are planted ones"
        )

    def to_pandas(self) -> DataFrame:
        """The matches of trained (a) and planted (b) features as a DataFrame (`Matching.to_pandas`)."""
        return self.matching.to_pandas()

    def _repr_html_(self) -> str:
        kl = self.faithfulness["kl_of_hybrid"]
        of_hybrid = measurement_cell(vars(kl), "{:.1%}".format)
        shares = shares_table({"precision": {"all": self.precision}, "recall": {**self.recall, **self.recall_by_kind}})
        return tables_view(shares, (["KL(replacement) / KL(hybrid)"], [[of_hybrid]]))


def planted_test(
    base: ModelReference,
    traces: Sequence[Trace],
    held_out: Sequence[Trace],
    config: TrainingConfig | None = None,
    *,
    plant: PlantedSet | None = None,
    kl_documents: int = 200,
    progress: bool = True,
    **options: Any,
) -> PlantedReport:
    """Plant features in a base, train adapters on the pair, and report how many of them were recovered.

    Args:
        base: a model reference, as in `PairedModel.plant`.
        traces: training text, on which features are also calibrated.
        held_out: evaluation text; at least 100,000 tokens for features with firing rates of 1e-4.
        config: training options; None is the default.
        plant: planted features (`plant_features`); None makes them.
        kl_documents: the number of documents of ``held_out`` on which KL, NMSE and L0 are measured.
        progress: show a progress bar.
        options: keyword arguments of `plant_features`.

    Raises:
        PlantingError: features cannot be planted with these options; training raises its own errors.
        UserError: whatever `PairedModel.plant` and `measure_faithfulness` raise.
    """
    if plant is None:
        plant = plant_features(base, traces, **options)
    pair = PairedModel.plant(base, plant.adapters)
    adapters = train(pair, traces, config, progress=progress)
    matching = match_features(adapters, plant.adapters, pair, held_out)
    sums = measure_faithfulness(pair, held_out[:kl_documents])
    return PlantedReport(plant, adapters, matching, faithfulness_block(sums, "held out"))
