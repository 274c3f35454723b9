"""Which words count as hesitation: one list for each use, with the reason for it."""

HESITATION_WORDS = (
    "Wait", "Hmm", "Hm", "But", "Alternatively", "Actually", "However", "Maybe", "Perhaps", "Oops",
)  # fmt: skip
"""Words with which reasoning models interrupt themselves: features are labeled "hesitation" for them, the statistics
of features keep their logits, and the side-by-side view of answers marks them. "Hold", "Check" and "No" are left out,
because they mean something else as often."""
HESITATION_RATE_WORDS = ("wait",)
"""Words that the hesitation rate counts, in any case, where no others are given. The rate counts "wait" alone, as the
paper's does, because words such as "But" and "However" are also frequent in answers that do not hesitate."""
HESITATION_ONSET = "Wait"
"""The word whose onsets circuits and attribution graphs explain by default. It is looked up in the vocabulary, where
case matters: a circuit takes every spelling that is one token, the graphs of a study take this spelling."""
HIGHLIGHTED_WORDS = ("wait", "hmm")
"""Words that the report highlights in its example answers: those that are never part of an argument, unlike "But"."""
