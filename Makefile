# The first target that needs the environment creates it, and creates it again when the lock file has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
POLICY := .venv-policy
PEERS := .venv-peers

SHELL := bash
.SHELLFLAGS := -o pipefail -c

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-tools coverage check policy bench bench-peers gpu gpu-kit gpu-day lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 8

demo: $(READY)  ## train a small DenseNet on handwritten digits end to end, in a few minutes
	@$(BIN)/densenet train configs/demo.yaml

test: $(READY)  ## run the tests, except those that take minutes each
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long"

test-long: $(READY)  ## run the long tests: whole runs with worker, node, driver and tracker failures, and sweeps
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m long

# While policy-rc.d exists, no package starts its service: Prometheus would listen on all addresses.
test-tools:  ## install PostgreSQL, Chromium, Slurm and Prometheus (as root on Debian); without them some tests are skipped
	apt-get update -qq
	@policy=/usr/sbin/policy-rc.d; if [ ! -e $$policy ]; then trap "rm $$policy" EXIT; \
		printf '#!/bin/sh\nexit 101\n' > $$policy; chmod 755 $$policy; fi; \
	apt-get install -y -qq --no-install-recommends postgresql chromium slurm-wlm munge prometheus

coverage: $(READY)  ## run `make test` with a coverage report, child processes included
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not long" --cov --cov-report=term

check: $(READY)  ## check lint, formatting, imports, types and spelling
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/mypy
	$(BIN)/codespell

LOCK := $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	--no-annotate
policy: $(READY) $(POLICY)/.ready  ## check the Kubernetes manifests and the Dockerfile against security policies
	$(POLICY)/bin/hadolint k8s/images/Dockerfile
	@rm -rf $(POLICY)/objects
	$(BIN)/python k8s/policy/objects.py $(POLICY)/objects
	@cp k8s/images/Dockerfile $(POLICY)/objects
	$(POLICY)/bin/checkov --config-file k8s/policy/checkov.yaml --directory $(POLICY)/objects

bench: $(READY)  ## run all benchmarks or ONLY="NAME...", with synthetic JPEGs or those in IMAGES=FOLDER
	$(BIN)/python -m benchmarks $(ONLY) $(if $(IMAGES),--images $(IMAGES))

# FFCV is compiled from source, and SPDL loads FFmpeg's libraries:
# apt-get install --no-install-recommends g++ pkg-config libopencv-dev libturbojpeg0-dev ffmpeg
bench-peers: $(READY) $(PEERS)/.ready  ## run the loader benchmark next to FFCV, SPDL, litdata, streaming and datasets
	$(PEERS)/bin/python -m benchmarks loader $(if $(IMAGES),--images $(IMAGES))

gpu: $(READY)  ## run the tests and benchmarks that need a GPU with CUDA
	$(BIN)/python -m pytest tests/gpu tests/model/test_fused.py
	$(BIN)/python -m benchmarks.gpu --seconds 3600 $(GPU_OPTIONS)

gpu-kit: $(READY)  ## pack what a GPU machine without package access lacks (docs/gpu.md); TARGET=3.12 ARCH=90
	$(BIN)/python -m benchmarks.gpu.kit $(if $(TARGET),--python $(TARGET)) $(if $(ARCH),--architecture $(ARCH)) \
		$(if $(PRESENT),--present $(PRESENT)) $(if $(IMAGES),--images $(IMAGES)) $(if $(CIFAR),--cifar $(CIFAR))

GPU_OPTIONS = $(STEPS) $(if $(OUT),--output $(OUT)) $(if $(IMAGES),--images $(IMAGES)) $(if $(CIFAR),--cifar $(CIFAR))
gpu-day:  ## on that machine: unpack and measure, at most nine minutes; STEPS="decode zero" runs some steps
	$(PYTHON) -m benchmarks.gpu --kit outputs/gpu-kit $(if $(SECONDS),--seconds $(SECONDS)) $(GPU_OPTIONS)

lock: $(READY)  ## regenerate the lock files from pyproject.toml
	$(LOCK) --upgrade --all-extras pyproject.toml --output-file requirements.lock
	$(LOCK) --upgrade --group dev --constraint requirements.lock --output-file requirements-dev.lock
	$(LOCK) --upgrade --group policy --output-file requirements-policy.lock

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) $(POLICY) $(PEERS) outputs

$(PACKAGES): requirements.lock requirements-dev.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) else \
		f"Python 3.11 or 3.12 is required, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@echo "Installing the environment in $(VENV): about 7 GB, 4-10 minutes, once."
	@# the base interpreter, because $(PYTHON) may be that of the activated $(VENV), which is cleared
	@$$($(PYTHON) -c 'import sys; print(sys._base_executable)') -m venv --clear $(VENV)
	@PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --progress-bar off --require-hashes \
		-r requirements.lock -r requirements-dev.lock \
		| awk '/^Collecting/ && ++n % 25 == 0 {print "  " n " packages fetched"; fflush()} \
		       /^Installing collected/ {print "  " n " packages fetched, unpacking them (the longest part)"; fflush()}'
	@touch $(PACKAGES)

$(READY): $(PACKAGES) pyproject.toml
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation --editable .
	@touch $(READY)
	@echo "Installed."

$(POLICY)/.ready: requirements-policy.lock
	@$(PYTHON) -m venv --clear $(POLICY)
	@$(POLICY)/bin/python -m pip install --disable-pip-version-check --quiet --require-hashes -r requirements-policy.lock
	@touch $@

$(PEERS)/.ready: benchmarks/requirements-peers.txt
	@$(BIN)/python -m venv --clear $(PEERS)
	@$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$($(PEERS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/environment.pth"
	@$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		-r <(grep --invert-match ffcv benchmarks/requirements-peers.txt)
	@$(PEERS)/bin/python -m pip install --disable-pip-version-check --quiet --no-deps \
		-r <(grep ffcv benchmarks/requirements-peers.txt) || echo "FFCV cannot be compiled here: it is skipped"
	@touch $@
