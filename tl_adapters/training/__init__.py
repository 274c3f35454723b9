"""What does training optimize, and how does a run proceed?

* `adapter_adam`: Adam on adapters, on their own weights or in the coordinates of the local stage
* `end_to_end_stage`: the end-to-end stage: Adam on the five-term objective, one cut per step
* `kl_divergence`: KL divergence per token from logits or residual streams, in chunks
* `loss_terms`: the NMSE and sparsity terms of the objective as functions of tensors and masks
* `metrics`: where a run's metrics are written: the progress bar, the .jsonl files and the tracker
* `not_finite`: where a training step is not finite: the first activation or gradient that is NaN or infinite
* `objective`: loss and gradient of one training step, in a reference version and a fast one
* `run_folder`: the folder of a run, from which a run that was killed at any time resumes
* `stop_signals`: Ctrl-C and SIGTERM during training: the run stops between two steps
* `trackers`: trackers that draw the curves of a run: TensorBoard, Weights & Biases or Trackio
* `trainer`: a training run: its stages one after another, training states, and how it stops and resumes
* `training_state`: a saved training state: how it is written, and checked before a run continues from it
"""
