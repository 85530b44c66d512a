#!/usr/bin/env bash
# Run what the page of clients says of LangChain and LiteLLM, which no extra brings: they pull 250 MB of packages.
set -euo pipefail
cd "$(dirname "$0")/.."

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
.venv/bin/python -m pip --disable-pip-version-check install --quiet --target "$outside" \
    --constraint constraints.txt langchain-openai litellm
OMP_NUM_THREADS=1 PYTHONPATH="$outside" .venv/bin/python -m pytest -q -n 0 -rs \
    tests/server/documents/test_clients_page.py -k "text_of_the_runtime"
