# Two commands do everything on a machine with Python >= 3.11, git and make:
#   make demo   install, then measure how well the bundled model remembers
#   make test   install, then pass the tests
# A torch that the system's Python already has is used; otherwise TORCH names what pip installs.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test compiled figures page probe slow gpu clean

demo: $(VENV)/.package
	$(BIN)/gdn2-eval run --model gdn2-tiny --tasks niah-paper --lengths 256,512,1k,2k --samples 100 --budget 48 --out results
	$(BIN)/gdn2-eval tables --runs results
	$(BIN)/gdn2-eval plot --runs results --out results/figures

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 -q
	$(BIN)/ruff check .
	$(BIN)/mypy

figures: $(VENV)/.package
	$(BIN)/gdn2-eval plot --runs results/zoo $(patsubst %,--log %,$(wildcard gdn2/zoo/*/training.jsonl)) --out results/zoo --format png \
	    --only accuracy,depth-niah_single_3,retrieved-niah_multikey_1,training
	$(BIN)/gdn2-eval tables --runs results/zoo --published none --out results/zoo/table.md

page: $(VENV)/.dev
	$(BIN)/gdn2-eval report --runs results/zoo --out results/figures/report.html
	$(BIN)/python tests/evalsuite/browser.py results/figures/report.html results/zoo/report.png

# Minutes; a model added to PROBED is drawn against the others in results/zoo/probe/probes.png.
PROBED := gdn2 kda
probe: $(VENV)/.package
	for model in $(PROBED); do \
		$(BIN)/gdn2-eval probe --model $$model --task niah_multikey_1 --length 1k --samples 40 --budget 48 \
			--device cpu --format png --out results/zoo/probe || exit; \
	done

# Every kernel for three generations of GPUs, without one: minutes.
compiled: $(VENV)/.dev
	$(BIN)/python -m pytest -m slow -n 2 -q tests/gdn2/kernels/test_triton_aot.py

slow: $(VENV)/.dev
	$(BIN)/python -m pytest -m "slow and not gpu" -q

gpu: $(VENV)/.dev
	$(BIN)/python -m pytest -m gpu -q

$(VENV)/.torch: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python >= 3.11 is needed; name one with make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv --system-site-packages $(VENV)
	@# A virtual environment's own packages are not its children's: look from inside the new one.
	@$(BIN)/python -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null \
	|| { $(PYTHON) -m venv --clear $(VENV) && $(BIN)/python -m pip install -q "$(TORCH)"; }
	@touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q -e ".[dev]"
	@touch $@ $(VENV)/.package

clean:
	rm -rf $(VENV) results/figures results/tables results/runs
