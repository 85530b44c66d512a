# make quickstart   a virtual environment, the main job, a report: the fastest way to see what this is
# make quickstart-text  a language model, adapters for three styles of text, all generated at once
# make test         the test suite           make check   ruff and mypy
# make bench-check  instructions of ten key paths, compared with stored ones within 3 % (RENEW=1 stores them); needs valgrind
# make coverage   the test suite and the tests marked thorough, with coverage of lines and branches
# make soak         the long tests           make proto   the gRPC messages, after a change of inference.proto
# make families   the examples of families of models, small
# make test-stability   the test suite 20 times, in random orders beside busy processes (ROUNDS=, NEIGHBOURS=, ARGS=)
# make cuda-dry-run   ONNX Runtime's CUDA provider on a CUDA that computes nothing: placement, copies, recordings
# make openvino   the runtime with OpenVINO, in a virtual environment apart
# make cluster    a cluster of Ray Serve and an S3 API, with kills, in a virtual environment beside (cluster-soak: 20 of each)
# make chart      the Helm chart, rendered by Helm's library in a virtual environment apart
# make bench      benchmarks/RESULTS.md, results.json and results.html, and README.md's figures; 15 minutes (ARGS='--only forms')
# make notebooks  docs/notebooks, run in a virtual environment beside and compared with what is committed (ARGS=--write)
# make docs       the documentation site, in a virtual environment apart, into site/
# make reference    the generated pages of docs/reference, after a change of what they describe; make zoo exports for one
# make console-test  the console in Chromium, with Playwright in a directory apart
# make console      runtime/server/console/static, after a change of console/; needs Node 20 or newer
# make client       the blocking client, after a change of asynchronous/
# make formats      docs/formats.md, after a change of a reader
# make command-line   docs/command-line.md, after a change of a command
# make release      the wheel and the sdist in dist/, checked; each extra installed and tried on each Python (PYTHONS=, EXTRAS=)
# make image        the container image (PROVIDER=cpu or gpu), on its base by digest
# make image-lock   image/*.txt, after a change of constraints.txt
# make clean        remove what the above made

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PROVIDER := $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)
# Twice quiet: of pip's warnings (being root, places without packages) none concerns the user; its errors are shown.
QUIET := --disable-pip-version-check install --quiet --quiet --root-user-action=ignore --constraint constraints.txt
PIP := $(BIN)/python -m pip $(QUIET)
OUT ?= quickstart
ROUNDS ?= 20
CACHE ?= .bench
STUB ?= .venv-cuda-stub
OPENVINO ?= .venv-openvino
CHART ?= .venv-chart
CLUSTER ?= .venv-cluster
NOTEBOOKS ?= .venv-notebooks
DOCS ?= .venv-docs
PLAYWRIGHT ?= .console-site
THOROUGH = $(shell sed -n 's/.*"-m", "\(.*\) and not thorough"\].*/\1/p' pyproject.toml)

.PHONY: quickstart quickstart-text test coverage test-stability bench bench-check check soak families cuda-dry-run openvino \
	cluster cluster-soak chart notebooks docs reference zoo console-test console proto client formats command-line release image \
	image-lock clean

quickstart: $(VENV)/run-$(PROVIDER)
	@$(BIN)/tpeft-deploy quickstart --out $(OUT)

quickstart-text: $(VENV)/run-$(PROVIDER)
	$(BIN)/python examples/three_styles.py quickstart-text

test: $(VENV)/dev-$(PROVIDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

coverage: $(VENV)/dev-$(PROVIDER)
	rm -f .coverage .coverage.*
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "$(THOROUGH)" --cov --cov-report= $(ARGS)
	$(BIN)/python .ci/coverage_report.py

test-stability: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python .ci/stability.py --rounds $(ROUNDS) $(if $(NEIGHBOURS),--neighbours $(NEIGHBOURS)) -- $(ARGS)

bench-check: $(VENV)/dev-$(PROVIDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.instructions $(if $(RENEW),--renew)

check: $(VENV)/dev-$(PROVIDER)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python -m pytest -m soak $(ARGS)

families: $(VENV)/dev-$(PROVIDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m families tests/examples $(ARGS)

cuda-dry-run: $(VENV)/dev-$(PROVIDER) $(STUB)/built
	OMP_NUM_THREADS=1 CUDA_STUB=$(STUB) $(BIN)/python -m pytest -n 2 -m cuda_stub tests/cuda_stub $(ARGS)

openvino: $(VENV)/dev-$(PROVIDER) $(OPENVINO)/installed
	OMP_NUM_THREADS=1 OPENVINO=$(OPENVINO) $(BIN)/python -m pytest -n 2 -m openvino tests/openvino $(ARGS)

cluster-soak: KILLS := cluster and soak
cluster: KILLS := cluster and not soak
cluster cluster-soak: $(VENV)/dev-$(PROVIDER) $(CLUSTER)/installed
	OMP_NUM_THREADS=1 $(CLUSTER)/bin/python -m pytest -n 0 -m "$(KILLS)" $(or $(ARGS),tests/cluster_kill tests/runtime/cluster tests/server/replicas)

chart: $(VENV)/dev-$(PROVIDER) $(CHART)/installed
	CHART=$(CHART) $(BIN)/python -m pytest -n 0 -m chart tests/deploy $(ARGS)

bench: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python -m benchmarks.tables --cache $(CACHE) $(ARGS)

notebooks: $(NOTEBOOKS)/installed
	OMP_NUM_THREADS=1 $(NOTEBOOKS)/bin/python .ci/notebooks.py $(ARGS)

docs: $(DOCS)/installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict

console-test: $(VENV)/dev-$(PROVIDER) $(PLAYWRIGHT)/installed
	OMP_NUM_THREADS=1 PYTHONPATH=$(PLAYWRIGHT) $(BIN)/python -m pytest -n 2 --dist loadfile -m console tests/console $(ARGS)

console:
	cd console && npm ci --no-audit --no-fund && npm run build

proto: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python .ci/compile_proto.py

client: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python .ci/unasync.py

formats: $(VENV)/dev-$(PROVIDER)
	$(BIN)/tpeft-deploy formats --markdown > docs/formats.md

command-line: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python .ci/command_page.py > docs/command-line.md

release: $(BIN)/python
	.ci/release.sh

reference: $(VENV)/dev-$(PROVIDER)
	$(BIN)/python -m docs.generate

zoo: $(VENV)/dev-$(PROVIDER)
	OMP_NUM_THREADS=1 $(BIN)/python -m docs.generate zoo

# The base's digest as the registry has it now; the image says which one it was.
image:
	base=python:3.11-slim@$$(docker buildx imagetools inspect python:3.11-slim --format '{{.Manifest.Digest}}') && \
	docker build --build-arg PROVIDER=$(PROVIDER) --build-arg BASE=$$base \
		--label org.opencontainers.image.base.name=$$base --tag tpeft-deploy .

image-lock: $(BIN)/python
	$(BIN)/python .ci/lock_image.py

clean:
	rm -rf $(VENV) $(STUB) $(OPENVINO) $(CHART) $(CLUSTER) $(NOTEBOOKS) $(DOCS) $(PLAYWRIGHT) console/node_modules site $(CACHE) $(OUT) \
		quickstart-text build dist *.egg-info

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; set PYTHON=/path/to/it" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# What it installs is kept until the version of onnxruntime-gpu or a dependency changes.
$(STUB)/built: $(wildcard tests/cuda_stub/*.sh tests/cuda_stub/*.c tests/cuda_stub/crt/*.h) constraints.txt pyproject.toml | $(BIN)/python
	PYTHON=$(abspath $(BIN)/python) tests/cuda_stub/build.sh $(STUB)
	@touch $@

# OpenVINO's package has the files of onnxruntime too: it never shares an environment with another.
$(OPENVINO)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OPENVINO)
	$(OPENVINO)/bin/python -I -m pip $(QUIET) --editable '.[openvino]'
	@touch $@

# A virtual environment over the development environment: it has what that has, and what it installs stays apart.
define over_development
$(PYTHON) -m venv $(1)
$(1)/bin/python -c 'import pathlib, sysconfig; there = pathlib.Path(sysconfig.get_path("purelib")); \
	own = pathlib.Path("$(abspath $(VENV))", *there.relative_to("$(abspath $(1))").parts); \
	(there / "zz_development.pth").write_text(f"import site; site.addsitedir({str(own)!r})\n")'
endef

# Ray is large and moves versions: what it needs is for these tests alone.
$(CLUSTER)/installed: pyproject.toml constraints.txt | $(VENV)/dev-$(PROVIDER)
	$(call over_development,$(CLUSTER))
	$(CLUSTER)/bin/python -m pip $(QUIET) \
		--editable '.[ray,store]' 'moto[server]' s3fs
	@touch $@

$(NOTEBOOKS)/installed: constraints.txt | $(VENV)/dev-$(PROVIDER)
	$(call over_development,$(NOTEBOOKS))
	$(NOTEBOOKS)/bin/python -m pip $(QUIET) nbclient ipykernel
	@touch $@

$(CHART)/installed: constraints.txt
	$(PYTHON) -m venv $(CHART)
	$(CHART)/bin/python -I -m pip $(QUIET) helm-python-sdk
	@touch $@

$(DOCS)/installed: constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -I -m pip $(QUIET) mkdocs-material 'mkdocstrings[python]' nbconvert
	@touch $@

$(PLAYWRIGHT)/installed: constraints.txt | $(BIN)/python
	$(BIN)/python -m pip $(QUIET) --target $(PLAYWRIGHT) \
		playwright axe-playwright-python
	@touch $@

# Installed again whenever the dependencies change.
$(VENV)/run-$(PROVIDER): pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing tpeft-deploy for $(PROVIDER) into $(VENV) (a few minutes the first time)"
	@$(PIP) --editable '.[$(PROVIDER),export,hf,train,examples,server,client,text]'
	@touch $@

$(VENV)/dev-$(PROVIDER): $(VENV)/run-$(PROVIDER)
	@echo "installing the test tools into $(VENV)"
	$(PIP) --editable '.[$(PROVIDER),export,hf,train,examples,server,client,text,dev]'
	@touch $@
