"""The model organism: a small base and a reasoning-tuned target, their problems, and the recipe that trains both.

It ships with the package, so that tests need no hub and a whole study takes minutes. Base and target are two Hugging
Face folders (`BASE`, `TARGET`); `problems` and `reasoning_pairs` generate any number of held-out problems and training
traces. recipe.py trains the pair from scratch, and others like it: a second pair, on differences instead of sums, and a
null pair, whose target thinks but never hesitates. census.py counts slips, corrections and hesitations of a pair.
"""

from pathlib import Path

from tl_adapters.organism.problem_set import KINDS, SPLITS, Kind, Problem, Split, problems
from tl_adapters.organism.traces import reasoning_pairs

PAIR = Path(__file__).parent / "pair"
BASE, TARGET = PAIR / "base", PAIR / "target"
BUILTIN_TEXT = "the model organism's text"
"""Name of the data that adapters of the built-in pair are trained on, where they name a data set."""
BUILTIN_BASE, BUILTIN_TARGET = "tl_adapters built-in base", "tl_adapters built-in target"
BUILTIN = {BUILTIN_BASE: BASE, BUILTIN_TARGET: TARGET}
"""Names of base and target that do not depend on where the package is installed -> folder; every loader takes them."""

__all__ = ["BASE", "BUILTIN", "BUILTIN_BASE", "BUILTIN_TARGET", "BUILTIN_TEXT", "KINDS", "PAIR", "SPLITS", "TARGET"]
__all__ += ["Kind", "Problem", "Split", "problems", "reasoning_pairs"]
