# vattn. `make demo` shows it, `make test` proves it; both set everything up themselves, inside this folder.
#
# Needs Python 3.10 or newer and a C++20 compiler. Everything else goes into .venv; only GoogleTest, for the C++ tests, comes from the
# system (installed here when run as root on Debian, asked for otherwise).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD := build/test
RESULTS := $(CURDIR)/build/results
READY := $(VENV)/.ready
JOBS ?= $(shell nproc)

.PHONY: help demo test test-build test-cpp test-python test-gpu lint format stubs bench pages bench-micro bench-check bench-record instructions-program fuzz fuzz-build \
	sanitize sanitize-address sanitize-thread sanitize-build coverage mutants reliability soak wheel clean
.DEFAULT_GOAL := help

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##/\1:/p' $(MAKEFILE_LIST) | column -t -s :

demo: $(READY)  ## generate text with and without vattn, then replay a trace (about a minute)
	$(BIN)/python -m vattn demo

test: test-cpp test-python  ## every test that needs no GPU

test-build: $(READY) $(BUILD)/build.ninja
	$(BIN)/cmake --build $(BUILD) -j $(JOBS)

# The C++ tests run the CUDA driver on the fake libcuda; so do the Python ones, through VATTN_FAKE_CUDA.
test-cpp: test-build
	VATTN_CUDA_LIBRARY=$(CURDIR)/$(BUILD)/tests/libfake_cuda.so $(BUILD)/tests/vattn_tests --gtest_brief=1 \
		--gtest_output=json:$(RESULTS)/cpp.json

test-python: test-build
	VATTN_FAKE_CUDA=$(CURDIR)/$(BUILD)/tests/libfake_cuda.so $(BIN)/python -m pytest \
		--junitxml=$(RESULTS)/python.xml -o junit_family=xunit1

test-gpu: $(READY) $(BUILD)/build.ninja  ## the CUDA driver's tests, unchanged, on the GPU of this machine
	$(BIN)/cmake --build $(BUILD) -j $(JOBS)
	VATTN_TEST_GPU=1 $(BUILD)/tests/vattn_tests --gtest_filter='*uda*' --gtest_brief=1
	VATTN_TEST_GPU=1 $(BIN)/python -m pytest -k "cuda"

lint: $(READY)  ## ruff, mypy, clang-format, clang-tidy, the include rule
	scripts/lint $(BIN) $(BUILD)

format: $(READY)  ## let the formatters have their way
	$(BIN)/ruff format python tests/python bench scripts examples
	$(BIN)/ruff check --fix python tests/python bench scripts examples
	git ls-files '*.cpp' '*.hpp' '*.h' | xargs $(BIN)/clang-format -i

stubs: $(READY)  ## write python/vattn/_core.pyi anew from the extension
	$(BIN)/python -m nanobind.stubgen -m vattn._core -o python/vattn/_core.pyi

bench: $(READY)  ## the host suite: tables, JSON with every sample and pictures in a folder vattn-bench-<machine>
	scripts/bench $(BIN)

pages: $(READY)  ## write docs/performance.md, its folder and docs/reliability.md anew from the results that are committed
	$(BIN)/python bench/performance.py
	$(BIN)/python scripts/reliability.py --page

bench-micro: $(READY)  ## single calls, with pytest-benchmark
	$(BIN)/python -m pytest bench --benchmark-enable --benchmark-only

# Counts depend on compiler and flags, so these are built in one way whatever the environment says.
INSTRUCTIONS := build/instructions
bench-check: instructions-program  ## fail where the library spends 5 % more instructions than recorded
	$(BIN)/python scripts/instructions.py check $(INSTRUCTIONS)

bench-record: instructions-program  ## record the instructions it spends now, in bench/instructions.json
	$(BIN)/python scripts/instructions.py record $(INSTRUCTIONS)

instructions-program: $(READY)
	scripts/need valgrind
	$(BIN)/cmake -S . -B $(INSTRUCTIONS) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
		-DCMAKE_CXX_FLAGS= -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O2 -g -DNDEBUG" -DVATTN_BUILD_TESTS=OFF -DVATTN_BUILD_BENCH=ON
	$(BIN)/cmake --build $(INSTRUCTIONS) -j $(JOBS) --target bench_instructions

# Under libFuzzer and ASan where there is a clang++, else by mutating the corpus blindly. Finds are in build/fuzz/finds.
FUZZ_SECONDS ?= 60
fuzz: fuzz-build  ## the fuzz targets, FUZZ_SECONDS=60 each, all at once
	mkdir -p build/fuzz/finds build/fuzz/corpus/operations build/fuzz/corpus/driver_trace $(RESULTS)
	FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m pytest tests/python/test_trace_fuzz.py & requests=$$!; \
	for target in operations driver_trace; do \
		build/fuzz/tests/fuzz_$$target -max_total_time=$(FUZZ_SECONDS) -max_len=1024 -timeout=60 -print_final_stats=1 \
			$(if $(VATTN_SOAK_SEED),-seed=$(VATTN_SOAK_SEED)) \
			-artifact_prefix=build/fuzz/finds/ build/fuzz/corpus/$$target tests/fuzz/corpus/$$target > $(RESULTS)/fuzz_$$target.log 2>&1 & \
		eval "$$target=$$!"; \
	done; \
	wait $$requests && wait $$operations && wait $$driver_trace || { tail -n 40 $(RESULTS)/fuzz_*.log; exit 1; }
	tail -n 8 $(RESULTS)/fuzz_*.log

fuzz-build: $(READY)
	scripts/need clang >/dev/null || true
	CXX=$$(command -v clang++ || echo c++) $(BIN)/cmake -S . -B build/fuzz -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja \
		-DCMAKE_BUILD_TYPE=RelWithDebInfo -DVATTN_BUILD_FUZZ=ON -DVATTN_SANITIZE=address
	$(BIN)/cmake --build build/fuzz -j $(JOBS) --target fuzz_operations fuzz_driver_trace

# SHORT=1: what each change must pass; scripts/sanitize says what that is.
SHORT ?=
sanitize: sanitize-thread sanitize-address  ## the C++ tests under TSan, and under ASan and UBSan; Python over the latter

sanitize-thread sanitize-address: sanitize-%: $(READY)
	SHORT=$(SHORT) scripts/sanitize $(BIN) $* $(JOBS) $(RESULTS)

sanitize-build: $(READY)
	for kind in address thread; do SHORT=$(SHORT) scripts/sanitize $(BIN) $$kind $(JOBS) $(RESULTS) build || exit 1; done

coverage: $(READY)  ## lines and branches of the C++ core that the C++ tests reach
	scripts/coverage $(BIN) $(RESULTS)

mutants: $(READY)  ## seeded bugs, one at a time: how many the tests catch (an hour)
	$(BIN)/python scripts/mutants.py --jobs $(JOBS)

# What it reads was written to build/results by the other targets; what was not run is called so on the page.
reliability: test fuzz sanitize coverage  ## run all that shows it, then write docs/reliability.md and .json
	$(BIN)/python scripts/reliability.py $(RESULTS)

# Every test that has a long form, seed after seed; each takes its own part of the time. A soak draws its first seed and prints
# it; with SEED=N the same programs run again.
MINUTES ?= 60
ifneq ($(filter soak,$(MAKECMDGOALS)),)
SEED ?= $(shell od -An -N4 -tu4 /dev/urandom)
export VATTN_SOAK_SEED := $(strip $(SEED))
endif
soak: $(READY) $(BUILD)/build.ninja  ## the long form of the reliability tests, MINUTES=60 in all; SEED=N repeats one
	@echo "soak: the first seed is $(VATTN_SOAK_SEED); make soak MINUTES=$(MINUTES) SEED=$(VATTN_SOAK_SEED) repeats it"
	$(BIN)/cmake --build $(BUILD) -j $(JOBS)
	VATTN_SOAK_MINUTES=$(MINUTES) VATTN_TEST_TIMEOUT=0 VATTN_CUDA_LIBRARY=$(CURDIR)/$(BUILD)/tests/libfake_cuda.so \
		$(BUILD)/tests/vattn_tests --gtest_filter='*/PoolModel.*:*/Threads.*:*/Isolation.*:*/Leaks.*' \
		--gtest_output=json:$(RESULTS)/soak/cpp.json
	VATTN_SOAK_MINUTES=$(MINUTES) VATTN_FAKE_CUDA=$(CURDIR)/$(BUILD)/tests/libfake_cuda.so \
		$(BIN)/python -m pytest -o faulthandler_timeout=0 --junitxml=$(RESULTS)/soak/python.xml -o junit_family=xunit1 \
		tests/python/test_model.py tests/python/test_leaks.py tests/python/test_kill.py tests/python/test_must_fault.py
	$(MAKE) fuzz FUZZ_SECONDS=$$(( $(MINUTES) * 2 ))

wheel: $(READY)  ## dist/vattn-*.whl
	$(BIN)/python -m pip wheel --no-deps -w dist .

clean:
	rm -rf $(VENV) build dist

$(BUILD)/build.ninja: $(READY) CMakeLists.txt src/CMakeLists.txt tests/CMakeLists.txt
	scripts/need gtest
	$(BIN)/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo

# The environment: torch first, pinned where there is none, since the newest build of it would bring gigabytes of CUDA along.
# Editable, so that a change in Python is seen at once; a change in C++ or here builds the extension again.
$(READY): pyproject.toml CMakeLists.txt $(shell git ls-files src cmake 2>/dev/null)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet "scikit-build-core>=1.0" "nanobind>=3.1,<4" "nanobind-backend>=1.0" "cmake>=3.25,<4" ninja
	$(BIN)/python -m pip install --quiet --no-build-isolation -e ".[test,cli,lint]"
	touch $(READY)
