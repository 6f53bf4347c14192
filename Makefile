# Everything here sets itself up. `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin
.DEFAULT_GOAL := help

# On a shared CI machine what was kept waiting too long gets a second chance. The summary names them.
RERUN := -rR --reruns 1 --only-rerun '^AssertionError: (Page|Locator) ' --only-rerun 'TimeoutError: .*Timeout [0-9]+ms exceeded' \
	--only-rerun 'It did not happen in time' --only-rerun 'ReadTimeout'

.PHONY: help run run-production restart-production manage-production test screenshots audit audit-dependencies css doctor backup lint format bench bench-history bench-dashboard bench-serving storm lock clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

# A stamp for each set of packages, renewed when its lock file changes. The development set contains the local one.
.venv/stamp-%: requirements/%.txt
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Install Python 3.11 or newer, or name one: make run PYTHON=python3.12"; exit 1; }
	@$(PYTHON) postmate/install.py $*
	@touch $@

run: .venv/stamp-local ## Run the whole product here: http://localhost:8000 (PORT=… for another)
	@exec $(BIN)/python -m postmate.run

run-production: .venv/stamp-local ## Run it as production does: https://localhost:8443 (PORT=… for another)
	@exec $(BIN)/python -m postmate.run_production

restart-production: .venv/stamp-local ## Restart what `make run-production` runs, one process at a time, unnoticed
	@$(BIN)/python -m postmate.run_production restart

manage-production: .venv/stamp-local ## A command there: make manage-production ARGS="createsuperuser"
	@$(BIN)/python -m postmate.run_production manage $(ARGS)

test: .venv/stamp-dev ## Run all tests against real PostgreSQL, Redis and Chromium
	@$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(if $(CI),$(RERUN))

screenshots: .venv/stamp-dev ## Picture every page, both widths and themes, into artifacts/screenshots/
	@SCREENSHOTS=all $(BIN)/python -m pytest tests/journeys

tests/audit/node_modules/.package-lock.json: tests/audit/package-lock.json
	@command -v npm >/dev/null || { echo "The audit needs Node.js 20 or newer, with npm."; exit 1; }
	@echo "Installing Lighthouse and axe …"
	@cd tests/audit && PUPPETEER_SKIP_DOWNLOAD=1 npm ci --ignore-scripts --silent
	@touch $@

audit: .venv/stamp-dev tests/audit/node_modules/.package-lock.json ## Measure pages with Lighthouse, look at all of them with axe (needs npm)
	@$(BIN)/python -m tests.audit $(ONLY) $(PART)

audit-dependencies: .venv/stamp-dev ## Look for known vulnerabilities in what production installs (needs the internet)
	@$(BIN)/python -m tests.audit.dependencies

css: .venv/stamp-local ## Take from Tabler the rules that the pages use, into static/css/tabler.css
	@$(BIN)/python -m postmate.stylesheet

doctor: .venv/stamp-local ## Look at everything here and say what is wrong and what to do (ARGS="--quick --json")
	@$(BIN)/python -m postmate.run_doctor $(ARGS)

backup: .venv/stamp-local ## Write the local data into one file: .postmate/backups/ (restore: docs/OPERATIONS.md)
	@$(BIN)/python manage.py backup

lint: .venv/stamp-dev ## Check style, types, templates, layering and migrations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/djlint templates --lint --quiet
	$(BIN)/lint-imports
	$(BIN)/mypy .
	$(BIN)/python manage.py makemigrations --check --dry-run

format: .venv/stamp-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/stamp-dev ## Measure the debit beside pgbench, and a metered AI call beside a bare one
	@$(BIN)/python -m tests.benchmarks.debit
	@echo
	@$(BIN)/python -m tests.benchmarks.metering

bench-history: .venv/stamp-dev ## Measure the history of an account with a million entries (takes some minutes)
	@$(BIN)/python -m tests.benchmarks.history

bench-dashboard: .venv/stamp-dev ## Measure the dashboard on a million ledger entries (takes some minutes)
	@$(BIN)/python -m tests.benchmarks.dashboard

bench-serving: .venv/stamp-dev ## Measure what one machine serves, and what limits it (takes three minutes)
	@$(BIN)/python -m tests.benchmarks.serving

storm: .venv/stamp-dev ## Let 200 people pay while everything fails, and restart production under load (SEED=… repeats one)
	@$(BIN)/python -m tests.storms.payments $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -m pytest -m storm

lock: .venv/stamp-dev ## Resolve the dependencies of pyproject.toml anew
	@for set in production: "local:--group local" "dev:--group local --group dev"; do \
	  $(BIN)/uv pip compile --quiet pyproject.toml $${set#*:} --universal --python-version 3.11 --upgrade \
	    --generate-hashes --no-emit-index-url --no-annotate --no-strip-extras --custom-compile-command "make lock" \
	    -o requirements/$${set%%:*}.txt || exit 1; done

clean: ## Remove what the commands above made, the local data included
	rm -rf .venv .postmate staticfiles artifacts tests/audit/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
