"""What is in a model's files, and which weights are these?

* `architectures`: Which models are supported, and what of them TransformerLens represents
* `base_mlps`: A model as a user gives it, a folder, a hub name or one in memory: its config, its name, and a base's
* `compatibility`: Do base and target fit together? What must match, what may differ, and what a difference means
* `fingerprints`: Which weights were these? Short content hashes, so that files of one model are never used with
* `layer_samples`: By what adapters know their target and base again: content, not names; in memory and in files
* `model_files`: Model checkpoints as files: where they are, and single tensors out of their safetensors shards
* `tokenizers`: Which token ids does a text have? A tokenizer that gives those of its tokenizer.json, and a model
"""
