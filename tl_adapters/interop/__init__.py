"""How do other tools and other people see adapters?

* `authors_checkpoint`: The checkpoints of the paper's authors: a whole replacement model as one Hugging Face
* `circuit_tracer`: Attribution graphs as files that circuit-tracer's viewer and Neuronpedia read
* `export`: What of a run is given away: its adapters with the figures that were measured, in the format asked for
* `hub`: Adapters on the Hugging Face hub: one commit up, one whole folder down, and a card that says what they are
* `hybrid_checkpoint`: The hybrid as a checkpoint of its own: the target with the base's MLPs, as a plain Hugging
* `model_card`: The model card of a set of adapters, as the hub shows it
* `neuronpedia`: A store of features as the files that Neuronpedia takes in
* `sae_dashboard`: Dashboards by sae-dashboard, for those who know features by that page
* `saelens`: Sets of adapters to and from SAELens
"""
