"""How is one layer's adapter trained by itself, on the difference of the two MLPs?

* `encoder_fit`: the encoder of one feature, fitted to the activations that it should have
* `feature_polish`: encoders fitted again, one at a time, to what the other features leave
* `feature_revision`: merging of features that split one, births of missing ones, removal of useless ones
* `layer_run`: the local stage of one layer, step by step
* `layer_tokens`: the tokens by which features are revised, their activations, and what they leave
* `local_layer`: one layer's adapter in whitened coordinates, its local objective and its optimizer
* `regression_data`: inputs and wanted outputs of every layer: the difference of a pair's MLPs, or a model's own MLP
* `schedules`: factors of the learning rate and of the sparsity term's weight by step, for both stages
* `signal_to_noise`: how large the difference of the two MLPs is beside their rounding errors
* `stage`: the local stage of all layers, which are trained side by side
* `token_buffer`: the tokens that the stage trains on, and the batches that they are read from
* `train_local`: the local stage alone, in memory
* `transcoders`: transcoders of a model's own MLPs, and how much of the MLPs' output they explain
* `whitening`: mean and covariance of a layer's inputs, and the coordinates in which a layer is trained
"""
