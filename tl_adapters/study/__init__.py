"""Which stages does a run have? Each adds its block to results.json.

* `attribution`: attribution: graphs of a few onsets of hesitation, and their validation
* `benchmark`: benchmarks: a variant of the pair answers tasks, and results.json gets the scores
* `by_name`: adapters and documents by one name, whoever made them: a pair, a run folder, traces
* `demo`: the demo: every stage of a study on the model organism
* `doctor`: checks of a pair, its data and this machine, before anything expensive
* `evaluate`: the evaluation of a run: every stage after training, each adding its block to results.json
* `evaluation_stages`: evaluation stages of a study: faithfulness, behavior and baselines, each a block of results.json
* `features`: features: collected, compared with the target's neurons, labeled by rules, drawn as pages
* `grid`: the configurations of a grid of training options: one for every combination of its values
* `hesitation`: the stage hesitation of a run: its circuit, the page, and the block in results.json
* `label`: labels: by rules always, by an LLM judge and by scored explanations on request
* `open_run`: opens what a run folder or a configuration names: the pair, its adapters, its documents
* `run_size`: the size of a study, and estimated memory, disk space and time of a training run, stage by stage
* `sweep`: sweeps: sparsity against faithfulness over the values of some training options
* `train`: training: a new run, a resumed run, the stage that demo and sweep share, transcoders of one model
"""
