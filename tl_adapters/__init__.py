"""tl_adapters: what did reasoning training change inside this model? Transcoder adapters for TransformerLens.

`load` opens a base and its reasoning-tuned target with their adapters as one TransformerLens model, whatever the source
(the authors' checkpoint, a set on the hub, a run), and `train` learns adapters of a `PairedModel`. `EXPORTS` lists all
public names with their modules.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

EXPORTS = {
    "ablated": "interventions.feature_edits",
    "ablation_effects": "attribution.validation",
    "AdapterSet": "adapters.adapter_set",
    "added": "interventions.feature_edits",
    "Agreement": "evaluation.agreement",
    "analyze_behavior": "circuits.study",
    "analyze_hesitation": "circuits.study",
    "attach": "models.attach",
    "attached": "models.attach",
    "attribute": "attribution.attribute",
    "AttributionGraph": "attribution.graph",
    "authors_pair": "interop.authors_checkpoint",
    "auto_interpret": "autointerp.detection",
    "Behavior": "evaluation.behaviors",
    "BehaviorStudy": "circuits.study",
    "benchmark_run": "study.benchmark",
    "BenchmarkResult": "study.benchmark",
    "BenchmarkVariant": "study.benchmark",
    "build_model": "models.build",
    "builtin_subject": "circuits.subject",
    "CategoryShare": "autointerp.category_shares",
    "Circuit": "circuits.circuit",
    "CircuitComparison": "circuits.circuit",
    "CircuitFeature": "circuits.circuit",
    "clamped": "interventions.feature_edits",
    "collect_features": "features.collect",
    "colored_tokens": "utils.notebook",
    "DataConfig": "config",
    "detach": "models.attach",
    "DifferenceExplanation": "attribution.validation",
    "DifferenceTarget": "attribution.targets",
    "DocumentSums": "evaluation.faithfulness",
    "draw_circuit": "pages.circuit_diagram",
    "draw_graph": "pages.graph_diagram",
    "encode_traces": "data.chat_format",
    "Endpoint": "autointerp.endpoint",
    "EndpointUsage": "autointerp.endpoint",
    "explain_difference": "attribution.validation",
    "Feature": "features.feature",
    "FeatureFactors": "interventions.variants",
    "FeatureId": "adapters.feature_id",
    "FeatureStore": "features.store",
    "FeatureTarget": "attribution.targets",
    "find_circuit": "circuits.search",
    "find_onsets": "circuits.onsets",
    "FoundCircuit": "circuits.search",
    "from_authors": "interop.authors_checkpoint",
    "from_saelens": "interop.saelens",
    "frozen": "interventions.frozen",
    "generate_variants": "generation.compare_variants",
    "GraphPaths": "pages.graph_page",
    "HarnessModel": "evaluation.lm_eval_harness",
    "hesitation_tokens": "data.words",
    "inserted": "interventions.feature_edits",
    "InterpretationReport": "autointerp.detection",
    "judge": "autointerp.judge",
    "JudgeReport": "autointerp.judge",
    "Label": "features.feature",
    "label_by_rules": "autointerp.rule_labels",
    "label_shares": "autointerp.category_shares",
    "LayerAgreement": "features.stream_agreement",
    "load": "study.by_name",
    "load_hf_model": "checkpoints.hf_model",
    "load_problems": "evaluation.tasks",
    "load_traces": "study.by_name",
    "LocalConfig": "config",
    "LogitTarget": "attribution.targets",
    "LossWeights": "config",
    "matched_features": "circuits.controls",
    "Matching": "evaluation.feature_matching",
    "measure_agreement": "evaluation.agreement",
    "measure_faithfulness": "evaluation.faithfulness",
    "measure_transcoders": "local_stage.transcoders",
    "most_active_others": "circuits.controls",
    "negated": "interventions.feature_edits",
    "NotebookView": "utils.notebook",
    "only": "interventions.feature_edits",
    "Onsets": "circuits.onsets",
    "opened_engine": "interop.vllm_run",
    "PairCheck": "evaluation.pair_check",
    "PairedModel": "models.paired_model",
    "patched": "interventions.feature_edits",
    "plant_features": "evaluation.planted_features",
    "planted_test": "evaluation.planted_recovery",
    "PlantedReport": "evaluation.planted_recovery",
    "PlantedSet": "evaluation.planted_features",
    "Problems": "evaluation.tasks",
    "prune": "attribution.pruning",
    "PrunedGraph": "attribution.pruning",
    "pull": "interop.hub",
    "push_to_hub": "interop.hub",
    "RecordTable": "utils.notebook",
    "respond": "generation.responses",
    "Response": "generation.responses",
    "RunConfig": "config",
    "sampled_kl": "evaluation.sampled_kl",
    "SampledKL": "evaluation.sampled_kl",
    "scaled": "interventions.feature_edits",
    "search_circuit": "circuits.search",
    "SearchOptions": "circuits.search",
    "seed_agreement": "evaluation.feature_matching",
    "ServedRun": "interop.vllm_run",
    "shifted_logits": "circuits.steering",
    "show_attention": "features.notebook_view",
    "show_features": "features.notebook_view",
    "SignalToNoise": "local_stage.signal_to_noise",
    "StoreOptions": "features.store_description",
    "stream_agreement": "features.stream_agreement",
    "StudyOptions": "circuits.study",
    "Subject": "circuits.subject",
    "summed_influence": "attribution.summed_influence",
    "to_authors": "interop.authors_checkpoint",
    "to_saelens": "interop.saelens",
    "total_effects": "attribution.validation",
    "Trace": "data.traces",
    "traces_of": "generation.responses",
    "train": "training.trainer",
    "train_local": "local_stage.train_local",
    "train_transcoders": "local_stage.transcoders",
    "Trainer": "training.trainer",
    "TrainingConfig": "config",
    "TranscoderAdapter": "adapters.transcoder",
    "TranscoderFit": "local_stage.transcoders",
    "UserError": "errors",
    "Variant": "interventions.variants",
    "VariantCompletions": "generation.compare_variants",
    "with_options": "config",
    "write_feature_pages": "pages.feature_pages",
    "write_graph": "pages.graph_page",
    "write_hybrid": "interop.hybrid_checkpoint",
}
"""Public name -> module that defines it. A name is imported when it is first asked for, because torch and
transformer_lens take seconds: `import tl_adapters` and `tl-adapters --help` need neither."""

RENAMED = {"Behaviour": "Behavior", "analyze_behaviour": "analyze_behavior", "find_moments": "find_onsets"}
"""Names of the first release, and what they are called now. They still work, with a FutureWarning."""

__all__ = sorted(EXPORTS)

if TYPE_CHECKING:
    from tl_adapters.adapters.adapter_set import AdapterSet as AdapterSet
    from tl_adapters.adapters.feature_id import FeatureId as FeatureId
    from tl_adapters.adapters.transcoder import TranscoderAdapter as TranscoderAdapter
    from tl_adapters.attribution.attribute import attribute as attribute
    from tl_adapters.attribution.graph import AttributionGraph as AttributionGraph
    from tl_adapters.attribution.pruning import PrunedGraph as PrunedGraph
    from tl_adapters.attribution.pruning import prune as prune
    from tl_adapters.attribution.summed_influence import summed_influence as summed_influence
    from tl_adapters.attribution.targets import DifferenceTarget as DifferenceTarget
    from tl_adapters.attribution.targets import FeatureTarget as FeatureTarget
    from tl_adapters.attribution.targets import LogitTarget as LogitTarget
    from tl_adapters.attribution.validation import DifferenceExplanation as DifferenceExplanation
    from tl_adapters.attribution.validation import ablation_effects as ablation_effects
    from tl_adapters.attribution.validation import explain_difference as explain_difference
    from tl_adapters.attribution.validation import total_effects as total_effects
    from tl_adapters.autointerp.category_shares import CategoryShare as CategoryShare
    from tl_adapters.autointerp.category_shares import label_shares as label_shares
    from tl_adapters.autointerp.detection import InterpretationReport as InterpretationReport
    from tl_adapters.autointerp.detection import auto_interpret as auto_interpret
    from tl_adapters.autointerp.endpoint import Endpoint as Endpoint
    from tl_adapters.autointerp.endpoint import EndpointUsage as EndpointUsage
    from tl_adapters.autointerp.judge import JudgeReport as JudgeReport
    from tl_adapters.autointerp.judge import judge as judge
    from tl_adapters.autointerp.rule_labels import label_by_rules as label_by_rules
    from tl_adapters.checkpoints.hf_model import load_hf_model as load_hf_model
    from tl_adapters.circuits.circuit import Circuit as Circuit
    from tl_adapters.circuits.circuit import CircuitComparison as CircuitComparison
    from tl_adapters.circuits.circuit import CircuitFeature as CircuitFeature
    from tl_adapters.circuits.controls import matched_features as matched_features
    from tl_adapters.circuits.controls import most_active_others as most_active_others
    from tl_adapters.circuits.onsets import Onsets as Onsets
    from tl_adapters.circuits.onsets import find_onsets as find_onsets
    from tl_adapters.circuits.search import FoundCircuit as FoundCircuit
    from tl_adapters.circuits.search import SearchOptions as SearchOptions
    from tl_adapters.circuits.search import find_circuit as find_circuit
    from tl_adapters.circuits.search import search_circuit as search_circuit
    from tl_adapters.circuits.steering import shifted_logits as shifted_logits
    from tl_adapters.circuits.study import BehaviorStudy as BehaviorStudy
    from tl_adapters.circuits.study import StudyOptions as StudyOptions
    from tl_adapters.circuits.study import analyze_behavior as analyze_behavior
    from tl_adapters.circuits.study import analyze_hesitation as analyze_hesitation
    from tl_adapters.circuits.subject import Subject as Subject
    from tl_adapters.circuits.subject import builtin_subject as builtin_subject
    from tl_adapters.config import DataConfig as DataConfig
    from tl_adapters.config import LocalConfig as LocalConfig
    from tl_adapters.config import LossWeights as LossWeights
    from tl_adapters.config import RunConfig as RunConfig
    from tl_adapters.config import TrainingConfig as TrainingConfig
    from tl_adapters.config import with_options as with_options
    from tl_adapters.data.chat_format import encode_traces as encode_traces
    from tl_adapters.data.traces import Trace as Trace
    from tl_adapters.data.words import hesitation_tokens as hesitation_tokens
    from tl_adapters.errors import UserError as UserError
    from tl_adapters.evaluation.agreement import Agreement as Agreement
    from tl_adapters.evaluation.agreement import measure_agreement as measure_agreement
    from tl_adapters.evaluation.behaviors import Behavior as Behavior
    from tl_adapters.evaluation.faithfulness import DocumentSums as DocumentSums
    from tl_adapters.evaluation.faithfulness import measure_faithfulness as measure_faithfulness
    from tl_adapters.evaluation.feature_matching import Matching as Matching
    from tl_adapters.evaluation.feature_matching import seed_agreement as seed_agreement
    from tl_adapters.evaluation.lm_eval_harness import HarnessModel as HarnessModel
    from tl_adapters.evaluation.pair_check import PairCheck as PairCheck
    from tl_adapters.evaluation.planted_features import PlantedSet as PlantedSet
    from tl_adapters.evaluation.planted_features import plant_features as plant_features
    from tl_adapters.evaluation.planted_recovery import PlantedReport as PlantedReport
    from tl_adapters.evaluation.planted_recovery import planted_test as planted_test
    from tl_adapters.evaluation.sampled_kl import SampledKL as SampledKL
    from tl_adapters.evaluation.sampled_kl import sampled_kl as sampled_kl
    from tl_adapters.evaluation.tasks import Problems as Problems
    from tl_adapters.evaluation.tasks import load_problems as load_problems
    from tl_adapters.features.collect import collect_features as collect_features
    from tl_adapters.features.feature import Feature as Feature
    from tl_adapters.features.feature import Label as Label
    from tl_adapters.features.notebook_view import show_attention as show_attention
    from tl_adapters.features.notebook_view import show_features as show_features
    from tl_adapters.features.store import FeatureStore as FeatureStore
    from tl_adapters.features.store_description import StoreOptions as StoreOptions
    from tl_adapters.features.stream_agreement import LayerAgreement as LayerAgreement
    from tl_adapters.features.stream_agreement import stream_agreement as stream_agreement
    from tl_adapters.generation.compare_variants import VariantCompletions as VariantCompletions
    from tl_adapters.generation.compare_variants import generate_variants as generate_variants
    from tl_adapters.generation.responses import Response as Response
    from tl_adapters.generation.responses import respond as respond
    from tl_adapters.generation.responses import traces_of as traces_of
    from tl_adapters.interop.authors_checkpoint import authors_pair as authors_pair
    from tl_adapters.interop.authors_checkpoint import from_authors as from_authors
    from tl_adapters.interop.authors_checkpoint import to_authors as to_authors
    from tl_adapters.interop.hub import pull as pull
    from tl_adapters.interop.hub import push_to_hub as push_to_hub
    from tl_adapters.interop.hybrid_checkpoint import write_hybrid as write_hybrid
    from tl_adapters.interop.saelens import from_saelens as from_saelens
    from tl_adapters.interop.saelens import to_saelens as to_saelens
    from tl_adapters.interop.vllm_run import ServedRun as ServedRun
    from tl_adapters.interop.vllm_run import opened_engine as opened_engine
    from tl_adapters.interventions.feature_edits import ablated as ablated
    from tl_adapters.interventions.feature_edits import added as added
    from tl_adapters.interventions.feature_edits import clamped as clamped
    from tl_adapters.interventions.feature_edits import inserted as inserted
    from tl_adapters.interventions.feature_edits import negated as negated
    from tl_adapters.interventions.feature_edits import only as only
    from tl_adapters.interventions.feature_edits import patched as patched
    from tl_adapters.interventions.feature_edits import scaled as scaled
    from tl_adapters.interventions.frozen import frozen as frozen
    from tl_adapters.interventions.variants import FeatureFactors as FeatureFactors
    from tl_adapters.interventions.variants import Variant as Variant
    from tl_adapters.local_stage.signal_to_noise import SignalToNoise as SignalToNoise
    from tl_adapters.local_stage.train_local import train_local as train_local
    from tl_adapters.local_stage.transcoders import TranscoderFit as TranscoderFit
    from tl_adapters.local_stage.transcoders import measure_transcoders as measure_transcoders
    from tl_adapters.local_stage.transcoders import train_transcoders as train_transcoders
    from tl_adapters.models.attach import attach as attach
    from tl_adapters.models.attach import attached as attached
    from tl_adapters.models.attach import detach as detach
    from tl_adapters.models.build import build_model as build_model
    from tl_adapters.models.paired_model import PairedModel as PairedModel
    from tl_adapters.pages.circuit_diagram import draw_circuit as draw_circuit
    from tl_adapters.pages.feature_pages import write_feature_pages as write_feature_pages
    from tl_adapters.pages.graph_diagram import draw_graph as draw_graph
    from tl_adapters.pages.graph_page import GraphPaths as GraphPaths
    from tl_adapters.pages.graph_page import write_graph as write_graph
    from tl_adapters.study.benchmark import BenchmarkResult as BenchmarkResult
    from tl_adapters.study.benchmark import BenchmarkVariant as BenchmarkVariant
    from tl_adapters.study.benchmark import benchmark_run as benchmark_run
    from tl_adapters.study.by_name import load as load
    from tl_adapters.study.by_name import load_traces as load_traces
    from tl_adapters.training.trainer import Trainer as Trainer
    from tl_adapters.training.trainer import train as train
    from tl_adapters.utils.notebook import NotebookView as NotebookView
    from tl_adapters.utils.notebook import RecordTable as RecordTable
    from tl_adapters.utils.notebook import colored_tokens as colored_tokens


def __getattr__(name: str) -> Any:
    if name in RENAMED:
        warnings.warn(f"tl_adapters.{name} is now tl_adapters.{RENAMED[name]}.", FutureWarning, stacklevel=2)
        name = RENAMED[name]
    if name in EXPORTS:
        return getattr(importlib.import_module(f"tl_adapters.{EXPORTS[name]}"), name)
    raise AttributeError(f"tl_adapters has no {name!r}. Its public names are {', '.join(EXPORTS)}.")


def __dir__() -> list[str]:
    return sorted([*EXPORTS, "__version__"])
