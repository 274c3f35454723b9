"""How much do features and input tokens contribute to a token that the model is about to generate?

* `attribute`: attribution graphs: from a token's logit back to the features and input tokens that contribute to it
* `gradient`: gradient times activation by autograd, with the sources and targets of `relp`, for comparison and tests
* `graph`: an attribution graph: nodes, sparse edges and weights, saved as safetensors and JSON
* `provenance`: which models and adapters a graph was made with, and the check that a pair is the same
* `pruning`: influence, pruning and scores of attribution graphs, as in circuit-tracer, on sparse edges
* `relp`: the linearized replacement model of one prompt (RelP, arXiv 2508.21258)
* `rows`: the rows of a graph, computed in batches, ranked by influence, and assembled into the graph
* `summed_influence`: the influence of every feature on a token, summed over the graphs of many prompts
* `targets`: the targets of a graph: a logit, a difference of two logits, or a feature
* `validation`: graphs compared with interventions in the model, and the difference between replacement and hybrid
"""
