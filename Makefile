# The words for people and for CI; each makes the environment that it needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
RESULTS := runs/benchmarks.json
GATED := runs/benchmarks-gate.json
BROWSERS := chromium chromium-browser google-chrome

.PHONY: help quickstart test check bench bench-gate trials clean browser

help:
	@echo "make quickstart   the whole loop on real pictures: runs/quickstart/report.html"
	@echo "make test         unit, house and integration tests"
	@echo "make check        format, lint, types, house rules"
	@echo "make bench        benchmarks: runs/benchmarks.md, and what differs from the baseline"
	@echo "make bench-gate   those of seconds: fails where a stable ratio regressed"
	@echo "make trials       long chaos, soak and fuzz runs"
	@echo "make clean        remove the environment and what tools leave behind"

quickstart: $(STAMP)
	$(BIN)/mmicl quickstart --output runs/quickstart

test: $(STAMP) browser
	$(BIN)/python -m pytest -q -n auto tests/house tests/unit
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not bench and not trial and not alone" \
		tests/integration tests/trials
	$(BIN)/python -m pytest -m "alone and not trial" tests/integration tests/trials

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/house

# All of them are measured anew; the page and the comparison are also of benchmarks that failed.
bench: $(STAMP)
	rm -f $(RESULTS)
	$(BIN)/python -m pytest -m bench -s --timeout=0 --record $(RESULTS) tests/benchmarks; passed=$$?; \
	$(BIN)/python -m tests.benchmarks.page $(RESULTS) runs/benchmarks.md && \
	$(BIN)/python -m tests.benchmarks.compare $(RESULTS) && exit $$passed

bench-gate: $(STAMP)
	rm -f $(GATED)
	$(BIN)/python -m pytest -q -m gate --record $(GATED) tests/benchmarks
	$(BIN)/python -m tests.benchmarks.compare --quick $(GATED)

trials: $(STAMP)
	$(BIN)/python -m pytest -m trial -s --timeout=0

# Tests open pages in it. Where there is none and it cannot be installed, these are skipped and say so.
browser:
	@for name in $(BROWSERS); do command -v $$name > /dev/null && exit; done; \
	{ test "$$(id -u)" = 0 && apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq -y --no-install-recommends chromium > /dev/null; } \
	|| echo "No Chromium is here, nor could it be installed: tests that open pages are skipped."

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

# Editable, so that an edit needs no second installation; the stamp comes last, so that a broken
# installation is made again. pip would compile what it installs on one core, and our own files not at all; a
# few that packages bring along are templates, which do not compile.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[backbone,captions,corpus,nlp,tensorboard,wandb,mlflow,test,check]'
	$(BIN)/python -m compileall -q -j 0 $(VENV)/lib mmicl_core pipelines tests > $(VENV)/compiled.txt 2>&1 || true
	touch $(STAMP)
