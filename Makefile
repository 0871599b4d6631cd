# Each target does its own set-up; on Debian python3, make and git are enough to begin with.

PYTHON ?= python3
# Processes that run tests side by side, each with an engine of its own where none answers. Most tests wait, not work.
JOBS ?= 3

MINUTES ?= 10

.PHONY: help run test fuzz soak bench lint dist engine-stop clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

run: ## start the runner on 127.0.0.1:7071, with an engine of its own if none answers
	@exec $(PYTHON) -m dev.prepare run

test: ## all tests, on a real engine; ARGS goes to pytest: make test ARGS="-k auth"
	@$(PYTHON) -m dev.prepare test
	@exec .venv/bin/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

fuzz: ## the property tests with many examples, again and again for MINUTES (10) or until one fails
	@$(PYTHON) -m dev.prepare test
	@end=$$(($$(date +%s) + $(MINUTES) * 60)); while [ $$(date +%s) -lt $$end ]; do \
	  .venv/bin/python -m pytest -q -p tests.fuzzing -m hypothesis --maxfail 1 $(ARGS) || exit; done

soak: ## all operations at once for MINUTES (10) while the engine halts and dies, then a look at what is left
	@$(PYTHON) -m dev.prepare test
	@.venv/bin/python tests/soak.py $(MINUTES) $(ARGS)

bench: ## how fast it is, beside the engine itself and HAProxy: tables, JSON and a plot; make bench ARGS=--help
	@$(PYTHON) -m dev.prepare bench
	@exec .venv/bin/python -m bench $(ARGS)

lint: ## ruff (lint and format) and mypy --strict
	@$(PYTHON) -m dev.prepare lint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

dist: ## one file with everything inside, for this Python and machine: dist/docker-runner-cp3XX-linux_MACHINE.pyz
	@$(PYTHON) -m dev.prepare dist
	@.venv/bin/python -m dev.dist

engine-stop: ## stop the engine that `make run` started; its images stay
	@$(PYTHON) -m dev.private_engine stop

clean: ## stop that engine and remove all that was made here but .env
	@$(PYTHON) -m dev.private_engine remove
	rm -rf .dev .venv tests/sdk/node_modules build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
