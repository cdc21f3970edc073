# Two commands from a fresh machine: `make demo` and `make test`. Each makes .venv when it is not there yet.
PYTHON ?= python3
BIN := .venv/bin
SEED ?= 0
RUNS ?= runs
# One process on the GPU, or on all cores of a machine without one.
LAUNCH := $(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(shell nproc)

.PHONY: try demo demo-bridge demo-text test test-slow coverage space space-test docs package lint format clean

.venv/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[demo,dev]"
	touch $@

# The finished student of the repository next to its teacher: rows of each from the same noise, classes by name.
try: .venv/.installed
	@mkdir -p $(RUNS)
	$(BIN)/python pipelines/generate.py --pipeline models/fashion-mnist-student --teacher models/fashion-mnist-teacher \
		--images_per_label 3 --seed $(SEED) --out $(RUNS)/try.png
	@$(BIN)/python -m webbrowser "file://$(CURDIR)/$(RUNS)/try.png" > /dev/null 2>&1 || true

demo: .venv/.installed
	$(LAUNCH) training/train_teacher.py --config configs/digits/teacher.yaml \
		--seed $(SEED) --output_dir $(RUNS)/digits-teacher --overwrite_output_dir
	$(LAUNCH) training/train_distill.py --config configs/digits/distill.yaml --teacher $(RUNS)/digits-teacher \
		--seed $(SEED) --output_dir $(RUNS)/digits-student --overwrite_output_dir
	$(BIN)/python pipelines/generate.py --pipeline $(RUNS)/digits-student --out $(RUNS)/digits-student/grid.png
	$(LAUNCH) training/evaluate.py --pipeline $(RUNS)/digits-student --teacher $(RUNS)/digits-teacher
	@echo "Grid of the student: $(RUNS)/digits-student/grid.png"
	@echo "Teacher, student and real digits side by side: $(RUNS)/digits-student/evaluation.png"

# Digits from 4×4 to 8×8 pixels, judged on digits that no training saw.
SUPERRES := $(RUNS)/digits-superres
demo-bridge: .venv/.installed
	$(LAUNCH) training/train_teacher.py --config configs/digits_superres/teacher.yaml \
		--seed $(SEED) --output_dir $(SUPERRES)-teacher --overwrite_output_dir
	$(LAUNCH) training/train_distill.py --config configs/digits_superres/distill.yaml \
		--teacher $(SUPERRES)-teacher --seed $(SEED) --output_dir $(SUPERRES)-student --overwrite_output_dir
	$(LAUNCH) training/evaluate.py --pipeline $(SUPERRES)-student --teacher $(SUPERRES)-teacher \
		--data.split "train[1297:]" --data.degradation downsample \
		--data.degradation_kwargs "{factor: 2, filter: pool, upsample: nearest}"
	@echo "Inputs, teacher, student and truth: $(SUPERRES)-student/evaluation.png"

# Captions such as "a red seven on the left": a text-to-image pipeline of diffusers, built small, trained here, and distilled
# into a LoRA of one step.
TEXT := $(RUNS)/text-digits
demo-text: .venv/.installed
	$(BIN)/python benchmarks/text_digits_data.py --out $(TEXT)
	$(LAUNCH) training/precompute_latents.py --vae $(TEXT)/pipeline --output_dir $(TEXT)/latents --data.name parquet \
		--data.data_files $(TEXT)/images.parquet --data.caption_column text --data.image_size 128 --batch_size 100
	$(LAUNCH) training/train_teacher.py --config configs/text-digits/teacher.yaml --model.pipeline $(TEXT)/pipeline \
		--data.name $(TEXT)/latents --seed $(SEED) --output_dir $(TEXT)/teacher --overwrite_output_dir
	$(LAUNCH) training/train_distill.py --config configs/text-digits/distill.yaml --teacher $(TEXT)/teacher \
		--data.data_files $(TEXT)/images.parquet --seed $(SEED) --output_dir $(TEXT)/student --overwrite_output_dir
	$(BIN)/python benchmarks/text_digits.py --pipelines $(TEXT)/teacher $(TEXT)/student --steps 1 4 20 --guidance 1 1.5 \
		--judge $(TEXT)/judge.safetensors --output $(TEXT)/figures
	@echo "Real digits, the teacher's at 1, 4 and 20 steps, the student's: $(TEXT)/figures/text_digits.png"

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not space" -n 2

test-slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

# How much of the package a part of the tests runs, scripts in processes of their own included: TESTS="tests/schedulers"
TESTS ?= tests
coverage: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -m "not slow and not space" $(TESTS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev,docs]"
	touch $@

# The documentation in site/; a broken link or an unknown name fails. `.venv/bin/mkdocs serve` shows it while you write.
docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.venv/.package: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev,package]"
	touch $@

# The wheel and the sdist in dist/, each used from outside the repository.
package: .venv/.package
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	.ci/check-package

.venv/.space: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[demo,dev,space,space-test]"
	touch $@

# The Space on this machine, with the student of the repository: http://127.0.0.1:7860
space: .venv/.space
	$(BIN)/python pipelines/space/app.py --student models/fashion-mnist-student --teacher models/fashion-mnist-teacher

# In a real headless Chromium: Debian's (apt-get install chromium), or the one named by CHROMIUM.
space-test: .venv/.space
	$(BIN)/python -m pytest tests/space -m space

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .hypothesis .pytest_cache .ruff_cache .mypy_cache .coverage* site dist build
