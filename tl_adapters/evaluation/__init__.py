"""How faithful are adapters, how does the model behave, and is what was found true?

* `baselines`: baselines for the KL of adapters: swapped neurons, and the MLP difference at low rank
* `behaviors`: A behavior of a model: what it is, where it is in a text, and how often an answer shows it
* `faithfulness`: KL, NMSE and L0 of replacements and partial replacements (arXiv 2602.20904, section 4.1)
* `feature_matching`: one-to-one matching of the features of two adapter sets
* `lm_eval_harness`: Our routes as a model of EleutherAI's lm-evaluation-harness (the extra ``lm-eval``), so that its
* `math_equality`: Are two mathematical expressions equal? math-verify says so, within a time that is bounded in
* `planted_features`: planted features: made for a base model with a known meaning, active at chosen rates
* `planted_recovery`: a test of adapters with a known answer: how many planted features training recovers
* `response_metrics`: Behaviour: problems with checkable answers, solved by any model; accuracy, length and
* `sampled_answers`: Problems answered by a model as it is: drawn answers kept batch by batch, and figures with
* `tasks`: Problems with known answers from the hub: which they are, how they are asked, and how an answer is checked
"""
