"""What does a token owe to features and input tokens?

* `attribute`: From a token the model is about to say back to the features and input tokens that made it: RelP
* `gradient`: Gradient times activation by autograd, with the same leaves and targets as `linear`: to compare, and to
* `graph`: An attribution graph: what each target owes to each source, sparse, and on disk as safetensors and JSON
* `pruning`: Which nodes and edges of an attribution graph matter? circuit-tracer's influence, pruning and scores,
* `relp`: The replacement on one prompt as a linear model: RelP's backward pass by hand (arXiv 2508.21258;
* `targets`: What is attributed: a logit, a difference of logits, or a feature, and the prompt's tokens
* `validation`: Does a graph say the truth? Held against interventions in the real, nonlinear model; and what diffing
"""
