# make demo: install, pretrain on digits, evaluate.
# make test: install, run the tests but the slow ones.  make test-slow: the slow ones.  make test-long: more cases of some.
# make test WORKERS=8: in that many processes, such as one per core.
# make lint: ruff and mypy.  make bench: install the peers, run the benchmarks of the CPU (20 minutes), renew docs/performance.md.
# make bench BENCHMARKS=video: those of videos (4 minutes), or any others by name.
PYTHON ?= python3
VENV := .venv
WORKERS := 2
BENCHMARKS := augment step optimizer probe loader scaling startup
.PHONY: demo test test-slow test-long lint bench

$(VENV)/installed: pyproject.toml requirements.txt requirements-dev.txt $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: $(VENV)/installed
	$(VENV)/bin/self-supervised demo

test: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: $(VENV)/installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal -m slow

test-long: $(VENV)/installed
	LONG=5 $(VENV)/bin/python -m pytest tests/golden tests/training/test_resume.py tests/test_properties.py tests/training/test_memory.py \
		tests/training/test_launch.py tests/training/test_elastic.py tests/training/test_draws.py tests/training/test_ddp.py \
		tests/test_presets.py tests/training/test_advice.py tests/embeddings/test_embed.py tests/test_benchmarks.py

bench: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/requirements.txt
	for name in $(BENCHMARKS); do $(VENV)/bin/python -m benchmarks.$$name || exit 1; done
	$(VENV)/bin/python -m benchmarks.report

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
