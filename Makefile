# Everything a newcomer needs: `make demo`, `make test`. Each target prepares .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# One BLAS thread per test worker: more would only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

.PHONY: demo compare cards test test-all lint format lock clean

# With PUSH=1 it pushes as it trains, to a Hub that runs on this machine for as long as the demo, and loads the result.
demo: $(READY)
	$(if $(PUSH),$(BIN)/python -m tests.hub_demo alice/nexus-demo runs/nexus-demo -- )$(BIN)/python \
		recipes/pretrain_3b.py --config demo $(if $(PUSH),--push_to_hub True --hub_strategy checkpoint)

# Arms over seeds on the built-in corpus, in less than ten minutes on two cores; the report is in runs/compare.
compare: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python recipes/compare.py

# Model cards are golden files: after a change of the template, render them again and look at the difference.
cards: $(READY)
	$(BIN)/python -m tests.test_card
	$(BIN)/python model_cards/render.py

test: $(READY)
	$(PYTEST) -n 2 --dist loadfile -m "not slow"

test-all: $(READY)
	@start=$$(date +%s); $(PYTEST) -n 2 --dist loadfile; status=$$?; \
	echo "test-all took $$(( $$(date +%s) - start )) s"; exit $$status

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Resolve anew and write constraints.txt: names and versions only, so that it serves any index and any build of torch.
lock: $(READY)
	printf 'hatchling\neditables\n' > .venv/build-requirements.in
	$(BIN)/pip-compile -q --upgrade --all-extras --strip-extras --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --no-emit-trusted-host -o .venv/constraints.txt pyproject.toml .venv/build-requirements.in
	sed -E 's/\+[^ ]+//' .venv/constraints.txt | grep -E '^[A-Za-z0-9._-]+==[^ ]+$$' > constraints.txt

clean:
	rm -rf .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "hf_nexus needs Python 3.11 or newer; run 'make PYTHON=/path/to/python3.11 ...'."; exit 1; }
	@echo "Installing the locked versions into .venv (once; a few minutes) ..."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt hatchling editables
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
