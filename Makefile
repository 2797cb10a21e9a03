# Two commands: `make demo` shows the main job, `make test` runs the tests. Python 3.10+ is all they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2

.PHONY: demo test test-slow test-versions test-vllm test-llm-compressor test-kernels compatibility gpu lint format clean

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

# What people do around the model, family by family and release by release: runs the tests marked `compatibility` on each
# release, the slow ones among them on the pinned one only, and writes docs/compatibility.md.
PINNED = $(shell sed -n 's/^transformers==\([0-9.]*\).*3.11.*/\1/p' requirements.txt | head -1)
COMPATIBILITY := benchmarks/results/compatibility
compatibility: $(VENV)/installed-test $(addprefix compatibility-,5.6.0 5.12.1 5.17.0 5.19.0 newest)
	$(RUN) -m pytest -n $(WORKERS) -m "compatibility and not gpu" --compatibility=$(COMPATIBILITY)/pinned.json
	$(RUN) docs/draw_compatibility.py $(COMPATIBILITY)/*.json --pinned $(PINNED)

compatibility-%: $(VENV)-transformers-%/installed
	$(VENV)-transformers-$*/bin/python -m pytest -n $(WORKERS) -m "compatibility and not slow and not gpu" tests/contract tests/parity \
		--compatibility=$(COMPATIBILITY)/$*.json

# vLLM's build for CPUs on this repository's checkpoints, in an environment of its own (3.5 GB). The three packages that go
# are builds for another PyTorch, which vLLM does not need for text.
test-vllm: $(VENV)-vllm/installed
	$(VENV)-vllm/bin/python -m pytest tests/engines

$(VENV)-vllm/installed: requirements-vllm.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet -r requirements-vllm.txt
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# int8 and int4 by GPTQ and AWQ, in llm-compressor's own environment: its transformers is older than the pinned one.
test-llm-compressor: $(VENV)-llm-compressor/installed
	$(VENV)-llm-compressor/bin/python -m pytest -n 0 -m "slow or not slow" tests/compress/test_integers.py

$(VENV)-llm-compressor/installed: requirements-llm-compressor.txt
	$(PYTHON) -m venv $(VENV)-llm-compressor
	$(VENV)-llm-compressor/bin/python -m pip install --quiet -r requirements-llm-compressor.txt pytest pytest-timeout pytest-xdist hypothesis
	touch $@

# GPU kernels without a GPU: in Triton's interpreter, then through its compiler. Triton is a download of 285 MB.
test-kernels: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-deps triton==3.9.0
	TRITON_INTERPRET=1 $(RUN) -m pytest tests/kernels
	$(RUN) -m pytest -m slow tests/kernels

# What is claimed for GPUs, on one, within eight minutes and without a network: with the Python that has the card's own
# PyTorch, and nothing to install.
gpu:
	$(PYTHON) -m benchmarks.gpu

# The type checker reads the optional libraries, too.
lint: $(VENV)/installed-test
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m pyrefly check --python-interpreter-path $(RUN) --output-format min-text

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
	rm -rf $(VENV) $(VENV)-transformers-* $(VENV)-vllm .pytest_cache .ruff_cache .hypothesis
