"""How are adapters, features and graphs exchanged with other tools?

* `any_set`: adapters in any form that this package reads, by their name
* `authors_checkpoint`: Reads and writes the replacement-model checkpoints of the paper's authors
* `circuit_tracer`: Attribution graphs as files that circuit-tracer's viewer and Neuronpedia read
* `circuit_tracer_features`: Feature files of circuit-tracer's viewer, single or packed
* `export`: Exports the adapters of a run, with their measurements, to the formats of other tools
* `hub`: Upload and download of adapter sets on the Hugging Face hub, with a model card
* `hybrid_checkpoint`: The hybrid model as a Hugging Face checkpoint: the target with the base's MLPs
* `licenses`: The licenses of base, target and data, as their own cards state them
* `model_card`: The model card of an adapter set, as the Hugging Face hub displays it
* `neuronpedia`: A feature store as the files of a Neuronpedia upload
* `sae_dashboard`: Feature pages made by the sae-dashboard package
* `saelens`: Conversion of adapter sets to and from SAELens transcoders
* `vllm_checkpoint`: The folder that vLLM serves a run from, with every route and feature set
* `vllm_engine`: Completions by vLLM, in this process or at the address of a server
* `vllm_run`: vLLM for the adapters of a run, with a model for every variant
"""
