"""What does the model do without a feature, or with more of it?

* `feature_edits`: context managers that change feature activations: ablation, scaling, clamping, patching, insertion
* `frozen`: holding activations fixed during an intervention, for mediation analysis and direct effects
* `variants`: named ways to run a pair: routes, and routes with features ablated, rescaled, inserted or negated
"""
