#!/usr/bin/env bash
# Builds the wheel and the sdist into dist/, checks both, and installs each extra from the wheel in a clean environment,
# where its packages are imported, the doctor finds nothing broken, and what can be run without a GPU is run.
# EXTRAS="cpu server" tries these alone. Uploading is left to whoever releases: twine upload dist/*.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}
install=(--disable-pip-version-check install --quiet --quiet --root-user-action=ignore)

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

"$python" -m venv "$outside/tools"
"$outside/tools/bin/python" -m pip "${install[@]}" build twine check-wheel-contents
rm -rf dist build
"$outside/tools/bin/python" -m build --outdir dist . > "$outside/build.log" 2>&1 || { cat "$outside/build.log" >&2; exit 1; }
"$outside/tools/bin/twine" check --strict dist/*
"$outside/tools/bin/check-wheel-contents" dist/*.whl

wheel=$(echo "$root"/dist/*.whl)
# dev is for the checkout; the doctor leaves it out too.
extras=${EXTRAS:-$("$python" -c 'import sys, tomllib
print(*sorted(set(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]) - {"dev"}))')}
cp .ci/smoke.py "$outside/smoke.py"
cd "$outside"

try() { # NAME EXTRAS: an environment with these extras, in which the doctor finds the first complete
    rm -rf venv work
    "$python" -m venv venv
    venv/bin/python -m pip "${install[@]}" --constraint "$root/constraints.txt" "$wheel[$2]" || return 1
    # Without a GPU, CUDA is the one thing that may be broken.
    venv/bin/tpeft-deploy --quiet doctor --json > found.json 2> failure || [ "$1" = gpu ] || { cat failure; return 1; }
    venv/bin/python -c 'import json, sys
found = {extra["extra"]: extra for extra in json.load(open("found.json"))["extras"]}[sys.argv[1]]
sys.exit(found["state"] != "complete" and f"extra {sys.argv[1]} is {found}")' "$1"
}

failed=
for extra in $extras; do
    if try "$extra" "$extra"; then echo "extra $extra: complete, and imported"; else failed+=" $extra"; fi
done
if [ -z "${EXTRAS:-}" ]; then
    if try export cpu,export,train && venv/bin/python smoke.py; then :; else failed+=" smoke"; fi
fi
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
