"""How faithful are adapters, how does the model behave, and is what was found true?

* `agreement`: how far two adapter sets of one pair agree, as features and as subspaces, beside chance
* `baselines`: baselines for the KL of adapters: swapped neurons, and the MLP difference at low rank
* `behaviors`: A behavior of a model: what it is, where it is in a text, and how often an answer shows it
* `faithfulness`: KL, NMSE and L0 of replacements and partial replacements (arXiv 2602.20904, section 4.1)
* `feature_matching`: one-to-one matching of the features of two adapter sets
* `lm_eval_harness`: A model class for lm-evaluation-harness (the extra `lm-eval`)
* `math_equality`: Equality of two mathematical expressions by math-verify, within a bounded time
* `pair_check`: a first look at a pair with adapters: logits, KL, L0, memory
* `planted_features`: planted features: made for a base model with a known meaning, active at chosen rates
* `planted_recovery`: a test of adapters with a known answer: how many planted features training recovers
* `response_metrics`: Accuracy, length and hesitation rate of responses, with intervals over problems
* `sampled_kl`: KL of a replacement over long texts, from the probabilities of sampled tokens alone
* `sampled_responses`: Responses sampled several times per problem, written batch by batch, and the score of a task
* `tasks`: Problems with known answers from the hub, and how their answers are checked
"""
