"""Which helpers do all packages share that know nothing of models?

* `arguments`: Checks of the sequences that users pass to public functions
* `bootstrap`: Bootstrap intervals of ratios and means over documents
* `clustered_intervals`: Intervals of shares, differences and rates of items that are clustered in documents
* `devices`: The device that models run on: one by name, or the best that this machine has
* `file_hashes`: SHA-256 of files; those of large files are remembered between runs
* `files`: Atomic writes of files and folders, and a lock on a folder
* `finite`: Checks that weights and activations hold neither NaN nor infinity
* `html`: Small pieces of pages: escaped text, tables, line plots as SVG, and the page around them. They know no
* `kl_divergence`: KL divergence per token from logits or residual streams, in chunks
* `measurement`: Types of measured values with their confidence intervals
* `notebook`: Views for notebooks: circuitsvis pages that work offline, and tokens colored by their values
* `plots`: Line plots as SVG
* `precision`: Sums and logits in float32 or wider, whatever the dtype and the device of the model
* `results`: results.json: one block per stage of a run, with versions and seconds
* `share_intervals`: Closed-form intervals of shares and counts of independent items
* `strict_json`: JSON without NaN and infinities; the error names the key of the first one
"""
