# make demo       SFT, DPO and evaluation on the bundled data, in minutes on two cores
# make test       lint and the test suite; make test-all runs the slow tests as well
# make parity     install TRL, transformers and peft as well, and compare with them
# make bench      install the peers as well, and time them and ours: about an hour on two cores, or BENCH="--quick"
# make exercise   check one of the exercises of docs/TOUR.md: make exercise N=3
# make sample     write the bundled data and its tokenizer anew
#
# The first call makes .venv and installs the pinned packages. To use an environment of your own, with a
# CUDA build of torch in it for example, name its interpreter: make demo PYTHON=python

PYTHON = .venv/bin/python
ifeq ($(PYTHON),.venv/bin/python)
RUN_READY = .venv/run-ready
DEV_READY = .venv/dev-ready
PARITY_READY = .venv/parity-ready
endif

demo: $(RUN_READY)
	$(PYTHON) -m eval.demo --out runs/demo

# Two processes, each with files of its own; a process of tests uses one thread. The ten slowest are listed.
test: $(DEV_READY) lint
	$(PYTHON) -m pytest -n 2 --dist loadfile --durations=10

test-all: $(DEV_READY) lint
	$(PYTHON) -m pytest -n 2 --dist loadfile --durations=10 -m ""

parity: $(PARITY_READY)
	HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/parity

bench: $(PARITY_READY)
	$(PYTHON) -m bench.run $(BENCH)
	$(PYTHON) -m bench.generation

# A wrong answer is not an error of make.
exercise: $(RUN_READY)
	@$(PYTHON) -m tests.exercises.checks $(N) || true

lint: $(DEV_READY)
	$(PYTHON) -m ruff check .

sample: $(RUN_READY)
	$(PYTHON) -m dataset.sample.generate
	$(PYTHON) -m dataset.tokenizer dataset/sample/sft.jsonl dataset/sample/preferences.jsonl \
		--out dataset/sample/tokenizer.json --vocab-size 2048

.venv/run-ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --requirement requirements.txt
	touch $@

.venv/dev-ready: requirements-dev.txt .venv/run-ready
	.venv/bin/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

.venv/parity-ready: requirements-parity.txt .venv/dev-ready
	.venv/bin/python -m pip install --quiet --requirement requirements-parity.txt
	touch $@

.PHONY: demo test test-all parity bench exercise lint sample
