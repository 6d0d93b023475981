# The same commands for people and for CI. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
PARTS := align data_gen decoding eval testbed

.PHONY: demo test check slow links clean

demo: .venv/.demo ## decode the embedded models by contrast: three problems, a table, demo.html
	$(BIN)/contralto demo

test: check slow ## the whole test suite

check: .venv/.dev links ## lint, format, types and the fast tests
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not gpu"

slow: .venv/.dev links ## the tests that check leaves out
	$(BIN)/pytest -n auto --dist worksteal -m slow

.venv:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv
	$(INSTALL) --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/.demo

# contralto/<part> -> ../<part>, for type checkers and editors. Archives and file systems without links lose them.
links:
	@for part in $(PARTS); do [ -d contralto/$$part ] || { rm -f contralto/$$part; ln -s ../$$part contralto/$$part; }; done

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache
