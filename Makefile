# Start with `make demo` and `make test`. Each target creates .venv if it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One BLAS thread per test worker: more threads would compete for the cores. Bytecode is cached, also where the
# environment says otherwise: each of many processes would compile the package and its tests again.
PYTEST := OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -q

.PHONY: demo compare cards schema rehearsal test test-ranks test-all test-lowest test-newest test-wheel docs docs-test recipes build lint format lock gpu-report clean

# PUSH=1 starts a Hub on this machine, pushes to it during training, and loads the pushed model.
demo: $(READY)
	$(if $(PUSH),$(BIN)/python -m tests.support.hub.demo alice/nexus-demo runs/nexus-demo -- )$(BIN)/python \
		recipes/pretrain_3b.py --config demo $(if $(PUSH),--push_to_hub True --hub_strategy checkpoint)

# Compare seven arms over three seeds on the built-in corpus, in five minutes on two cores. The report is in runs/compare.
compare: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python recipes/compare.py

# Model cards are golden files. After a change of the template, render them again and review the difference.
cards: $(READY)
	$(BIN)/python -m tests.hub.test_card
	$(BIN)/python model_cards/render.py

# The JSON schema and the tables of docs/fields_*.md are made from the dataclasses.
schema: $(READY)
	$(BIN)/python -m tests.cli.test_schema

test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow" --ignore tests/trainer/distributed --ignore tests/recipes

# The same update on two and on four processes.
test-ranks: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow" tests/trainer/distributed

test-all: $(READY)
	@start=$$(date +%s); $(PYTEST) -n 2 --dist loadfile; status=$$?; \
	echo "test-all took $$(( $$(date +%s) - start )) s"; exit $$status

# The oldest versions that pyproject.toml allows, and the newest that exist, each in a separate environment.
# PIP_INSTALL='...' is passed to pip, for another build of torch. TESTS='tests/test_nexus.py' runs fewer tests.
TESTS ?= -m "not slow"
EXTRAS ?= test
test-lowest: .venv-lowest/.ready
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS)

test-newest: .venv-newest/.ready
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS)

# The lower bounds of the dependencies. The test tools are not lowered.
.venv-lowest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c 'import re, tomllib; \
		wanted = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
		print("\n".join(re.sub(r">=([0-9.]+).*", lambda m: "==" + m[1] + (".*" if "." in m[1] else ".0.*"), w) for w in wanted))' \
		> .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -q --disable-pip-version-check $(PIP_INSTALL) -c .venv-lowest/lowest.txt -e '.[$(EXTRAS)]'
	@touch $@

.venv-newest/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-newest
	$(PYTHON) -c 'import re, tomllib; \
		project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		extras = [w for e in "$(EXTRAS)".split(",") for w in project["optional-dependencies"][e]]; \
		print("\n".join(re.sub(r",<[0-9.]+", "", w) for w in project["dependencies"] + extras))' > .venv-newest/newest.txt
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --upgrade $(PIP_INSTALL) -r .venv-newest/newest.txt
	.venv-newest/bin/python -m pip install -q --disable-pip-version-check --no-deps -e .
	@touch $@

# Examples in docstrings, and code, mixtures, numbers and links in the documentation.
docs-test: $(READY)
	$(PYTEST) tests/test_docs.py
	$(PYTEST) tests/pretrain/test_cost.py -k page

# Run the notebooks, and build the site into build/site. A warning fails the build, as does a link to a page or heading that does not exist.
docs: .venv/.docs
	PATH=$(CURDIR)/$(BIN):$$PATH OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W -E --keep-going -b html docs build/site
	@echo "build/site/index.html"

.venv/.docs: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[docs]'
	@touch $@

# Every command of the README and of the headers of recipes/, including those that take minutes, and benchmarks with
# lm-eval.
recipes: .venv/.eval
	$(PYTEST) -n 2 tests/recipes tests/cli/test_benchmark.py

.venv/.eval: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[eval]'
	@touch $@

# Run the large configurations whole, narrow and on stand-ins of their data. ARGS=3b rehearses only one, ARGS=paper only the comparison.
rehearsal: $(READY)
	$(BIN)/python -m tests.rehearsal $(ARGS)

# Measure on a machine with one GPU what a CPU cannot show, in ten minutes. ARGS=--tiny runs on a CPU.
gpu-report: $(READY)
	$(BIN)/python benchmarks/gpu_report.py $(ARGS)

# Test the installed wheel with the tests of the source distribution, outside of the repository.
test-wheel: build
	rm -rf .venv-wheel && $(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[test]"
	wheel=$$PWD/.venv-wheel; outside=$$(mktemp -d); tar xzf dist/*.tar.gz -C $$outside --strip-components 1 && \
	rm -r $$outside/hf_nexus && cd $$outside && OMP_NUM_THREADS=1 $$wheel/bin/python -m pytest -q -n 2 --dist loadfile $(TESTS); \
	status=$$?; rm -rf $$outside; exit $$status

build: $(READY)
	rm -rf dist
	$(BIN)/python -m hatchling build -d dist

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolve the dependencies and write constraints.txt. It has names and versions only, for any index and build of torch.
lock:
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install -q --disable-pip-version-check 'pip-tools>=7.5'
	printf 'hatchling\nhatch-vcs\neditables\n' > .venv-lock/build-requirements.in
	.venv-lock/bin/pip-compile -q --upgrade --all-extras --strip-extras --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host -o .venv-lock/constraints.txt pyproject.toml .venv-lock/build-requirements.in
	sed -E 's/\+[^ ]+//' .venv-lock/constraints.txt | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints.txt

clean:
	rm -rf .venv .venv-lowest .venv-newest .venv-lock .venv-wheel dist

$(READY): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_nexus needs Python 3.11 or newer; run 'make PYTHON=/path/to/python3.11 ...'."; exit 1; }
	@echo "Installing the locked versions into .venv (once; a few minutes) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt hatchling hatch-vcs editables
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
