# `make demo` runs the main job, `make demo-qemu` the same with a stock QEMU,
# `make demo-hardware` with functions of a host that has an IOMMU. `make test` passes the tests in
# some minutes, `make test-full` all of them (tests/README.md). Each sets everything up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

LOWEST := .venv-lowest
# The kernels are compiled outside of any test's time, and by one process.
WARM_UP := 'from ferry.migration.kernels import warm_up_all; warm_up_all()'

# Tests start hundreds of processes, each of which would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

BEGAN := $(shell date +%s)
# More than processors: many tests wait for a peer that is silent.
WORKERS := $(shell echo $$((($$(nproc) * 3 + 1) / 2)))
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal --durations=15

.PHONY: demo demo-qemu demo-hardware test test-full test-lowest soak prepare prepare-browser lint \
	install-units clean

demo: $(VENV)/ready
	$(BIN)/vfio-ferry demo $(DEMO_ARGS)

demo-qemu: $(VENV)/ready
	$(BIN)/vfio-ferry demo-qemu $(DEMO_ARGS)

demo-hardware: $(VENV)/ready
	$(BIN)/vfio-ferry demo-hardware $(DEMO_ARGS)

test: SELECTED := -m "not full"
test test-full: prepare lint
	@$(PYTEST) $(SELECTED) $(TEST_ARGS); code=$$?; took=$$(($$(date +%s) - $(BEGAN))); \
	echo "make $@ took $$((took / 60)) min $$((took % 60)) s"; exit $$code

test-full: test-lowest prepare-browser

soak: $(VENV)/ready
	$(BIN)/python -m tests.e2e.soak $(SOAK_ARGS)

test-lowest: $(LOWEST)/ready
	@# The unit tests with the lowest versions that pyproject.toml allows.
	-$(LOWEST)/bin/python -c $(WARM_UP)
	$(LOWEST)/bin/python -m pytest --numprocesses auto --dist worksteal -m "not full" \
		tests/transport tests/sync tests/ferry tests/lab $(TEST_ARGS)

$(LOWEST)/ready: pyproject.toml tests/lowest_versions.py
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python tests/lowest_versions.py pyproject.toml > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[dev]' --constraint $(LOWEST)/lowest.txt
	touch $@

prepare: $(VENV)/ready
	@# Once, and outside of any test's time. Should it fail, the tests that need it say why.
	-$(BIN)/python -m lab.qemu prepare
	-$(BIN)/python -c $(WARM_UP)

prepare-browser: $(VENV)/ready
	-$(BIN)/python -m lab.browser

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict transport sync ferry lab perf tests docs examples

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

# Where the installed `vfio-ferry` is, and where the units go; DESTDIR is for packagers.
VFIO_FERRY ?= /usr/bin/vfio-ferry
UNITS ?= /etc/systemd/system

install-units:
	install -d $(DESTDIR)$(UNITS)
	for unit in deploy/systemd/*; do \
	    sed 's|/usr/bin/vfio-ferry|$(VFIO_FERRY)|' $$unit > $(DESTDIR)$(UNITS)/$${unit##*/} || exit 1; \
	    chmod 644 $(DESTDIR)$(UNITS)/$${unit##*/}; \
	done

clean:
	rm -rf $(VENV) $(LOWEST)
