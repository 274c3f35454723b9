"""Which helpers do all packages share that know nothing of models?

* `arguments`: Checks of the sequences that users pass to public functions
* `bootstrap`: Bootstrap intervals of ratios and means over documents
* `clustered_intervals`: Intervals of shares, differences and rates of items that are clustered in documents
* `devices`: The device that models run on: one by name, or the best that this machine has
* `files`: The one place where files are written, renamed and removed: whole or not at all, and under locks
* `html`: HTML building blocks: escaping, tables, cells with confidence intervals, templates and a page frame
* `measurement`: Types of measured values with their confidence intervals
* `notebook`: HTML views for notebooks: circuitsvis components that work offline, colored tokens, drawings, data frames
* `precision`: Sums and logits in float32 or wider, whatever the dtype and the device of the model
* `printing`: Text for a terminal, in which control characters and invisible characters are visible
* `reading`: Readers of text, JSON, YAML and safetensors files with one kind of error, and the base of checked records
* `renamed`: Old names of attributes of public classes and of arguments, which still work and warn
* `results`: results.json: one block per stage of a run, with versions and seconds
* `share_intervals`: Closed-form intervals of shares and counts of independent items
* `strict_json`: JSON without NaN and infinities; the error names the key of the first one
"""
