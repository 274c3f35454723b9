"""The built-in pair: a small base and a reasoning-tuned target, their problems, and the recipe that makes both.

No hub can be reached from a test, and everybody deserves a result in minutes. The pair ships as two Hugging Face
folders (`BASE`, `TARGET`); `problems` and `reasoning_pairs` make as many held-out problems and training traces as
one likes. recipe.py trains the pair from nothing, or another like it: a second pair, on differences instead of sums,
and a null pair, whose target thinks but never hesitates. census.py counts what a pair really does.
"""

from pathlib import Path

from tl_adapters.organism.problem_set import KINDS, SPLITS, Kind, Problem, Split, problems
from tl_adapters.organism.traces import reasoning_pairs

PAIR = Path(__file__).parent / "pair"
BASE, TARGET = PAIR / "base", PAIR / "target"
BUILTIN_BASE, BUILTIN_TARGET = "tl_adapters built-in base", "tl_adapters built-in target"
BUILTIN = {BUILTIN_BASE: BASE, BUILTIN_TARGET: TARGET}
"""The names under which adapters and figures know the pair, wherever the package lies; every loader takes them."""

__all__ = ["BASE", "BUILTIN", "BUILTIN_BASE", "BUILTIN_TARGET", "KINDS", "PAIR", "SPLITS", "TARGET", "Kind", "Problem"]
__all__ += ["Split", "problems", "reasoning_pairs"]
