"""Which features of a set of adapters do a behavior?

* `circuit`: `Circuit`, a file of the features that do a behavior, with their roles and effects
* `comparisons`: the parts of a study: necessity, sufficiency, transfer, corrections, mediation, dose, examples
* `conditions`: the named interventions of a study: removals, baselines and insertions, and the sets of features
* `control_strengths`: controls set to the circuit's own effect, write norm or harm on the select split
* `controls`: matched random features, most active other features, features in part, effects of neurons
* `criteria`: the thresholds of a hesitation circuit, and whether they are reached
* `dose_curves`: behavior left and harm elsewhere over the strength of every intervention
* `measurements`: what one condition does: probabilities and harm over given text, answers, corrections, mediation
* `onsets`: onsets of a behavior in a target's own text, matched control positions, and log-odds of the behavior
* `results_block`: the schema of the block "hesitation" of results.json, and blocks of an older schema upgraded
* `roles`: the role of each feature by formula: output, template, continuation, suppressor, bystander
* `search`: a greedy search for the features that make a target say a word, and `find_circuit`, from text to circuit
* `steering`: interventions that need no features: shifted logits, banned words, a steering vector, neurons, low rank
* `study`: `analyze_behavior` and `analyze_hesitation`, the whole study of a circuit
* `subject`: the problems of a study, and what can be checked in answers to them
"""
