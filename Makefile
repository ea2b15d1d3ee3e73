# pg_crossover: build, test and show.
#
#   make demo     a live migration between two throwaway PostgreSQL servers, under load, there and back
#   make test     everything that CI runs
#   make help     all targets
#
# What is missing on a Debian machine with a Rust toolchain is installed first (root, or a user with sudo).
# Nothing here touches an installed PostgreSQL server or its clusters, but `make install`: tests and the demo use a copy of the
# server in a throwaway prefix and clusters of their own in temporary directories. As root, servers run as user postgres.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory
.NOTPARALLEL:

PGRX_VERSION := 0.18.1

# The PostgreSQL major version. `make test` goes through all that are TESTED; the single targets take PG=18, say. 15 comes from Debian's
# packages, 18 as a wheel from PyPI. PG_CONFIG=/path/to/pg_config names another server (with headers) to test or to install into.
ifdef PG_CONFIG
PG := $(shell $(PG_CONFIG) --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/')
TESTED := $(PG)
SERVER := pg$(PG)-$(shell printf %s '$(PG_CONFIG)' | sha256sum | cut -c1-8)
else
TESTED := $(if $(PG),$(PG),15 18)
PG ?= 15
SERVER := pg$(PG)
endif
INSTALL_PG_CONFIG := $(or $(PG_CONFIG),/usr/lib/postgresql/$(PG)/bin/pg_config)

ROOT_USER := $(filter 0,$(shell id -u))

# Where the copies of the servers, pgrx' configurations and (if the PATH has no cargo-pgrx $(PGRX_VERSION)) cargo-pgrx go.
CROSSOVER_PREFIX ?= $(if $(ROOT_USER),/var/tmp/pg_crossover,$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pg_crossover)

# One copy of the server for clusters, one for `cargo pgrx test`, which installs a build with other features.
CLUSTER_PG_CONFIG := $(CROSSOVER_PREFIX)/$(SERVER)/pg_config
PGRX_PG_CONFIG := $(CROSSOVER_PREFIX)/$(SERVER)-pgrx/pg_config

# The extension is built for one server at a time: a target directory for each. The harness of the tests does not depend on it.
CROSSOVER_TARGET_DIR := $(or $(CROSSOVER_TARGET_DIR),$(CARGO_TARGET_DIR),$(CURDIR)/target)
override CARGO_TARGET_DIR := $(CROSSOVER_TARGET_DIR)$(if $(filter pg15,$(SERVER)),,/$(SERVER))

export CROSSOVER_PREFIX
export CROSSOVER_TARGET_DIR
export PATH := $(CROSSOVER_PREFIX)/cargo/bin:$(PATH)
export CARGO_TARGET_DIR
export PGRX_HOME := $(CROSSOVER_PREFIX)/pgrx-$(SERVER:pg%=%)

# The tests and the demo run the same build: unoptimized as far as Cargo.toml's dev profile says, with fault points (which nobody
# arms in the demo). The work is done by the servers and by SQL; a second build would take minutes and show the same.
FEATURES := pg$(PG)
TEST_FEATURES := $(FEATURES),fault-points
SOURCES := Cargo.toml Cargo.lock pg_crossover.control $(wildcard .cargo/*) $(shell find src sql -type f 2>/dev/null)
INSTALLED := $(CROSSOVER_PREFIX)/$(SERVER)/installed
CARGO := .ci/with-libpq $(CLUSTER_PG_CONFIG) cargo
HARNESS := CARGO_TARGET_DIR=$(CROSSOVER_TARGET_DIR) cargo

.PHONY: help demo test test-server lint install test-unit test-pgrx test-regress test-cluster test-build setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s $$'\t'

demo: test-build ## a live migration of a shop with 1.2 million rows, under load, through every state and back
	$(HARNESS) build --quiet --manifest-path pgrx-tests/Cargo.toml --bin demo
	PG_CONFIG=$(CLUSTER_PG_CONFIG) $(CROSSOVER_TARGET_DIR)/debug/demo

# Takes minutes, for two million rows go through a whole life, and what it looks at does not depend on the version: on the first one only.
ONCE := number_of_rows

# Each version in a make of its own, with the variables that it was called with.
test: ## all of the following, on PostgreSQL 15 and 18, as CI runs it; one of them: PG=18
	@$(MAKE) lint test-unit PG=$(firstword $(TESTED))
	@skip=; for pg in $(TESTED); do echo "== PostgreSQL $$pg"; $(MAKE) test-server PG=$$pg SKIP=$$skip || exit 1; skip=$(ONCE); done

test-server: test-pgrx test-regress test-cluster

lint: setup ## formatting and clippy, warnings are errors
	cargo fmt --all --check
	$(CARGO) clippy --workspace --all-targets --no-default-features --features $(TEST_FEATURES),pg_test -- -D warnings

# pgrx names what runs in a server pg_*. Same features as below, so that it is one build.
test-unit: setup ## the pure logic, without a server
	$(CARGO) test --package pg_crossover --lib --no-default-features --features $(TEST_FEATURES),pg_test $(T) -- --skip ::pg_

test-pgrx: setup ## the SQL surface, inside a server (cargo pgrx test)
	.ci/with-libpq $(CLUSTER_PG_CONFIG) .ci/pgrx-test $(PG) $(TEST_FEATURES) $(T)

test-regress: test-build ## the SQL surface, as a client sees it (pg_regress)
	.ci/regress $(CLUSTER_PG_CONFIG) $(T)

# Tests wait more than they compute.
test-cluster: test-build ## real clusters, real clients; one test: make test-cluster T=name
	PG_CONFIG=$(CLUSTER_PG_CONFIG) RUST_TEST_THREADS=$${RUST_TEST_THREADS:-$$(( 2 * $$(nproc) ))} \
	    $(HARNESS) test --manifest-path pgrx-tests/Cargo.toml $(T) $(addprefix -- --skip ,$(SKIP))

test-build: setup ## the extension with fault points, in the throwaway prefix
	@$(MAKE) --silent $(INSTALLED)

# The library is removed first: a server that still runs with it keeps its own.
$(INSTALLED): $(SOURCES) $(CROSSOVER_PREFIX)/$(SERVER)/version
	rm -f $$($(CLUSTER_PG_CONFIG) --pkglibdir)/pg_crossover.so
	$(CARGO) pgrx install --package pg_crossover --pg-config $(CLUSTER_PG_CONFIG) --no-default-features --features $(TEST_FEATURES)
	touch $@

install: ## a release build into PG=15 (or PG_CONFIG=/path/to/pg_config)
	.ci/setup build $(PGRX_VERSION) $(if $(PG_CONFIG),,$(PG))
	.ci/with-libpq $(INSTALL_PG_CONFIG) .ci/install $(INSTALL_PG_CONFIG)

setup: ## what the other targets need: Debian packages, cargo-pgrx, copies of the server
	@.ci/setup test $(PGRX_VERSION) $(PG) $(PG_CONFIG)
	@.ci/prefix $(PG) $(CROSSOVER_PREFIX)/$(SERVER) $(PG_CONFIG)
	@.ci/prefix $(PG) $(CROSSOVER_PREFIX)/$(SERVER)-pgrx $(PG_CONFIG)
	@grep -qsF '"$(PGRX_PG_CONFIG)"' $(PGRX_HOME)/config.toml || cargo pgrx init --pg$(PG)=$(PGRX_PG_CONFIG) --no-run

clean: ## remove what was built, and the copies of the servers
	CARGO_TARGET_DIR=$(CROSSOVER_TARGET_DIR) cargo clean --quiet
	rm -rf $(wildcard $(CROSSOVER_PREFIX)/pg1* $(CROSSOVER_PREFIX)/pgrx-*)
