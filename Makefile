# make demo   from nothing to a model that answers, on two CPU cores
# make quiz   the score of every checkpoint of a run (RUN=outputs/demo): answers, table and report in RUN/quiz
# make open_book   what the base model answers with the passage before its eyes; make quiz then shows it as a bound
# make test   the whole test suite; ARGS="-m 'not slow'" leaves out what takes minutes
# make faults 40 kills a mode and 20,000 steps on end, half an hour
# make lint   ruff

PYTHON ?= python3
BIN := .venv/bin
CONFIG := configs/demo
RUN := outputs/demo
QUIZ := data/quiz.jsonl
BASE := models/gemma-3-270m
BASE_TEMPLATE := tools/plain_template.jinja
ARTICLES := data/sample_articles.jsonl
OPEN_BOOK = outputs/open_book/$(basename $(notdir $(QUIZ)))
ANSWERS := outputs/demo/answers.jsonl

export HF_HUB_OFFLINE ?= 1

# $(call stage,NAME,COMMAND): runs the command and tells the time it took
define stage
	@start=$$(date +%s); echo "== $(1)"; $(2) && echo "== $(1): $$(( $$(date +%s) - start )) s"
endef

.PHONY: demo quiz open_book test faults lint
.DELETE_ON_ERROR:

demo: .venv/installed
	$(call stage,model,$(BIN)/python tools/fetch_gemma.py)
	$(call stage,preprocess,$(BIN)/python preprocess.py --config $(CONFIG)/preprocess.yaml)
	$(call stage,train,$(BIN)/python train.py --config $(CONFIG)/train.yaml)
	$(call stage,answers,$(BIN)/python generate.py --config $(CONFIG)/generate.yaml --output_file $(ANSWERS))

# A checkpoint that cannot answer is told and left out: the others are scored, and make fails at the end.
quiz: .venv/installed
	@mkdir -p $(RUN)/quiz; rm -f $(RUN)/quiz/answers.jsonl $(RUN)/quiz/incomplete
	$(call stage,answers,$(BIN)/python generate.py --config configs/quiz.yaml --prompts_file $(QUIZ) --checkpoint $(RUN) \
		--output_file $(RUN)/quiz/answers.jsonl || { touch $(RUN)/quiz/incomplete; test -f $(RUN)/quiz/answers.jsonl; })
	$(call stage,score,$(BIN)/python tools/score.py --quiz $(QUIZ) --answers $(RUN)/quiz/answers.jsonl --report $(RUN)/quiz \
		$(addprefix --log ,$(wildcard $(RUN)/training_log.jsonl)) $(addprefix --open_book ,$(wildcard $(OPEN_BOOK)/answers.jsonl)))
	@test ! -f $(RUN)/quiz/incomplete

open_book: .venv/installed-eval
	@mkdir -p $(OPEN_BOOK)
	$(call stage,prompts,$(BIN)/python tools/open_book.py --quiz $(QUIZ) --articles $(ARTICLES) --output_file $(OPEN_BOOK)/prompts.jsonl)
	$(call stage,answers,$(BIN)/python generate.py --config configs/quiz.yaml --prompts_file $(OPEN_BOOK)/prompts.jsonl \
		--checkpoint $(BASE) --chat_template_path $(BASE_TEMPLATE) --max_new_tokens 32 --batch_size 16 --output_file $(OPEN_BOOK)/answers.jsonl)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

faults: .venv/installed-test
	FAULTS=40 $(BIN)/python -m pytest -s tests/faults

lint: .venv/installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv

.venv/installed: requirements.txt | .venv/bin/python
	$(call stage,environment,$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt)
	@touch $@

.venv/installed-eval: requirements-eval.txt .venv/installed
	$(call stage,evaluation environment,$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-eval.txt)
	@touch $@

.venv/installed-test: requirements-test.txt requirements-eval.txt requirements-tools.txt .venv/installed
	$(call stage,test environment,$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-test.txt)
	@touch $@
