# make help lists the targets. Each one that runs Python makes .venv from the pinned requirements first.
# Variables: DATASET=imdb|reviews|hh|ultrafeedback  PRESET=smoke|quick|cpu|paper  MODEL=gpt2|smollm2|llama-3.2-1b|DIRECTORY|HUB NAME  DATA=FOLDER of local files, searched first  PROCESSES=N for train and eval, one for each GPU

train: DATASET ?= imdb
synth rivals: DATASET ?= adult
METHOD ?= aim
EPSILON ?= 1
PY := .venv/bin/python
# As many processes as cores, each with one thread: threads of two processes that share cores wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --dist worksteal
RUN_ALL := $(if $(PROCESSES),.venv/bin/torchrun --standalone --nproc-per-node $(PROCESSES),$(PY))
OPTIONS := $(if $(PRESET),--preset $(PRESET)) $(if $(MODEL),--model $(MODEL)) $(if $(DATA),--data-folder $(DATA))

help:                     ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## /  make \1\t/p' Makefile
	@sed -n '2p' Makefile

train: .venv/ready        ## the whole experiment: data, reference, DPO and mixtures, table and pictures
	$(RUN_ALL) -m data.$(DATASET) $(OPTIONS)

eval: .venv/ready         ## evaluate again and rewrite the report: make eval RUN=runs/imdb-quick
	$(RUN_ALL) eval.py $(RUN)

show: .venv/ready         ## one batch, its prompt, response, end token and padding in different colours: make show RUN=runs/imdb-quick
	$(PY) -m mixdpo.evaluation.show $(RUN)/train.jsonl

chat: .venv/serve       ## a page where the experts of a run answer side by side, and OpenAI's API: make chat RUN=runs/imdb-quick
	$(PY) -m mixdpo.serving $(RUN)

test: .venv/ready         ## what a reader runs: the method, models, text, and a tiny job from training to evaluation
	$(PYTEST) tests/method tests/models tests/text tests/evaluation/test_eval.py -m "not slow"

test-all: .venv/files .venv/serve-tests   ## every test, and every two options of train.py together
	$(PYTEST) tests --ignore=tests/peers --ignore=tests/bench --ignore=tests/chaos --show-capture=no

lint: .venv/lint          ## ruff on all files, mypy on mixdpo/, train.py and eval.py
	$(PY) -m ruff check .
	$(PY) -m mypy

bench: .venv/peers        ## time and memory of a step, side by side with plain PyTorch and TRL
	OMP_WAIT_POLICY=PASSIVE $(PY) -m tests.bench.step

bench-gpu: .venv/ready    ## what only a GPU can show: the kernels' tests, time and memory; writes docs/results/h100.md
	$(PY) -m tests.bench.gpu

study: .venv/ready        ## one study, its page in docs/studies: make study NAME=fixed|separation|gate|collapse|ood|noise|experts|data|peers|synth|parity|privacy|audit|starts|conflict|rankings|auto
	$(PY) -m data.studies --name $(NAME) $(if $(PRESET),--preset $(PRESET)) $(if $(DATA),--data-folder $(DATA))

synth: .venv/ready        ## a private synthetic table, what it cost and how close it is to the real table: make synth DATASET=adult EPSILON=1
	$(PY) -m data.tables.synth --dataset $(DATASET) --epsilon $(EPSILON) --out runs/$(DATASET)-epsilon-$(EPSILON) $(if $(PRESET),--preset $(PRESET)) $(if $(DATA),--data-folder $(DATA))

rivals: .venv/rivals      ## a sample of a packaged method, for the study synth: make rivals DATASET=credit METHOD=aim EPSILON=1
	$(PY) -m data.tables.rivals --dataset $(DATASET) --method $(METHOD) --epsilon $(EPSILON) $(if $(SEED),--seed $(SEED)) $(if $(DATA),--data-folder $(DATA))

chaos: .venv/chaos        ## runs that are killed, disks that fail, files that are damaged: a table of what survived
	$(PY) -m tests.chaos

peers: .venv/peers        ## the same numbers as transformers, tokenizers, PEFT, TRL, opake, biogeme and loggers give
	$(PY) -m pytest tests/peers

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/peers: .venv/ready tests/peers/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/peers/requirements.txt
	touch $@

.venv/chaos: .venv/ready tests/chaos/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/chaos/requirements.txt
	touch $@

.venv/rivals: .venv/ready data/tables/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r data/tables/requirements.txt
	touch $@

.venv/files: .venv/ready tests/text/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/text/requirements.txt
	touch $@

.venv/serve: .venv/ready mixdpo/serving/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r mixdpo/serving/requirements.txt
	touch $@

.venv/serve-tests: .venv/serve tests/serving/requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/serving/requirements.txt
	touch $@

.venv/lint: .venv/ready tests/lint-requirements.txt
	$(PY) -m pip install --quiet --disable-pip-version-check -r tests/lint-requirements.txt
	touch $@

.PHONY: help train eval show chat test test-all lint bench bench-gpu study synth rivals chaos peers
