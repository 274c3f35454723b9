"""What does each feature fire on, and what does it write?

* `collect`: Reading features off documents: one forward pass each, everything counted on the way
* `feature`: What is known of one feature: the records that pages, labels and exports read
* `firing_counts`: What is counted of a batch's firings: how often, where, how strongly; and which of them are kept
* `layer_statistics`: Statistics of features over some documents, and how those of several sets of documents become
* `logit_effects`: What features do to the logits directly: the row they write, through the final norm's weight and
* `notebook_view`: Where features fire in a text of one's own, in a notebook; what one of them is it shows itself
* `store`: The feature store: what was collected of every feature, with what it was collected on
* `store_files`: What a feature store's folder holds, and what it was read on
* `stream_agreement`: On whose residual stream are features read, and does it matter?
"""
