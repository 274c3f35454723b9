"""How do base, target and adapters share one TransformerLens model?

* `adapter_checks`: whether adapters were trained with this target and base, and the scale of their input
* `attach`: adapters put into a TransformerLens model that the user already has, and taken out again
* `backend`: the interface that a TransformerLens model must offer to carry a pair
* `build`: a TransformerLens model made of a Hugging Face model, and the backend of an existing one
* `components`: attention, norms and unembedding of a HookedTransformer in fewer passes, where no hook looks inside
* `finite_activations`: checks that activations hold neither NaN nor infinity
* `hf_outputs`: what the Hugging Face models compute on a few tokens, recorded before TransformerLens changes them
* `hooked_transformer`: HookedTransformer as a backend, made of a Hugging Face model's own weights
* `output_agreement`: whether a TransformerLens model computes what its Hugging Face model computes
* `output_comparison`: the tolerance within which two outputs agree, and the error where they do not
* `paired_model`: PairedModel, one TransformerLens model that computes the target, the hybrid and the replacement
* `routed_mlp`: what one layer computes: the target's MLP or the base's, with or without the adapter
* `routed_model`: a TransformerLens model with a route per layer, and parts of it run alone
* `transformer_bridge`: TransformerBridge as a backend
* `weight_identity`: samples of a model's weights, and the comparison that tells one model from another

Four questions decide whether models and adapters belong together, and each is answered in one place:

1. Can TransformerLens represent the model exactly? `checkpoints.model_checks`.
2. Do configurations and tensor shapes fit? `checkpoints.compatibility`, and `checkpoints.base_mlps` for the tensors.
3. Are these the weights that the adapters were trained with? `adapter_checks` for models in memory and `study.doctor`
   for files; both compare by `weight_identity`.
4. Do outputs agree? `hf_outputs` compares a Hugging Face model in memory with the stock model of its class, and
   `output_agreement` compares the TransformerLens model with the Hugging Face model; both by `output_comparison`.
"""
