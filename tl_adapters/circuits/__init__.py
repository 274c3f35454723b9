"""Which features do a behavior?

* `banned_words`: A model that may not say a behavior's words: tokens are banned, and of a phrase one token right
* `circuit`: A circuit as an artefact: which features of one set of adapters do a behaviour, in which role, and with
* `control_strengths`: Baselines as strong as they can be: set on the select split to do at the onsets what the
* `controls`: What a circuit is held against: other features that are active where it is, and cheaper ways to stop a
* `criteria`: What a circuit of hesitation is asked for, and whether this one does it: bars set before anything was
* `find`: From a target's own text to its circuit: moments, search, roles, edges
* `measurements`: A circuit on trial: what the model does without it and with it, in probabilities and in what it says
* `onsets`: Where a target does what is studied: moments in its own text, boundaries where it might have and did not
* `results_block`: the schema of the block "hesitation" of results.json, and blocks of an older schema upgraded
* `roles`: What each feature does for a word, by formula: output, template, continuation, suppressor, bystander
* `search`: Which features make a target say a word: a greedy search that asks for necessity and sufficiency at once
* `steering`: Interventions that need no features: shifted logits, a steering vector, ablated neurons
* `study`: The hesitation circuit: found, split, and tested by intervention (section 5 of arXiv 2602.20904)
* `subject`: What a behaviour is studied on: problems for choosing, others for reporting, and what can be checked in
"""
