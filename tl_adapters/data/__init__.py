"""From documents to batches of tokens.

* `batching`: From documents to the batches of a run, in an order that is a pure function of seed and step
* `chat_format`: Conversations become traces: the target's own chat format, thinking kept, regions marked
* `hesitation_words`: which words count as hesitation: one list for each use, with the reason for it
* `sources`: Where documents come from: a jsonl file or a dataset of the hub, read in an order that can be taken up
* `tokens`: The text of tokens: of one token, of a span, and the single token of a text
* `traces`: Traces and batches: token ids, which region of a trace each belongs to, and what counts
* `words`: words in a vocabulary and in text: the tokens that spell a word, and the pattern that finds it
"""
