# Two commands: `make demo` shows the main job, `make test` runs the tests. Python 3.10+ is all they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

.PHONY: demo test test-slow test-versions test-kernels lint format clean

demo: $(VENV)/installed
	$(RUN) demo.py

test: $(VENV)/installed-test
	$(RUN) -m pytest -n $(WORKERS)

# Longer tests: compiled decoding, learning runs, processes that talk to each other.
test-slow: $(VENV)/installed-test
	$(RUN) -m pytest -n $(WORKERS) -m slow

# The model's own tests on the oldest transformers that pyproject.toml allows, on one that the engines pin, and on the
# newest in the package index, whichever that is today.
TRANSFORMERS := 5.6.0 5.19.0 newest
test-versions: $(TRANSFORMERS:%=test-transformers-%)

test-transformers-%: $(VENV)-transformers-%/installed
	$(VENV)-transformers-$*/bin/python -c "import transformers; print('transformers', transformers.__version__)"
	$(VENV)-transformers-$*/bin/python -m pytest -n $(WORKERS) tests/unit tests/contract tests/parity

# GPU kernels without a GPU: in Triton's interpreter, then through its compiler. Triton is a download of 285 MB.
test-kernels: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-deps triton==3.9.0
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels
	$(RUN) -m pytest -m slow tests/kernels

lint: $(VENV)/installed
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check

format: $(VENV)/installed
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(RUN) -m pip install --quiet -r requirements-test.txt
	touch $@

.PRECIOUS: $(VENV)-transformers-%/installed
$(VENV)-transformers-%/installed: requirements-versions.txt
	$(PYTHON) -m venv $(VENV)-transformers-$*
	$(VENV)-transformers-$*/bin/python -m pip install --quiet -r requirements-versions.txt \
		$(if $(filter newest,$*),--upgrade transformers,transformers==$*)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-transformers-* .pytest_cache .ruff_cache .hypothesis
