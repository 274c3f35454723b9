"""Which subcommands does the command line have? One file per subcommand or close family.

* `attribute`: an attribution graph of a prompt's next token
* `columns`: texts side by side in a terminal: wrapped, and marked where they part
* `common`: options that several subcommands share, and how their values are read
* `demo`: the whole study on the model organism
* `doctor`: checks of a pair before anything expensive
* `evaluate`: evaluate and benchmark: how faithful a run's adapters are, and how its routes answer tasks
* `features`: features and label: what a run's features fire on, and what they are called
* `generate`: what routes and changed features write after one prompt
* `hesitation`: find and test the circuit of a behavior
* `main`: the parser of all subcommands and the entry point; heavy libraries are imported when a subcommand runs
* `parsing`: how words become values: several words after one option, and numbers within bounds
* `result`: what a subcommand prints when it is done, and the command to run next
* `serve`: a folder's pages on this machine's own address
* `share`: export, push and pull: adapters for other tools and other people
* `train`: config, train, sweep and transcoders: options of a run, the run, runs over options, transcoders of a model
"""
