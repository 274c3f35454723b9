"""Pairs whose difference is known, in several families, and what recipes find of it.

* `edited_neurons`: gated neurons of the base with other weights
* `families`: the families by name, and those that plant features of `plant_features`
* `learned_features`: features learned by gradient on the reasoning text
* `measurement`: what one recipe finds of one plant
* `plant`: a pair with its true features
* `recipes`: ways to train adapters, and baselines
* `related_features`: features that are active within another's tokens, and correlated ones
"""
