"""How faithful are adapters, how does the model behave, and is what was found true?

* `baselines`: What an adapter's KL is worth: simpler stand-ins for the MLP difference, from the same run
* `behaviors`: A behavior of a model: what it is, where it is in a text, and how often an answer shows it
* `faithfulness`: How faithfully adapters stand in for what training changed (arXiv 2602.20904, section 4.1)
* `feature_matching`: Which features of two adapter sets are the same? What training found of what was planted, and
* `lm_eval_harness`: Our routes as a model of EleutherAI's lm-evaluation-harness (the extra ``lm-eval``), so that its
* `math_equality`: Are two mathematical expressions equal? math-verify says so, within a time that is bounded in
* `planted_features`: When can adapters be trusted? A test with a known answer
* `response_metrics`: Behaviour: problems with checkable answers, solved by any model; accuracy, length and
* `sampled_answers`: Problems answered by a model as it is: drawn answers kept batch by batch, and figures with
* `tasks`: Problems with known answers from the hub: which they are, how they are asked, and how an answer is checked
"""
