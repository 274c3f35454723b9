"""How are the results of a run displayed? Self-contained HTML pages.

* `circuit_diagram`: A circuit as an SVG drawing: its features by role and layer, and the effects among them
* `circuit_page`: The page hesitation.html of a run: the circuit, its measurements and example answers
* `circuit_sections`: The measurements of a circuit as sections of its page, with their cells and bars
* `dose_curve_plots`: The dose curves of a circuit as two plots: behavior left, and errors corrected, against harm
* `feature_pages`: HTML pages of a feature store that open offline: an index, and pages that show each feature
* `graph_diagram`: The most influential part of an attribution graph as an SVG diagram, for notebooks
* `graph_page`: Writes an attribution graph to a folder: the saved graph, its HTML page, and circuit-tracer's files
* `graph_viewer`: The interactive HTML page of an attribution graph
* `navigation`: The links in the head of every page to the other pages of its run
* `plots`: Line and point plots as inline SVG, drawn without pyplot
* `report`: The page report.html of a run: the answer to its question, measurements as tables and plots, example answers
* `report_head`: The first screen of the report: sentences, one prompt answered by every model, headline figures
* `server`: A local HTTP server for a folder of pages
* `sweep_page`: The points of a sparsity sweep, their Pareto front, and both as a table and a page
"""
