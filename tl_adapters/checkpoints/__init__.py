"""What is in a model's files, and which weights are these?

* `architectures`: the supported architectures, one record each, with all that differs between them
* `base_mlps`: the MLP weights of the base, and checks of their shapes
* `compatibility`: comparison of two configurations and vocabularies: what must match, and what may differ
* `device_map`: the parts of a model over several devices: a map checked, or made from the memory of this machine
* `fingerprints`: short content hashes of weights
* `hf_model`: a Hugging Face model from a folder or the hub: configuration read, files checked, weights loaded
* `hub_client`: calls of the Hugging Face hub, of which every failure becomes one error with a way out
* `layer_samples`: samples of weights that identify base and target, and their comparison across dtypes
* `model_checks`: checks that TransformerLens represents a model exactly: configuration, code and tensors
* `model_files`: a model's files: where they are, and single tensors out of their safetensors shards
* `model_reference`: a model given as folder, hub name or object, its name and its configuration
* `offloaded_weights`: weights of a model that is distributed over devices, of which some are read only for each use
* `tensor_fields`: names, dtypes, shapes and ranges that the tensors of a file should have, checked before use
* `tokenizers`: a tokenizer that gives the token ids of its tokenizer.json
"""
