"""How do base, target and adapters share one TransformerLens model?

* `adapter_checks`: Do these adapters belong to this model and this base, and what must they be fed here?
* `attach`: Adapters in a model that the user already has: a HookedTransformer, SAELens's HookedSAETransformer, a
* `attention_masks`: A HookedTransformer that reads the token ids it is given, and masks only what it is told to
* `backend`: What a TransformerLens model must answer to carry a pair, whichever of the two kinds it is
* `build`: The seam to TransformerLens: the two kinds of model that can carry a pair, behind one set of questions
* `fused_attention`: Fused attention for a HookedTransformer: fast while nobody looks at scores or patterns, stock
* `hooked_transformer`: A HookedTransformer made of a Hugging Face model's own weights, and its MLPs as routed ones
* `model_samples`: Which model is this? Samples of every weight of a model, and which of them are not those of another
* `output_agreement`: Does a model of TransformerLens compute what the Hugging Face model that it was made of
* `output_comparison`: Two outputs that should be the same: how far they may be apart, and what is said where they
* `paired_model`: PairedModel: one TransformerLens model that computes the target, the hybrid and the replacement
* `recorded_outputs`: What a Hugging Face model computes on a few tokens, recorded before TransformerLens reads or
* `routed_mlp`: What one layer computes: the target's MLP or the base's, with or without the adapter
* `transformer_bridge`: A TransformerBridge's MLPs as routed ones, and parts of it run alone (TransformerLens 3.9 and
"""
