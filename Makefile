# make train    train a small LLaMA with GaLore on the embedded corpus
# make test     lint, type check, documentation, tests, doctests and notebooks
# make docs     the documentation as a site, in site/
# make notebooks   executes the notebooks with their full settings and keeps the outputs (NAMES picks some)
# All set up .venv first; a second call finds it ready. WORKERS processes run the tests. DEVICE=cuda or DEVICE=tpu picks the wheel.

PYTHON ?= python3
DEVICE ?= cpu
VENV ?= .venv
ARGS ?=
NAMES ?=
WORKERS ?= 2

bin := $(VENV)/bin
extras := $(if $(filter cpu,$(DEVICE)),,$(DEVICE))
comma := ,

ifeq ($(filter $(DEVICE),cpu cuda tpu),)
$(error DEVICE=$(DEVICE) is unknown: use DEVICE=cpu, DEVICE=cuda or DEVICE=tpu)
endif

.PHONY: train test test-slow lint docs notebooks format clean

train: $(VENV)/train-$(DEVICE).done
	$(bin)/python -m train $(ARGS)

test: $(VENV)/test-$(DEVICE).done lint docs
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

test-slow: $(VENV)/test-$(DEVICE).done
	$(bin)/python -m pytest -n $(WORKERS) --dist loadfile -m slow $(ARGS)

notebooks: $(VENV)/test-$(DEVICE).done
	OPENBLAS_NUM_THREADS=1 $(bin)/python -m notebooks.execute $(NAMES)

lint: $(VENV)/test-$(DEVICE).done
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy

docs: $(VENV)/test-$(DEVICE).done
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict

format: $(VENV)/test-$(DEVICE).done
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

clean:
	rm -rf $(VENV)

$(bin)/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON) here: run make PYTHON=... with one" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11: run make PYTHON=python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "error: $(PYTHON) cannot make a virtual environment: on Debian, apt install python3-venv" >&2; \
	  exit 1; }

$(VENV)/%-$(DEVICE).done: $(bin)/python pyproject.toml $(wildcard constraints/*.txt)
	$(bin)/python -m pip install --quiet --disable-pip-version-check \
	  --constraint "constraints/$$($(bin)/python -c 'import sys; print("python-3.11" if sys.version_info < (3, 12) else "python-3.12")').txt" \
	  --editable ".[train$(if $(filter test,$*),$(comma)test)$(if $(extras),$(comma)$(extras))]"
	@touch $@ $(VENV)/train-$(DEVICE).done
