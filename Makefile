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

# The PostgreSQL major version. Tests and the demo need Debian's packages of it; `install` takes any PG_CONFIG.
PG ?= 15
ifdef PG_CONFIG
INSTALL_PG_CONFIG := $(PG_CONFIG)
else
INSTALL_PG_CONFIG := /usr/lib/postgresql/$(PG)/bin/pg_config
endif

ROOT_USER := $(filter 0,$(shell id -u))

# Where the copies of the server, pgrx' configuration and (if the PATH has no cargo-pgrx $(PGRX_VERSION)) cargo-pgrx go.
CROSSOVER_PREFIX ?= $(if $(ROOT_USER),/var/tmp/pg_crossover,$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/pg_crossover)
CARGO_TARGET_DIR ?= $(CURDIR)/target

# One copy of the server for clusters, one for `cargo pgrx test`, which installs a build with other features.
CLUSTER_PG_CONFIG := $(CROSSOVER_PREFIX)/pg$(PG)/usr/lib/postgresql/$(PG)/bin/pg_config
PGRX_PG_CONFIG := $(CROSSOVER_PREFIX)/pg$(PG)-pgrx/usr/lib/postgresql/$(PG)/bin/pg_config

export CROSSOVER_PREFIX
export PATH := $(CROSSOVER_PREFIX)/cargo/bin:$(PATH)
export CARGO_TARGET_DIR
export PGRX_HOME := $(CROSSOVER_PREFIX)/pgrx-$(PG)

# The tests and the demo run the same build: unoptimized as far as Cargo.toml's dev profile says, with fault points (which nobody
# arms in the demo). The work is done by the servers and by SQL; a second build would take minutes and show the same.
FEATURES := pg$(PG)
TEST_FEATURES := $(FEATURES),fault-points
SOURCES := Cargo.toml Cargo.lock pg_crossover.control $(wildcard .cargo/*) $(shell find src sql -type f 2>/dev/null)
INSTALLED := $(CROSSOVER_PREFIX)/pg$(PG)/installed

.PHONY: help demo test lint install test-unit test-pgrx test-regress test-cluster test-build setup clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | column -t -s $$'\t'

demo: test-build ## a live migration of a shop with 1.2 million rows, under load, through every state and back
	cargo build --quiet --manifest-path pgrx-tests/Cargo.toml --bin demo
	PG_CONFIG=$(CLUSTER_PG_CONFIG) $(CARGO_TARGET_DIR)/debug/demo

test: lint test-unit test-pgrx test-regress test-cluster ## all of the following, as CI runs it

lint: setup ## formatting and clippy, warnings are errors
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --no-default-features --features $(TEST_FEATURES),pg_test -- -D warnings

# pgrx names what runs in a server pg_*. Same features as below, so that it is one build.
test-unit: setup ## the pure logic, without a server
	cargo test --package pg_crossover --lib --no-default-features --features $(TEST_FEATURES),pg_test $(T) -- --skip ::pg_

test-pgrx: setup ## the SQL surface, inside a server (cargo pgrx test)
	.ci/pgrx-test $(PG) $(TEST_FEATURES) $(T)

test-regress: test-build ## the SQL surface, as a client sees it (pg_regress)
	.ci/regress $(CLUSTER_PG_CONFIG) $(T)

test-cluster: test-build ## real clusters, real clients; one test: make test-cluster T=name
	PG_CONFIG=$(CLUSTER_PG_CONFIG) cargo test --manifest-path pgrx-tests/Cargo.toml $(T)

test-build: setup ## the extension with fault points, in the throwaway prefix
	@$(MAKE) --silent $(INSTALLED)

# The library is removed first: a server that still runs with it keeps its own.
$(INSTALLED): $(SOURCES) $(CROSSOVER_PREFIX)/pg$(PG)/version
	rm -f $$($(CLUSTER_PG_CONFIG) --pkglibdir)/pg_crossover.so
	cargo pgrx install --package pg_crossover --pg-config $(CLUSTER_PG_CONFIG) --no-default-features --features $(TEST_FEATURES)
	touch $@

install: ## a release build into PG=15 (or PG_CONFIG=/path/to/pg_config)
	.ci/setup build $(PGRX_VERSION) $(if $(PG_CONFIG),,$(PG))
	.ci/install $(INSTALL_PG_CONFIG)

setup: ## what the other targets need: Debian packages, cargo-pgrx, copies of the server
	@.ci/setup test $(PGRX_VERSION) $(PG)
	@.ci/prefix $(PG) $(CROSSOVER_PREFIX)/pg$(PG)
	@.ci/prefix $(PG) $(CROSSOVER_PREFIX)/pg$(PG)-pgrx
	@[ -f $(PGRX_HOME)/config.toml ] || cargo pgrx init --pg$(PG)=$(PGRX_PG_CONFIG) --no-run

clean: ## remove what was built, and the copies of the server
	cargo clean --quiet
	rm -rf $(addprefix $(CROSSOVER_PREFIX)/,pg$(PG) pg$(PG)-pgrx pgrx-$(PG) pgrx-install)
