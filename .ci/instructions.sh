#!/usr/bin/env bash
# Compare the instructions of key paths with the stored ones, with valgrind where it is or apt can install it.
set -euo pipefail
cd "$(dirname "$0")/.."
if ! command -v valgrind > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq && apt-get install -qq -y --no-install-recommends valgrind \
        || echo "valgrind cannot be installed"
fi
# make turns every exit status into 2, and here "not measured" (77) is no failure.
status=0
OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.instructions || status=$?
if [ "$status" = 77 ]; then
    echo "skipped: the instructions of key paths"
    exit 0
fi
exit "$status"
