"""What does the model do without a feature, or with more of it?

* `feature_edits`: Changing features while the model runs: what it does without them, with more of them, with those
* `frozen`: What an intervention still reaches while the rest of the model is held as it was: for mediation and
* `variants`: Variants of one model: its routes, and routes with features removed, rescaled or inserted
"""
