"""What does each feature fire on, and what does it write?

* `collect`: collects statistics and examples of all features into a store, in one pass over documents
* `document_batches`: groups documents into parts and batches, with the region, decile and domain of every token
* `example_selection`: selects the strongest and random firings of each feature, with the activations around them
* `feature`: the records that describe one feature: statistics, examples, logit effects and label
* `firing_counts`: running counts of firings by feature, trace region, decile of the thinking, domain and size
* `firing_reader`: reads which features fire on a batch of tokens, on the replacement's or the target's residual stream
* `layer_records`: feature records and table columns, read from the statistics of one layer
* `layer_statistics`: the statistics of one layer's features, as tensors
* `logit_effects`: direct effects of features on the logits
* `notebook_view`: views of a text in a notebook: colored by feature activations, and its attention by heads
* `store`: the feature store, from which records, tables and labels are read
* `store_description`: the options of a feature store, and the models and documents that it was collected on
* `store_files`: the files of a feature store's folder
* `store_parts`: statistics over some of the documents, and how those of several sets of documents are merged
* `stream_agreement`: how often features fire alike on the target's and on the replacement's residual stream
"""
