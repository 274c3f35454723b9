"""Which subcommands does the command line have? One file per subcommand or close family.

* `attribute`: an attribution graph of a prompt's next token
* `benchmark`: answers to tasks, with pass@1, length and hesitation rate
* `columns`: texts side by side in a terminal: wrapped, marked where they part, and safe to print whatever they hold
* `common`: options that several subcommands share, and how their values are read
* `demo`: the whole study on the model organism
* `doctor`: checks of a pair before anything expensive
* `evaluate`: a run's adapters measured on held-out traces
* `features`: features and label: what a run's features fire on, and what they are called
* `generate`: what routes and changed features write after one prompt
* `hesitation`: find and test the circuit of a behavior
* `main`: the parser of all subcommands and the entry point; heavy libraries are imported when a subcommand runs
* `serve`: a folder's pages on this machine's own address
* `share`: export, push and pull: adapters for other tools and other people
* `sweep`: sparsity against faithfulness over training options
* `train`: config and train: the options of a run, and the run itself
"""
