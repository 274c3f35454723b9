"""What does a model write after a prompt?

* `cached_passes`: Forward passes over new tokens only, with a model's key-value cache
* `compare_variants`: Completions of one prompt by several variants of a model
* `completions`: Completions of prompts: `complete`, with all options of sampling and batching
* `decoding`: The decoding loop over one batch of prompts
* `direct_attention`: Attention of one new token per row, from weights and cached keys and values
* `direct_bridge`: The decoding steps of a TransformerBridge, without its components where only MLPs are hooked
* `direct_layers`: The layers of a HookedTransformer in a decoding step, without their modules where nothing is hooked
* `generation_config`: Defaults that come with the model: end tokens, sampling parameters, limit
* `likelihoods`: Log-probabilities of given continuations after contexts
* `responses`: Responses to problems whose answers can be checked, and traces made from them
* `sampling`: The choice of the next token: greedy, or drawn by temperature, top_p and top_k
"""
