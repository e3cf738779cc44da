# make demo: install, pretrain on digits, evaluate.  make test: install, run all tests (test-long: with more cases).
# make lint: ruff.
PYTHON ?= python3
VENV := .venv
.PHONY: demo test test-long lint

$(VENV)/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/python demo.py

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest

test-long: $(VENV)/installed
	LONG=5 $(VENV)/bin/python -m pytest tests/test_resume.py tests/test_properties.py tests/test_memory.py

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
