"""Functions that answer the prompts of the judge by a rule."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from tl_adapters.autointerp.endpoint import Messages
from tl_adapters.autointerp.prompts import JUDGE_CATEGORIES


def shown(messages: Messages) -> Any:
    return json.loads(messages[1]["content"])


def fired(excerpts: list[list[Any]]) -> list[str]:
    return [piece["fires"] for excerpt in excerpts for piece in excerpt if isinstance(piece, dict)]


def knowing(messages: Messages) -> str:
    """Explains a unit by the text on which it fires most often, and detects that text."""
    given = shown(messages)
    if "numbered excerpts" in messages[0]["content"]:
        wanted = json.loads(given["fires"].removeprefix("fires on "))
        return json.dumps({"fires": [e["number"] for e in given["excerpts"] if e["token"] == wanted]})
    (text, _), *_ = Counter(fired(given["excerpts"])).most_common()
    if "explanation" in messages[0]["content"]:
        return json.dumps({"explanation": f"fires on {json.dumps(text)}"})
    category = list(JUDGE_CATEGORIES)[len(text) % len(JUDGE_CATEGORIES)]
    return json.dumps({"category": category, "label": f"fires on {json.dumps(text)}", "reason": "it does"})
