# One command for each job. The first command that needs Python makes .venv and installs the dependencies of setup.cfg.
# CONFIG is another YAML, ARGS overrides any of its fields, SEED is the seed of pipeline, sft, grpo and sweep.
# GPUS=8 trains on 8 GPUs with the same total batch.
#   make grpo CONFIG=experiments/configs/paper/grpo_7b.yaml GPUS=8 ARGS="--model.loss.kl_beta=0.01"
#   make pipeline SEED=1
# A command may ask whether to keep results from before source files changed. KEEP=1 or REDO=1 answers this question.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
CONFIG ?=
MODEL ?=
MODELS ?=
BENCH ?=
IMAGES ?=
REPO ?=
QUESTION ?=
export QUESTION
ARGS ?=
SOURCE ?=
ROOT ?=
BOXES ?=
DATA ?=
SEED ?=
GPUS ?=
RUNS ?=
SEEDS ?=
ROWS ?=
SWEEP ?=
KEEP ?=
REDO ?=
NANO := experiments/configs/nano
# A misspelt variable, such as ARG= for ARGS=, would be ignored and a full run started.
VARIABLES := PYTHON VENV CONFIG MODEL MODELS BENCH IMAGES REPO QUESTION ARGS SOURCE ROOT BOXES DATA SEED GPUS RUNS SEEDS ROWS SWEEP KEEP REDO \
	VLLM_VENV BENCH_PYTHON STAMP
given := $(foreach name,$(.VARIABLES),$(if $(findstring command line,$(origin $(name))),$(name)))
unknown := $(filter-out $(VARIABLES) MAKE% -%,$(given))
$(if $(unknown),$(error no variable $(unknown) here; nothing was started. The variables are: $(VARIABLES)))
# So would a variable that the target does not read, such as SEED=1 for SEEDS=1 of ablations, or MODEL= of grpo.
of_CONFIG := pipeline smoke ablations shards sft grpo sweep eval synthesize
of_MODEL := inspect vllm-server eval ask demo publish
of_MODELS := demo
of_BENCH := eval predictions
of_IMAGES := ask
of_QUESTION := ask
of_REPO := publish
of_SOURCE := shards
of_ROOT := shards
of_BOXES := shards
of_DATA := inspect eval
of_SEED := pipeline sft grpo sweep
of_GPUS := pipeline sft grpo eval
of_RUNS := compare predictions
of_SEEDS := ablations
of_ROWS := ablations
of_SWEEP := agent
of_KEEP := pipeline smoke ablations sft grpo sweep eval synthesize
of_REDO := $(of_KEEP)
unread = $(if $(and $($(2)),$(of_$(2))),$(if $(filter $(1),$(of_$(2))),,$(error make $(1) does not read \
	$(2)=$($(2)); nothing was started. $(2) is for: $(of_$(2)))))
$(foreach goal,$(MAKECMDGOALS),$(foreach name,$(given),$(call unread,$(goal),$(name))))
# $(call config,name): CONFIG, or the nano YAML of this name.
config = --config $(or $(CONFIG),$(NANO)/$(1).yaml)
comma := ,
space := $(subst ,, )
# $(call list,a b): the value [a,b] for a flag.
list = '[$(subst $(space),$(comma),$(strip $(1)))]'
# Several are one flag: of two flags, the last one would count alone.
bench = $(addprefix --bench ,$(subst $(space),$(comma),$(strip $(1))))
seed = $(if $(SEED),--seed $(SEED)) $(if $(GPUS),--gpus $(GPUS))
answer = $(if $(filter-out 0,$(REDO)),--redo) $(if $(filter-out 0,$(KEEP)),--keep)
# What the nano default needs and what is not there yet: $(call absent,file that marks its end,path). Another CONFIG has its
# own data and models.
absent = $(if $(CONFIG)$(wildcard $(1)),,$(2))
data = $(call absent,data/nano/done.json,data/nano)
cot_sft = $(call absent,outputs/nano/cot_sft/merged,outputs/nano/cot_sft)
base = $(call absent,models/nano-base/model.safetensors,models/nano-base)
# The synthetic dataset is generated once; a finished one is kept, also if `make shards` has made it with other ARGS.
make_data = $(if $(data),$(PY) -m experiments.generate_synthetic --config $(NANO)/shards.yaml --keep=true)
# A mistake is told before something is made, which takes minutes: $(call check,what is not there yet) checks all but that.
check = $(if $(strip $(1)),@$(command) --check_without $(call list,$(1)))
# SOURCE is the name of a source, or the YAML of a mixture. BOXES is what the four numbers of your own boxes mean.
import = import_shards $(if $(filter %.yaml,$(SOURCE)),--config,--source) $(SOURCE) $(if $(ROOT),--root $(ROOT)) \
	$(if $(BOXES),--own.box_format $(BOXES))
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline
# The tensors in the tests are tiny. On two cores, a second OpenMP thread made the tests many times slower.
ONE_THREAD := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help pipeline smoke ablations base shards inspect sft grpo vllm-server sweep agent eval ask demo publish rescore synthesize tables runs report compare
.PHONY: predictions watch
.PHONY: dashboard bench bench-gpu chaos lint test test-slow clean

help:  ## Print this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@printf '\n  CONFIG=file.yaml  another configuration      ARGS="--model.loss.kl_beta=0.01"  override any field\n'
	@printf '  KEEP=1, REDO=1    keep results from before source files changed, or make them again\n'
	@printf '  SEED=1            of pipeline, sft, grpo, sweep      GPUS=8  for pipeline, sft, grpo, eval\n  PYTHON=python3.12 the Python that makes .venv\n'

$(STAMP): setup.cfg
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --editable '.[dev]'
	touch $@

pipeline: command = $(PY) -m experiments.pipeline $(call config,pipeline) --seed $(or $(SEED),0) $(if $(GPUS),--gpus $(GPUS)) $(answer) $(ARGS)
pipeline: $(STAMP)  ## Base model, CoT-SFT, rejection sampling, GRPO, MIG-Bench after each stage, and the report (the main job)
	$(call check,$(base))
	$(if $(CONFIG),,$(PY) -m experiments.nano.pretrain --processes 2)
	$(command)

smoke: $(STAMP)  ## The pipeline with few steps and questions, in about two minutes: does everything work here?
	$(PY) -m experiments.pipeline $(call config,smoke) $(answer) $(ARGS)

ablations: command = $(PY) -m experiments.ablations $(call config,ablations) $(if $(SEEDS),--seeds $(call list,$(SEEDS))) \
	$(if $(ROWS),--only $(call list,$(ROWS))) $(answer) $(ARGS)
ablations: $(STAMP)  ## The paper's Tables 2, 3 and 9: all rows or ROWS="sft grpo", with SEEDS="0 1 2"; resumes, reuses `make pipeline`
	$(call check,$(base))
	$(if $(CONFIG),,$(PY) -m experiments.nano.pretrain --processes 2)
	$(command)

base: $(STAMP)  ## Pretrain the nano base model (an hour on two CPU cores; resumes)
	$(PY) -m experiments.nano.pretrain --processes 2 $(ARGS)

shards: $(STAMP)  ## Generate the synthetic dataset, or import data: SOURCE=mgrounding|refcoco|odinw|v3det|jsonl|hf|coco|mixture.yaml ROOT=folder
	$(PY) -m experiments.$(if $(SOURCE),$(import),generate_synthetic $(call config,shards)) $(ARGS)

inspect: $(STAMP)  ## A page of samples with their boxes, before training on them: DATA=folder of shards, MODEL=folder counts tokens
	$(PY) -m experiments.inspect_shards --data $(or $(DATA),$(error DATA=folder is missing)) \
		$(if $(MODEL),--model $(MODEL)) $(ARGS)

sft: command = $(PY) -m experiments.train $(call config,cot_sft) $(seed) $(answer) $(ARGS)
sft: $(STAMP)  ## Train CoT-SFT (LoRA) and merge
	$(call check,$(data))
	$(make_data)
	$(command)

grpo: command = $(PY) -m experiments.train $(call config,grpo) $(seed) $(answer) $(ARGS)
grpo: $(STAMP)  ## Rejection-sample with the model of `make sft`, train GRPO and merge
	$(call check,$(data))
	$(make_data)
	$(command)

sweep: command = $(PY) -m experiments.sweep $(call config,sweep) $(if $(SEED),--seed $(SEED)) $(answer) $(ARGS)
sweep: $(STAMP)  ## Sweep λ, β and other settings of GRPO, on W&B or without a key on this machine; resumes: ARGS="--trials 8"
	$(call check,$(data) $(cot_sft))
	$(if $(cot_sft),$(MAKE) sft SEED= ARGS=)
	$(make_data)
	$(command)

agent: $(STAMP)  ## Join a W&B sweep from another machine: SWEEP=entity/project/id
	$(PY) -m experiments.sweep --join $(or $(SWEEP),$(error SWEEP=entity/project/id is missing)) $(ARGS)

# This command needs no .venv: the server has its own environment.
VLLM_VENV ?= .venv-vllm
vllm-server:  ## Serve rollouts for GRPO with model.rollout.engine=vllm: MODEL=folder, ARGS="--port 8001"; on a GPU if there is one
	$(PYTHON) lightning_modules/serving/vllm_server.py --venv $(VLLM_VENV) $(if $(MODEL),--model $(MODEL)) $(ARGS)

eval: command = $(PY) -m experiments.evaluate $(call config,eval) $(if $(MODEL),--model $(MODEL)) $(call bench,$(or $(DATA),$(BENCH))) \
	$(if $(GPUS),--processes $(GPUS)) $(answer) $(ARGS)
eval: $(STAMP)  ## Evaluate any model on MIG-Bench, BENCH=all (or ref_l4,...), or shards DATA=data/kites/val: MODEL=outputs/nano/grpo/merged
	$(if $(DATA),,$(call check,$(data)))
	$(if $(DATA),,$(make_data))
	$(command)

ask: $(STAMP)  ## Ask a model about your own images: MODEL=folder IMAGES="a.jpg b.jpg" QUESTION="..."; boxes in pixels and a drawing
	@$(PY) -m experiments.asking.ask_model --model $(or $(MODEL),nano) --images $(call list,$(IMAGES)) --question "$$QUESTION" $(ARGS)

demo: $(STAMP)  ## A local page for your own images, up to three models side by side: MODEL=folder, MODELS="a b c", or nano's
	@$(PY) -m experiments.asking.demo $(if $(or $(MODELS),$(MODEL)),--models $(call list,$(or $(MODELS),$(MODEL)))) $(ARGS)

publish: $(STAMP)  ## Push a trained model with its card, and its LoRA adapter if it has one, to the Hugging Face Hub: MODEL=outputs/nano/grpo/merged REPO=owner/name
	$(PY) -m experiments.runs.sharing.publish --model $(or $(MODEL),$(error MODEL=folder is missing)) \
		--repo $(or $(REPO),$(error REPO=owner/name is missing)) $(ARGS)

rescore: $(STAMP)  ## Score stored answers again: ARGS="--predictions outputs/eval/models--nano-base/lisa --threshold 0.3"
	$(PY) -m experiments.evaluation.rescore $(ARGS)

tables: $(STAMP)  ## The paper's Tables 2-9 with the measured numbers beside them: Markdown, CSV, and in report.html of every experiment
	$(PY) -m experiments.print_tables $(ARGS)

synthesize: command = $(PY) -m experiments.synthesize $(call config,synthesize) $(answer) $(ARGS)
synthesize: $(STAMP)  ## CoT data from a teacher: the nano CoT-SFT model, served here, or any OpenAI-compatible server
	$(call check,$(data) $(cot_sft))
	$(if $(cot_sft),$(MAKE) sft SEED= ARGS=)
	$(make_data)
	$(command)

runs: $(STAMP)  ## All runs in outputs/: state, AVG, commit, size, age; ARGS=--clean offers to delete what was moved aside
	@$(PY) -m experiments.runs.overview.run_table $(ARGS)

report: $(STAMP)  ## Write report.html of any experiment or evaluation, the latest by default: ARGS="--folder outputs/nano-seed1"
	$(PY) -m experiments.reports.pipeline_report $(ARGS)

compare: $(STAMP)  ## One page that compares runs, with their rollouts: RUNS="outputs/nano outputs/nano-seed1/grpo"
	$(PY) -m experiments.compare --runs $(or $(RUNS),outputs/nano) $(ARGS)

predictions: $(STAMP)  ## A page of a model's answers, or of two models': RUNS="outputs/nano/grpo outputs/nano/cot_sft" BENCH=mig_bench
	$(PY) -m experiments.reports.predictions.browse_answers --runs $(or $(RUNS),outputs/nano/grpo) \
		$(call bench,$(BENCH)) $(ARGS)

watch: $(STAMP)  ## The report of a running experiment in the browser, live: ARGS="--folder outputs/nano --port 8765"
	$(PY) -m experiments.reports.live.watch $(ARGS)

dashboard: $(STAMP)  ## The same as a W&B report (needs a key): ARGS="--experiments nano nano-seed1"
	$(PY) -m experiments.reports.wandb_report $(ARGS)

bench: $(STAMP)  ## Time GRPO and SFT steps beside TRL's on the nano base model, and how ours grow: ARGS="--threads 1"
	$(OFFLINE) $(PY) -m experiments.bench.run --shapes nano $(ARGS)

# This command needs no .venv: BENCH_PYTHON is any Python with torch and transformers, and ARGS="--trl-python ..." another
# one with TRL.
BENCH_PYTHON ?= $(PY)
bench-gpu:  ## The same on a GPU with 7B and 3B shapes and random weights; ends within 9 minutes, run it again to continue
	$(OFFLINE) $(BENCH_PYTHON) -m experiments.bench.run --shapes 7b 3b --minutes 8.5 $(ARGS)

chaos: $(STAMP)  ## Kill a short pipeline 20 times and compare the results with an undisturbed run: ARGS="--kills 40 --seed 1"
	$(OFFLINE) $(ONE_THREAD) $(PY) -m tests.chaos.run_chaos $(ARGS)

lint: $(STAMP)  ## Check style with ruff
	$(PY) -m ruff check .

test: $(STAMP)  ## Run the tests (no network)
	$(OFFLINE) $(ONE_THREAD) $(PY) -m pytest -m 'not slow and not vllm' $(ARGS)

test-slow: $(STAMP)  ## Run the slow tests too (no network)
	$(OFFLINE) $(ONE_THREAD) $(PY) -m pytest $(ARGS)

clean:  ## Remove caches (never outputs, data or models)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
	rm -rf .pytest_cache .ruff_cache .hypothesis build ./*.egg-info
