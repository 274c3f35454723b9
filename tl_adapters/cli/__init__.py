"""The command line: one file per subcommand or close family.

* `attribute`: The subcommand attribute
* `benchmark`: The subcommand benchmark
* `columns`: Texts side by side in a terminal: wrapped, marked where they part, and safe to print whatever they hold
* `common`: What the verbs share: the options with one meaning everywhere, and what is made of them
* `demo`: The subcommand demo
* `doctor`: The subcommand doctor
* `evaluate`: The subcommand evaluate
* `features`: The verbs that look at a run: features, label, attribute, hesitation, serve
* `generate`: The verbs that run a model: generate, benchmark
* `hesitation`: The subcommand hesitation
* `main`: The command line. Nothing heavy is imported until a verb runs
* `serve`: The subcommand serve
* `share`: The verbs that give a run away and get one: export, push, pull
* `sweep`: The subcommand sweep
* `train`: The verbs that make and measure a run: demo, doctor, config, train, sweep, evaluate
"""
