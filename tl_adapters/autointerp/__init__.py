"""What is a feature called, and how well was that tested?

* `category_shares`: the share of each category among the features of a store, estimated from their labels
* `detection`: explains features with a language model, and scores the explanations by how well they detect firings
* `detection_tasks`: draws the examples that a feature is explained from, and the excerpts that test the explanation
* `endpoint`: asks many questions of an OpenAI-compatible chat endpoint, with retries, budgets and a cache
* `http_client`: sends one request to an OpenAI-compatible chat server and interprets the response
* `judge`: an LLM judge that sorts features into the paper's categories
* `prompts`: the prompts of the LLM judge, and features and excerpts as they appear in them
* `reply_cache`: replies of a model, cached on the disk by question and read as strict JSON
* `rule_labels`: labels of features by rules that need no model
* `secret_keys`: removes an API key from texts and log records, in every spelling
"""
