"""What is a feature called, and how well was that tested?

* `detection`: Auto-interpretation: can a feature be described so that the description tells where it fires?
* `detection_examples`: Trials of a description: examples to describe a feature from, and excerpts of other documents
* `endpoint`: A client of any OpenAI-compatible chat endpoint: what is asked once is never asked again
* `http_client`: One request to an OpenAI-compatible chat server: its address, its key, and what its answer means
* `judge`: A judge sorts features into the paper's categories
* `prompts`: Features and stretches of documents as a judge reads them: JSON, in which no token can be mistaken for a
* `reply_cache`: Replies of a model: kept on the disk under what was asked, and read as strict JSON
* `rule_labels`: What features are called by rules that need no model
"""
