# For people and for CI. `make serve` and `make test` work on a fresh Debian or Ubuntu with Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
ENGINE_VENV ?= .venv-engine
MODELS ?= var/models
PORT ?= 8080
PROXY_PORT ?= 9876
FUZZ_SECONDS ?= 600
SOAK_MINUTES ?= 10
MUTANT_WORKERS ?= 1
IMAGE ?= build/image
RUN = $(VENV)/bin/python
COVERAGE = build/coverage
# Three processes for two cores: some tests wait.
PARALLEL = --numprocesses $(shell expr $$(nproc) \* 3 / 2) --dist worksteal
# Half of the time that pytest takes to start is compiling tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help serve demo check quick-test test deploy-test image boot-test lint types format fuzz mutants bench soak docs sbom models engine-env clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

serve: $(VENV)/.installed models ## Start the demo backend and a local client proxy; Ctrl-C stops both
	@$(RUN) -m adytum.deploy.demo.run serve --port $(PORT) --proxy-port $(PROXY_PORT)

demo: $(VENV)/.installed models ## A short conversation, a search and a tampering attempt, with what the network saw
	@$(RUN) -m adytum.deploy.demo.run demo --port $(PORT) --proxy-port $(PROXY_PORT)

check: $(VENV)/.installed-dev ## Lint, types and the quick tests, side by side: a minute
	@$(MAKE) --no-print-directory --jobs --output-sync=target lint types quick-test

quick-test: $(VENV)/.installed-dev ## The tests that need no vLLM, no root and no minutes, on all cores
	@$(RUN) -m pytest --quiet $(PARALLEL) -m "not engine and not root and not slow" $(T)

# Two runs: every engine takes a core or more, so those tests share one process and one backend. Both are run to their
# end, and one that fails fails the whole.
test: $(VENV)/.installed-dev models ## Run all tests and print what they cover (T="path or options" selects)
ifdef T
	@$(RUN) -m pytest $(T)
else
	@rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	@status=0; \
	$(RUN) -m coverage run -m pytest $(PARALLEL) -m "not engine" || status=$$?; \
	$(RUN) -m coverage run -m pytest -m engine || status=$$?; \
	$(RUN) -m coverage combine --quiet && $(RUN) -m coverage report || status=$$?; \
	exit $$status
endif

deploy-test: $(VENV)/.installed-dev models ## What takes minutes to deploy: whole backends with vLLM behind HAProxy
	@ADYTUM_DEPLOY_TEST=1 $(RUN) -m pytest tests/deploy -s $(T)

image: $(VENV)/.installed models ## Build the virtual machine's image of profile cpu in IMAGE (build/image); needs root
	@mkdir -p $(IMAGE)
	@for each in llama=llama-awq gemma=gemma3 e5=e5; do \
		$(RUN) -m adytum.deploy.weights.image make $(MODELS)/$${each#*=} $(IMAGE)/$${each%%=*}.img || exit 1; done
	@PYTHON=$(CURDIR)/$(RUN) deploy/image/build.sh cpu deploy/config/image-cpu.toml $(IMAGE) \
		$(foreach name,llama gemma e5,$(name)=$(IMAGE)/$(name).img)

boot-test: $(VENV)/.installed-dev ## Boot that image in QEMU, talk to it, and see that changed disks stop it
	@ADYTUM_BOOT_TEST=1 ADYTUM_IMAGE=$(IMAGE) $(RUN) -m pytest tests/boot -s $(T)

lint: $(VENV)/.installed-dev ## ruff, everywhere
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

types: $(VENV)/.installed-dev ## mypy, strict, on all that ships
	@$(VENV)/bin/mypy

format: $(VENV)/.installed-dev ## Format the code
	@$(VENV)/bin/ruff check --fix-only .
	@$(VENV)/bin/ruff format .

fuzz: $(VENV)/.installed-dev ## Fuzz the parsers of what peers send (FUZZ_SECONDS=600 each)
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[fuzz]'
	@$(RUN) -m tests.fuzz --seconds $(FUZZ_SECONDS)

# In a room of its own: mutmut copies whole folders and follows the links in them. It does not mutate functions that have
# a decorator, so the copy is without the caches'.
mutants: ROOM = build/mutants
mutants: $(VENV)/.installed-dev ## Mutation testing of the channel (M="*.channel.hpke.*" selects; MUTANT_WORKERS=1)
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[mutants]'
	@rm -rf $(ROOM) && mkdir -p $(ROOM)/adytum/inference $(ROOM)/tests/unit
	@cp adytum/__init__.py $(ROOM)/adytum && cp inference/__init__.py $(ROOM)/adytum/inference
	@cp -R inference/channel $(ROOM)/adytum/inference && cp -R tests/unit/channel $(ROOM)/tests/unit
	@sed -i '/^ *@lru_cache(/d' $(ROOM)/adytum/inference/channel/*.py
	@touch $(ROOM)/tests/__init__.py $(ROOM)/tests/unit/__init__.py
	@cp tests/unit/channel/mutants.toml $(ROOM)/pyproject.toml
	@cd $(ROOM) && nice $(CURDIR)/$(VENV)/bin/mutmut run --max-children $(MUTANT_WORKERS) $(if $(M),'$(M)')
	@cd $(ROOM) && $(CURDIR)/$(VENV)/bin/mutmut results | sed '/: not checked$$/d'

bench: $(VENV)/.installed-dev models ## Sealed against plaintext-to-the-socket, one run, alternated (benchmarks/README.md)
	@$(RUN) -m adytum.benchmarks serve --arms direct ohttp own-direct own-relay own-ohttp own-ehbp --out var/bench/run.json
	@$(RUN) -m adytum.benchmarks compare var/bench/run.json --base own-direct --against own-relay own-ohttp own-ehbp \
		--html var/bench/report.html

soak: $(VENV)/.installed-dev models ## Ten minutes of load while engines are killed at random (SOAK_MINUTES=10)
	@$(RUN) -m adytum.benchmarks.runs.soak --minutes $(SOAK_MINUTES)

models: $(ENGINE_VENV)/.installed $(VENV)/.installed ## Make the demo models and their golden answers (three minutes, once)
	@$(ENGINE_VENV)/bin/python -m adytum.deploy.demo.make_models --out $(MODELS)
	@$(RUN) -m adytum.inference models canary --config deploy/config/demo.toml --missing

engine-env: $(ENGINE_VENV)/.installed ## Install the engines' own environment

# The time of the last commit, so that one commit and the same packages give the same bytes. The warning that is ignored
# is about the graph: a list of requirements does not state which package needs which.
sbom: export SOURCE_DATE_EPOCH = $(shell git log -1 --format=%ct)
sbom: export PYTHONWARNINGS = ignore
docs: $(VENV)/.installed-dev ## Write the reference pages from the code and build the site in build/docs
	@$(RUN) docs/tools/reference.py
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet
	@echo "build/docs/index.html"

sbom: $(VENV)/.installed-dev ## Write what the gateway and a client consist of, as CycloneDX, into build/sbom
	@rm -rf build/sbom build/lib && mkdir -p build/sbom
	@$(PYTHON) -m venv --without-pip build/sbom/environment
	@$(RUN) -m pip --python build/sbom/environment/bin/python install --quiet --quiet --disable-pip-version-check .
	@$(VENV)/bin/cyclonedx-py requirements --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom/gateway.cdx.json deploy/requirements/gateway.txt
	@$(VENV)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
		--output-file build/sbom/client.cdx.json build/sbom/environment/bin/python
	@rm -rf build/sbom/environment build/lib build/bdist.*
	@sha256sum build/sbom/*.json

$(VENV)/bin/python:
	@echo "[set-up] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: set PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "Python's venv module is missing: apt-get install python3-venv"; rm -rf $(VENV); exit 1; }

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "[set-up] gateway, client and verifier (no vllm, no torch)"
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[server]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "[set-up] tools for development and tests"
	@$(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(ENGINE_VENV)/.installed: deploy/engine_env.sh $(wildcard deploy/requirements/*.txt deploy/engine_plugin/*)
	@PYTHON=$(PYTHON) deploy/engine_env.sh $(ENGINE_VENV)
	@touch $@

clean: ## Remove environments, models and caches
	rm -rf $(VENV) $(ENGINE_VENV) var build .pytest_cache .mypy_cache .ruff_cache .hypothesis tests/system/interop/node_modules
