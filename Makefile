# `make demo` runs the main job, `make demo-qemu` the same with a stock QEMU, `make test` passes the
# tests; each sets everything up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo demo-qemu test lint clean

demo: $(VENV)/ready
	$(BIN)/vfio-ferry demo $(DEMO_ARGS)

demo-qemu: $(VENV)/ready
	$(BIN)/vfio-ferry demo-qemu $(DEMO_ARGS)

test: lint
	@# Outside of any test's time. Should it fail, the tests that need it say why.
	-$(BIN)/python -m lab.qemu prepare
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(TEST_ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict transport sync ferry lab perf

$(VENV)/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV)
