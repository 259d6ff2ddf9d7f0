PYTHON ?= python3
BIN := .venv/bin
# Threads that wait for each other by spinning make training ten times slower where the cores are shared.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install quickstart test test-slow lint

install: .venv/installed

# albumentations asks for OpenCV without windows, which takes the place of the one that predict.py --show needs.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip uninstall --quiet --yes opencv-python-headless
	$(BIN)/pip install --quiet --force-reinstall --no-deps opencv-python
	touch $@

quickstart: install
	$(BIN)/python tools/train.py --config configs/classify/digits.yaml --resume
	$(BIN)/python tools/train.py --config configs/detect/digits.yaml --resume
	$(BIN)/python tools/evaluate.py --weights runs/classify/digits/weights/best.safetensors --data digits
	$(BIN)/python tools/evaluate.py --weights runs/detect/digits/weights/best.pt --data digits-scenes
	$(BIN)/python tools/predict.py --weights runs/classify/digits/weights/best.safetensors --source digits
	$(BIN)/python tools/predict.py --weights runs/detect/digits/weights/best.pt --source digits-scenes

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/pytest -n auto

test-slow: install
	$(BIN)/pytest -m slow -n auto
