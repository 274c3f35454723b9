"""How does vLLM serve target, hybrid, replacement and changed feature sets from one engine?

vLLM loads this package by its entry point; it imports neither transformer_lens nor sae_lens.

* `models`: The model classes that vLLM loads, one per architecture, and what they refuse
* `registration`: The entry point, which tells vLLM the names of the model classes
* `served_conditions`: The conditions of an exported folder, as its config.json describes them
* `served_mlp`: The MLP of a layer, which runs every token through the parts that its condition names
* `worker`: The method by which vLLM's workers define a condition while the engine runs
"""
