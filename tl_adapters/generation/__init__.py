"""What does a model write after a prompt?

* `compare_variants`: What variants of one model say to the same prompt: its routes, and routes with features taken
* `completions`: What a model says after prompts: in batches, up to an end token, a limit, or a full context
* `decoding`: Tokens generated after a batch of prompts: each prompt's as if it were alone, whatever stands beside it
* `generation_config`: What a model says about its own answers: the tokens that end them, how tokens are drawn, how
* `likelihoods`: How likely a model finds texts: the log-probability of a continuation after a context, batched
* `responses`: Problems with checkable answers, solved by a model: its responses, and the traces made of them
"""
