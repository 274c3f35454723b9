"""What is an adapter, and how is it kept?

* `activation_functions`: four activation functions of features, and how gradients pass them
* `active_features`: the pass of an adapter over its active features alone, for training on a CPU
* `adapter_set`: the adapters of a model's layers as one set
* `feature_id`: the name of a feature: layer, index and, where known, the set of adapters it belongs to
* `file_hashes`: SHA-256 of files; those of large files are remembered between runs
* `finite_weights`: a check that weights hold neither NaN nor infinity
* `l0`: L0, the mean number of active features per token
* `metadata`: the models that adapters belong to, what they read and write, and how they were trained
* `saelens_folder`: the SAELens folder of one transcoder: cfg.json and sae_weights.safetensors
* `set_folder`: the folder of an adapter set and its description, written, read and verified
* `transcoder`: the transcoder adapter of one layer, and the norms of its decoder rows
"""
