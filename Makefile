# make          says what there is
# make demo     and make test need nothing but Debian 12, root, Rust, Go and gcc: they call `make deps` themselves
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help deps build test fmt lint unit chart e2e demo demo-down crds deny docs bench fuzz chaos

help: ## This list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## Install what the tests and the demo need, by name
	@e2e/deps.sh

build: ## Build the release binary
	cargo build --release --locked

test: ## Every tier of tests; the last line is "N passed, M failed"
	@e2e/test.sh

fmt: ## Format the Rust code
	cargo fmt

lint: ## Formatting, clippy, shell scripts
	@e2e/test.sh lint

unit: ## Rust tests: unit, schema, connectors, control plane
	@e2e/test.sh rust

chart: ## Checks of the Helm chart and the kustomize bases, without a cluster
	@e2e/test.sh chart

e2e: ## End-to-end tests on a one-node cluster of their own
	@e2e/test.sh e2e

demo: ## A whole mirror on a real cluster (CLUSTER=local|current|kind)
	@e2e/demo/demo.sh up

demo-down: ## Remove everything that the demo made
	@e2e/demo/demo.sh down

crds: ## Generate crds/ from src/resources, and what is made from them in charts/ and config/
	@e2e/crds.sh

deny: ## Licences and bans of the dependencies; advisories where their database can be reached
	@e2e/deps.sh cargo-deny
	@deny=$$(e2e/deps.sh where cargo-deny); "$$deny" check licenses bans sources; \
	if "$$deny" fetch db; then "$$deny" check advisories; \
	else echo "deny: the advisory database can't be reached from here: advisories are NOT checked" >&2; fi

docs: ## Build the book into target/book
	@e2e/deps.sh mdbook
	@"$$(e2e/deps.sh where mdbook)" build docs --dest-dir "$(CURDIR)/target/book"

bench: ## Figures beside psql, pgcopydb and native replication, into benches/results (PRESET=full|short|quick|smoke ROUNDS= SCALE= ONLY= NAME=)
	@e2e/deps.sh packages postgres bench
	@PRESET='$(PRESET)' ROUNDS='$(ROUNDS)' SCALE='$(SCALE)' ONLY='$(ONLY)' NAME='$(NAME)' RESULTS='$(RESULTS)' SLUICE_BIN='$(SLUICE_BIN)' \
	  cargo bench --locked --bench databases

fuzz: ## The targets of fuzz/ under cargo-fuzz (needs nightly Rust), SECONDS_EACH=60
	@rustup run nightly rustc --version >/dev/null 2>&1 || \
	{ echo "fuzz: nightly Rust is missing: rustup toolchain install nightly --profile minimal" >&2; exit 1; }
	@e2e/deps.sh cargo-fuzz
	@cargo test --quiet --locked --test fuzz inputs_to_start_from
	@cp Cargo.lock fuzz/Cargo.lock
	@for target in pgoutput stream; do \
	  mkdir -p "fuzz/corpus/$$target"; \
	  rustup run nightly "$$(e2e/deps.sh where cargo-fuzz)" fuzz run "$$target" "fuzz/corpus/$$target" "target/tmp/fuzz/$$target" \
	    -- -max_total_time="$(or $(SECONDS_EACH),60)" -max_len=65536 -rss_limit_mb=1024; \
	done

chaos: ## Ledger test and transactions of 5 million rows: MINUTES=10 of rounds; SLUICE_SEED=... repeats one; SLUICE_BIN=... another worker
	SLUICE_CHAOS_MINUTES="$(or $(MINUTES),10)" cargo test --locked --test ledger -- --nocapture
	SLUICE_MEMORY_ROWS=5000000 cargo test --locked --test memory -- --nocapture --test-threads=1
