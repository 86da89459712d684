# Everything a contributor runs. `make help` lists it.
GO ?= go
FUZZTIME ?= 2m
STATICCHECK = $(GO) tool -modfile=tools/go.mod staticcheck

.DEFAULT_GOAL := help
.PHONY: help run test check bench fuzz build

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: ## The demo: POS, edge, hub, bridge and Kitchens on 127.0.0.1, with a live table (Ctrl-C stops it)
	$(GO) run ./testenv/demo $(ARGS)

test: ## All tests, with the race detector, in random order
	$(GO) test -race -shuffle=on ./...

check: ## What must hold before a commit: formatting, vet, linters, tidy modules, import rules
	@test -z "$$(gofmt -l .)" || { echo "gofmt would change:"; gofmt -l .; exit 1; }
	$(GO) vet ./...
	@d="$$($(GO) fix -diff ./...)"; test -z "$$d" || { echo "$$d"; echo "go fix would change the above"; exit 1; }
	$(GO) mod tidy -diff
	cd tools && $(GO) mod tidy -diff
	$(GO) mod verify
	$(STATICCHECK) ./...
	$(GO) test -run TestImports .

bench: ## Every budget beside its floor, five turns each; writes docs/perf.md (about 5 minutes, wants a quiet machine)
	$(GO) run ./bench -write docs/perf.md

fuzz: ## Fuzz every target for FUZZTIME (2m) each
	@for p in $$($(GO) list ./...); do \
	  for f in $$($(GO) test -list '^Fuzz' $$p | grep '^Fuzz'); do \
	    echo "fuzz $$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 10x $$p || exit 1; \
	  done; \
	done

build: ## Build both programs into bin/
	$(GO) build -o bin/ ./cmd/edge ./cmd/bridge
