"""How do conversations become batches of tokens?

* `batching`: the batches of a run, in an order that depends on the seed and the step alone
* `chat_format`: the target's chat format: conversations become documents and traces, with the thinking kept
* `chat_template`: a chat template: rendering with a fixed date, its thinking tags, the token that ends a turn
* `columns`: how the columns of a row become a conversation, and what happens to rows that cannot be used
* `conversations`: conversations, the fields that hold a turn's thinking, and documents
* `documents`: a source's documents as traces: training windows, held-out documents, a survey, fingerprints
* `hesitation_words`: which words count as hesitation: one list for each use, with the reason for it
* `sources`: where conversations come from: a .jsonl file, a dataset of the hub, or pairs in memory
* `template_differences`: where documents differ from the chat template's own rendering of a conversation
* `tokens`: the text of tokens: of one token, of a span, and the single token of a text
* `trace_regions`: the region of a trace that each token belongs to: template, question, thinking, answer, ...
* `traces`: traces and batches: token ids, the region of each position, and the positions that count
* `words`: words in a vocabulary and in text: the tokens that spell a word, and the pattern that finds it
"""
