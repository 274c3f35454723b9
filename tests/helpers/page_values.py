"""What pages show: a circuit with its block of results.json, and the whole results.json of a run of two layers."""

import math
from typing import Any

from helpers.stores import HOSTILE

from tl_adapters.adapters.feature_id import FeatureId
from tl_adapters.circuits.circuit import Circuit, CircuitEdge, CircuitFeature, Role

ROLES: tuple[Role, ...] = ("template", "output", "output", "continuation", "suppress")


def made(fingerprint: str = "aaaa", n: int = 10, words: tuple[str, ...] = (" Wait",)) -> Circuit:
    """Roles and layers in turn; the first feature's contrast is NaN."""
    features = []
    for i in range(n):
        role, size = ROLES[i % 5], 0.1 * (i + 1)
        total = -size if role == "suppress" else size
        id = FeatureId(i % 4, i)
        features.append(
            CircuitFeature(id, role, total / 2, total / 4, total, total / 8, math.nan if i == 0 else size, size)
        )
    ids = [f.id for f in features]
    edges = [CircuitEdge(ids[1], None, 0.5)] + ([CircuitEdge(ids[0], ids[1], -0.2)] if n else [])
    return Circuit(
        "hesitation", words, tuple(features), 1.5, "select",
        {"adapters": fingerprint, "target": "t", "base_mlps": "b"}, 40, 4, 0.05, tuple(edges),
    )  # fmt: skip


def figure(value: float, unit: str = "share") -> dict[str, Any]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value, "n": 9, "unit": unit, "split": "report"}


def record(rate: float) -> dict[str, Any]:
    ci = {
        k: {"low": 0.9 * v, "high": 1.1 * v}
        for k, v in (("accuracy", 0.8), ("length", 99), ("hesitation_per_1k", rate))
    }
    return {
        "n": 1200, "accuracy": 0.8, "length": 99.0, "hesitation_per_1k": rate, "truncated": 0.01, "think_opened": 1.0,
        "ci": ci, "split": "report", "accuracy_without_slip": figure(0.9), "accuracy_with_slip": None,
        "hesitation_cut": figure(1 - rate / 20), "length_change": figure(-0.2), "accuracy_change": figure(0.01),
        "draws": 3,
    }  # fmt: skip


def dose_curves() -> dict[str, Any]:
    """Curves of every intervention, with names and units of others among them."""

    def points(harm: float, left: float, unit: str) -> list[dict[str, Any]]:
        return [
            {
                "factor": f, "size": 12.5 * f, "unit": unit, "behavior_left": figure(1 - (1 - left) * f / 2),
                "kl_elsewhere": figure(harm * f, "nats per token"), "corrected": figure(0.8 - 0.3 * f / 2),
            }
            for f in (0.5, 1.0, 2.0)
        ]  # fmt: skip

    names = ("circuit", "random", "others", "neurons", "steering", "logit_bias", "low_rank", HOSTILE)
    curves = {name: points(2.0 ** (i - 9), 0.1 * i, HOSTILE if i > 6 else "features") for i, name in enumerate(names)}
    return {"unchanged": {"p_onset": figure(0.8), "corrected": figure(0.8)}, "curves": curves}


def whole_block() -> dict[str, Any]:
    places = {"moment": figure(0.4), "boundary": figure(math.nan), "elsewhere": figure(0.001)}
    return {
        "behaviour": "hesitation", "words": ["Wait", "</script><b>"], "page": "hesitation.html",
        "moments": {s: {"documents": 300, "moments": 410, "boundaries": 1234} for s in ("select", "report")},
        "circuit": {
            "n": 10, "output": 4, "template": 2, "continuation": 2, "suppress": 2, "share_of_alive": 0.03,
            "share_of_all": 0.01, "share_of_activation": 0.1, "times_l0": 1.3, "distinct_directions": 7,
            "strength": 1.5, "by_layer": [3, 3, 2, 2], "alive": 333, "threshold": 0.05,
        },
        "probabilities": {
            "target": places,
            "replacement - circuit": {**places, "kl_elsewhere": figure(0.0213, "nats per token")},
            "replacement, steering": {"kl_elsewhere": figure(0.0417, "nats per token")},
            HOSTILE: {"moment": None},
        },
        "other_words": {"replacement": {"moment": figure(0.1), "boundary": figure(0.2)}},
        "necessity": {
            a: record(r) for a, r in (
                ("none", 20.0), ("output", 8.0), ("template", 11.0), ("circuit", 1.0), ("random", 19.0), ("ban", 0.0),
                ("steering", 5.0), ("neurons", math.nan),
            )
        },
        "sufficiency": {
            a: record(r) for a, r in (
                ("none", 1.0), ("output", 5.0), ("circuit", 5.0), ("circuit_at_strength", 25.0), ("b_dec_only", 1.0)
            )
        },
        "transfer": {"none": record(20.0), "negated": record(3.0)},
        "injected": {"none": figure(0.7), "circuit": figure(0.1)},
        "mediation": {"total": figure(1.1, "nats"), "through_output": figure(0.9, "nats"), "share": figure(0.8)},
        "dose_curves": dose_curves(),
        "dose": [
            {"n": n, "hesitation_per_1k": figure(20 / n), "p_moment": 0.4 / n, "p_inserted": math.nan}
            for n in (1, 2, 5, 10)
        ],
        "smallest": {"n": 5, "cut": 0.8},
        "kinds": {"none": {"correction": 4, "re-check": 3}, "circuit": {"correction": 0, "re-check": 1}},
        "sampled": {"none": record(18.0), "circuit": record(2.0)},
        "controls": {
            "circuit": {"setting": "10 features", "size": 10, "unit": "features", "p_onset_before": 0.8,
                        "p_onset": 0.1, "kl_elsewhere": 0.02, "reached": True, "write_norm": 1.0},
            "steering": {"setting": f"after layer 2, {HOSTILE}", "size": 1.75, "unit": HOSTILE, "p_onset_before": 0.8,
                         "p_onset": 0.3, "kl_elsewhere": None, "reached": False},
        },
        "injected_more": {"others": figure(0.25), HOSTILE: None},
        "suppressors": {"n": 2, "ids": ["0.4"], "p_boundary_before": figure(0.1), "p_boundary_after": figure(0.2)},
        "bystanders": {"n": 1, "ids": ["2.2"], "p_before": figure(0.8), "p_after": figure(0.79)},
        "criteria": [{"name": "cut by both", "value": figure(0.95), "bar": ">= 50 %", "reached": True},
                     {"name": "random", "value": 0.05, "bar": 0.1, "reached": False}],
    }  # fmt: skip


EXAMPLES = [{"question": "47+85=? <b>", "replacement": f"132. Wait, {HOSTILE}", "both taken out": "132."}]


def whole_results() -> dict[str, Any]:
    """The content of results.json after every stage, for two layers."""
    each_layer = lambda n=2: [figure(0.1 * (i + 1)) for i in range(n)]  # noqa: E731
    rate = {**record(20.0), "split": "report", "think_opened": 0.9}
    judged = {"count": 3, "weighted": figure(0.3), "share": figure(0.3)}
    curve = {"n": [5, 10], "keeping": [0.1, 0.2], "removing": [0.9, 0.8]}
    return {
        "schema_version": 1,
        "seconds": {"train": 42.0},
        "pair": {"base": "org/base", "target": "org/target", "n_layers": 2, "d_model": 8, "recipe": "ab12"},
        "train": {"steps": 150, "tokens": 9000, "seconds": 42.5, "n_features": 40},
        "seeds": [0],
        "versions": {"python": "3.11", "torch": "2.6"},
        "faithfulness": {
            "kl": {"hybrid": figure(0.6), "replacement": figure(0.1)}, "kl_of_hybrid": figure(0.2),
            "kl_first": each_layer(), "kl_last": each_layer(), "kl_only": each_layer(),
            "partial_of_full": {"first": each_layer(), "last": each_layer(), "only": each_layer()},
            "nmse": each_layer(3), "nmse_all_tokens": each_layer(3), "nmse_without_position_0": each_layer(3),
            "l0": each_layer(), "l0_all_tokens": each_layer(), "dead": [0, 3], "top1_agreement": figure(0.9),
            "tokens": {"response": 1000, "all": 2000},
        },
        "baselines": {"n": [2, 3], "rows": [{"name": "rank 1", "kl": figure(0.2)}], "rank_for_same_kl": 16},
        "behaviour": {
            **dict.fromkeys(("base", "target", "hybrid", "replacement"), rate),
            "recovered": {"hybrid": figure(0.98), "base": figure(0.97)},
        },
        "features": {
            "total": 80, "alive": 70, "tokens": 9000, "stream": "replacement", "split": "report",
            "agreement": [{"layer": i, "overlap": figure(0.8), "kept": figure(0.9)} for i in range(2)],
            "labels": {"input": {"weighted": figure(0.6)}, "output": {"weighted": figure(0.3)}},
            "neurons": {"total": 64, "alive": 60, "per_token": 4, "labels": {"input": {"weighted": figure(0.5)}}},
            "page": "features/pages/index.html",
        },
        "labels": {
            "judge": {
                "judged": 9, "alive": 70, "model": "judge-1", "agreement": figure(0.8), "shares": {"input": judged}
            },
            "detection": {
                "model": "judge-1", "features": {"score": figure(0.8)}, "neurons": {"score": figure(0.6)}
            },
        },
        "attribution": {
            "graphs": 1, "split": "report", "conservation": 1e-6, "rank_correlation": {"relp": 0.4, "gradient": None},
            "moments": [{
                "page": "graphs/moment-1.html", "prompt": "47+85=?", "word": "Wait", "probability": 0.6,
                "influence_through_features": 0.3, "curve": {"relp": curve},
                "difference": dict.fromkeys(
                    ("hybrid", "features", "decoder_biases", "unexplained", "replacement"), 1.5
                ),
            }],
        },
        "hesitation": whole_block(),
    }  # fmt: skip


METRICS = [
    {"step": step, "output_kl": 0.1, "forward_bridge": 0.1, "backward_bridge": 0.0, "nmse": 0.03, "l0": [9.0, 8.0]}
    for step in (10, 20)
]
ANSWERS = [{"question": "47+85=?", "target": "<think>Wait, 132.</think>", "hybrid": "132", "replacement": "132."}]
SWEEP = {
    "config": {"base": "org/base", "target": "org/target"},
    "grid": {"l1_weight": [1, 2]},
    "behaviour": {"target": {"accuracy": 0.9}},
    "points": [
        {
            "name": f"p{i}", "options": {"l1_weight": i, "activation": "relu"}, "l0": {**figure(2.0 + i), "seeds": [0]},
            **{k: {**figure(0.5), "seeds": [0]} for k in ("kl", "kl_hybrid", "kl_of_hybrid", "nmse", "recovered")},
            "features": 80, "alive": 70, "tokens": 9000,
        }
        for i in range(2)
    ],
}  # fmt: skip
