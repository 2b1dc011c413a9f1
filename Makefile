# `make` lists what there is. Needed: make, Python >= 3.11, and for the site's JavaScript npm (fetched when missing).
SHELL := /bin/bash
BIN := .venv/bin
READY := .venv/.ready
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export PYTHONUTF8 := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lab docs readme bench measure clean

help:  ## list the targets
	@grep -E '^[a-z]+: .*##' Makefile | sed -E 's/:[^#]*## /\t/' | expand -t 10

setup: $(READY)  ## make .venv with everything in it, once

$(READY): settings.ini setup.py pyproject.toml
	@python=""; for p in python3 python3.11 python3.12 python3.13 python3.14; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$p; break; fi; done; \
	if [ -z "$$python" ]; then echo "sarfm needs Python 3.11 or newer; none found (looked for python3, python3.11 ... python3.14)" >&2; exit 1; fi; \
	echo "sarfm: setting up .venv with $$($$python --version); the first time it fetches several GB"; \
	[ -x $(BIN)/python ] || $$python -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]'
	@$(BIN)/python -m ipykernel install --sys-prefix --name python3 --display-name "Python 3 (sarfm)" >/dev/null
	@touch $(READY)

demo: export SARFM_DATA := $(CURDIR)/.sarfm-data
demo: setup  ## pretrain, fine-tune and compare on the embedded real scene: minutes on two cores
	@$(BIN)/sarfm run pretrain --out demo/pretrain
	@$(BIN)/sarfm run finetune -p pretrained=demo/pretrain -p 'contestants=["pretrained", "scratch", "unet"]' \
	    -p rates.scratch=0.003 -p rates.unet=0.003 -p 'fractions=[0.33, 1.0]' -p 'seeds=[0, 1, 2]' --out demo/finetune
	@$(BIN)/python -c 'from sarfm.runs.index_page import write_index; write_index("demo")'
	@printf '\n%s\n  %s\n' "Done. Open in a browser (no network needed):" "$(CURDIR)/demo/index.html"

test: setup  ## everything that must hold; ONLY="lint docs" runs the steps of these names
	@$(BIN)/python tests/steps.py $(ONLY)

soak: setup  ## the fault matrix in its long form: hundreds of kills, thousands of damaged files, and what takes minutes
	@PATH="$(CURDIR)/$(BIN):$$PATH" SARFM_SOAK=1 MPLBACKEND=agg OMP_NUM_THREADS=1 \
	    $(BIN)/pytest -n 2 --dist worksteal -rs --durations 20 -m "row or soak" tests

lab: setup  ## JupyterLab with the notebooks
	@$(BIN)/jupyter lab --notebook-dir nbs

docs: setup  ## build the site into _docs/html
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python docs/fetch_assets.py
	@$(BIN)/sphinx-build -q -W --keep-going -c docs -b html nbs _docs/html
	@echo "the site: $(CURDIR)/_docs/html/index.html"

readme: setup  ## make README.md from nbs/index.ipynb
	@$(BIN)/python docs/readme.py

bench: setup  ## measure what the design promises into bench.json, beside the libraries of the extra [bench]
	@$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev,bench]'
	@$(BIN)/python tests/bench.py bench.json

measure: setup  ## lines, grain, parameters and imports of the house; REV="2e75a2e HEAD" compares revisions
	@$(BIN)/python tests/measure_house.py $(REV:%=--rev %)

clean:  ## remove what was built; .venv and data stay
	rm -rf _docs build dist demo bench.json test-results .pytest_cache .ruff_cache .import_linter_cache
	find nbs sarfm tests docs -name __pycache__ -o -name .ipynb_checkpoints | xargs -r rm -rf
