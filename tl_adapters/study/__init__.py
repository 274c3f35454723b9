"""The stages of a run, in order, each adding its block to results.json.

* `attribution`: The attribution stage of a study: graphs of a few onsets of hesitation
* `benchmark`: A run's pair on tasks: which variant of it answers, and what is written into the run's results.json
* `demo`: The demo: every stage of a study on the model organism
* `doctor`: Will this pair work here? Everything that would fail later, looked at before anything expensive
* `evaluate`: The stages of a study, each adding its block to a run folder's results.json
* `evaluation_stages`: The stages that measure adapters: faithfulness, behavior, baselines
* `features`: What a run's features are: collected, held against the target's neurons, labelled by rules, drawn as
* `grid`: Which runs does a grid of training options name? Every combination of its values, each a whole configuration
* `hesitation`: The stage hesitation of a study: a run's circuit, its page, and the block in results.json
* `label`: Naming a run's features: by rules always, by a judge and by tested explanations where asked for
* `open_run`: What a run folder or a configuration names, opened: the pair, its adapters, its documents
* `scale`: How much of everything a study does
* `sweep`: A sweep: sparsity against faithfulness, over the values of some training options
* `train`: The training stage of a study: a new run, a resumed run, and the stage that demo and sweep share
"""
