"""Plumbing that knows nothing of models: files, numbers, pages.

* `arguments`: Sequences that users pass to public functions, checked in one place before anything walks through them
* `confidence_intervals`: Figures with 95 % confidence intervals. The document or problem is the unit that is drawn,
* `devices`: Where models go: a device that is named, or the best that this machine has
* `file_hashes`: SHA-256 of files, computed once: large files are remembered by path, size and times, as a build
* `files`: Write all of it or nothing: to a temporary name beside the goal, then rename; and one process in a folder
* `finite`: NaN and infinity stop where they come in: in weights as they are read, and in activations as they are
* `html`: Small pieces of pages: escaped text, tables, line plots as SVG, and the page around them. They know no
* `kl_divergence`: KL divergence per token, from logits or from residual streams, without holding all logits at once
* `notebook`: Views for notebooks: circuitsvis pages that work offline, and tokens colored by their values
* `plots`: Line plots as SVG
* `precision`: Sums and logits that are exact enough in every dtype and on every device
* `results`: results.json: what a run measured, one block per stage, with the versions and seeds it was measured with
* `strict_json`: JSON that every reader can read: a number that is not finite stops at the writer, which names its key
"""
