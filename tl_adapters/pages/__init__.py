"""How is it looked at? Self-contained HTML pages.

* `circuit_cells`: Figures of a circuit's page as cells and bars: numbers with their intervals, arms by name, gaps
* `circuit_diagram`: A circuit as a drawing: its features by role and layer, and the effects among them and on the
* `circuit_page`: hesitation.html of a run: the circuit drawn, and what was measured with it, arm by arm
* `circuit_sections`: What was measured with a circuit, arm by arm, as sections of its page; "" for what a block does
* `feature_pages`: A store of features as pages that open offline: an index of all of them, and a page to look at each
* `graph_page`: A graph into a folder: our own files, the page to look at, and the files of circuit-tracer's viewer
* `graph_viewer`: An attribution graph as one page that opens offline: nodes to click, links by sign and weight, pins
* `report`: report.html of a run: one self-contained page made from what the run wrote, and from nothing else
* `server`: A folder of pages on this machine's own address: 127.0.0.1, nothing above the folder, nothing that is no
* `sweep_page`: What a sweep found: its points, which of them no other beats, and both as a table and a page
"""
