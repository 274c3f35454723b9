"""What is optimized, and the loop that does it.

* `loss_terms`: The five terms of the training objective as pure functions of tensors and masks (arXiv 2602.20904,
* `objective`: One training step's loss and gradient, twice: as the formulas read, and fast (arXiv 2602.20904,
* `run_folder`: What a training run keeps on disk, so that it can be killed at any moment and go on as if it had not
* `trackers`: Where the curves of a run go besides its metrics.jsonl: nowhere, TensorBoard, Weights & Biases or
* `trainer`: Training adapters: Adam on the five-term objective, one cut a step (arXiv 2602.20904, section 3.2 and
"""
