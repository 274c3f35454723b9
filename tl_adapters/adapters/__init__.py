"""What is an adapter, and how is it kept?

* `activation_functions`: Which features of an adapter are active: four activation functions, and how gradients pass
* `adapter_set`: The adapters of a model's layers as one set, with what their meaning needs, and its folder
* `feature_id`: A feature's name: its layer, its index, and, where it is known, the set of adapters that it belongs to
* `l0`: L0, the mean number of active features per token, counted in one place
* `saelens_folder`: The SAELens folder of one transcoder: cfg.json and sae_weights.safetensors, as SAELens 6 reads
* `transcoder`: The transcoder adapter of one layer (arXiv 2602.20904, section 3), with any of four activation
"""
