# make example   the whole path on real images      make bench   speed, side by side with the peers
# make test      GoogleTest and pytest              make lint    format, lint and types
# make build     only set up and compile            make clean   everything but .venv
# make docs      the guide, into build/docs
# make cuda-check   compile the CUDA sources without torch, show what each kernel takes
# make gpu-check    on a machine with a GPU: build for it, test, sanitize, benchmark
#
# Every target first sets up what it needs in .venv; a second run starts at once. Those two set up
# nothing: cuda-check needs nvcc, gpu-check an interpreter that has torch and pytest, which is PYTHON,
# or else .venv's, or else python3. Results go to OUT, by default build/gpu-check.
#   TORCH=2.13.0    the PyTorch release to install and build against, 2.11 or newer
#   CUDA=1          1 builds the CUDA kernels, 0 does not; default: where torch is a CUDA build
#                   and its nvcc is found
#   CUDA_ARCH=90    compute capabilities, comma separated; default: 8.0 to 12.0 and PTX
#   PYTHON=python3  the interpreter that .venv is made with, 3.10 or newer
#   DATA=folder     Fashion-MNIST's four idx files, for `make example`
#   JOBS=2          parallel compilations and C++ tests; default: all cores

TORCH ?= 2.13.0
export TORCH CUDA CUDA_ARCH PYTHON DATA JOBS

.PHONY: build setup example test bench lint docs clean cuda-check gpu-check
build: setup

setup:
	@tools/setup.sh

example: setup
	@.venv/bin/python examples/fashion_mnist.py $(if $(DATA),--data "$$DATA")

test:
	@tools/setup.sh --tests
	@tools/test.sh

bench: setup
	@.venv/bin/python benchmarks/run.py

cuda-check:
	@"$${PYTHON:-python3}" tools/cuda_check.py

gpu-check:
	@"$${PYTHON:-$$(command -v .venv/bin/python || echo python3)}" tools/gpu_check.py

lint:
	@tools/setup.sh --no-compile
	@find csrc tests benchmarks examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc' \) -print0 | \
	    xargs -0 .venv/bin/clang-format --dry-run -Werror
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs: setup
	@.venv/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

clean:
	@rm -rf build dist *.egg-info torch_ext/*.so torch_ext/include torch_ext/share examples/output benchmarks/output
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv/.stamp-*
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
