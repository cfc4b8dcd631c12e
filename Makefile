# Everything a newcomer runs. `make demo` and `make test` set up what they need.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO := .demo

.PHONY: demo test host check docs engine model bench bench-gateway bench-tools test-tools soak test-gpu clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "hive needs Python 3.11 or newer; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The real engine in an environment of its own, kept outside the checkout and used by every clone.
engine: $(STAMP)
	$(BIN)/hive engine install cpu

model: engine
	test -f $(DEMO)/tiny/config.json || $(BIN)/hive model make-tiny $(DEMO)/tiny

# The main job: a real vLLM on the CPU, an OpenAI client, a streamed answer, and nothing left.
demo: model
	$(BIN)/python examples/demo.py $(DEMO)

# First the checks, and beside them what looks at the whole host. Then the real engine: it fills the
# machine, and there are limits to its start. Then the rest, three at a time: a test waits for a
# third of its time.
test: model
	$(MAKE) --jobs=2 --output-sync=target check host
	$(BIN)/python -m pytest -m engine
	$(BIN)/python -m pytest -m "not host and not engine" -n 3 --dist worksteal

host: $(STAMP)
	$(BIN)/python -m pytest -m host

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# What is generated from the code: errors, settings, endpoints, metrics, commands, requirements.
docs: $(STAMP)
	$(BIN)/python docs/generate.py

# Every benchmark: a table each, with what it is compared with; three minutes.
bench: $(STAMP)
	$(BIN)/python -m benchmarks

# hive's relay beside other proxies and gateways, each on a core of its own; ten minutes.
bench-gateway: $(STAMP)
	$(BIN)/python -m benchmarks.gateway

# What `make bench-gateway` measures beside hive; needs root. Without it they are left out.
bench-tools:
	apt-get install --yes --no-install-recommends nginx-light haproxy
	$(PYTHON) -m venv .bench
	.bench/bin/python -m pip install --quiet sglang-router==0.3.2 vllm-router==0.1.17

# What tests start beside hive, from Debian's packages; needs root. Without it they are skipped, and
# say so. The package's own server is not needed: each test process makes one and ends it.
test-tools:
	apt-get install --yes --no-install-recommends postgresql prometheus prometheus-alertmanager

# Many times over what `make test` does once, on doubles and on the real vLLM: half an hour, an hour
# at most. Each test prints its seed, and says in its file how to repeat it or let it run longer.
MILLION := tests/gateway/test_relay.py::test_two_hundred_streams_at_once_get_every_token_once_and_in_order
soak: model
	$(BIN)/python -m pytest steps/test_kills.py steps/test_soak.py steps/test_overload.py \
	  steps/test_permits.py steps/test_fuzz.py steps/test_openapi.py $(MILLION) steps/test_engine_kills.py \
	  --soak -s --session-timeout=3600

# What only a GPU can show; HIVE_GPU_PYTHON names a Python with torch for CUDA (docs/gpu.md).
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu --timeout=600

clean:
	rm -rf $(VENV) $(DEMO) .bench build *.egg-info
