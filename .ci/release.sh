#!/usr/bin/env bash
# Builds the wheel and the sdist into dist/, checks both, and, on each Python that pyproject.toml's classifiers name,
# installs each extra from the wheel in a clean environment, where its packages are imported, the doctor finds nothing
# broken, and what can be run without a GPU is run. Everything but dist/ is in a temporary directory, which is removed.
# EXTRAS="cpu server" tries these alone, PYTHONS="3.12" these Pythons. Uploading is left to whoever releases:
# twine upload dist/*.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-$root/.venv/bin/python}

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

pip() { "$outside/tools/bin/python" -m pip --disable-pip-version-check "$@"; }
# 3.11 or newer has tomllib; the versions that are tried and those that are claimed are one list.
project() {
    "$python" -c "import re, tomllib; project = tomllib.load(open('$root/pyproject.toml', 'rb'))['project']; print(*$1)"
}
versions=${PYTHONS:-$(project "re.findall(r'Python :: (3\.[0-9]+)', str(project['classifiers']))")}
# dev is for the checkout; the doctor leaves it out too.
extras=${EXTRAS:-$(project "sorted(set(project['optional-dependencies']) - {'dev'})")}

"$python" -m venv "$outside/tools"
pip install --quiet --quiet --root-user-action=ignore build twine check-wheel-contents
rm -rf dist build
"$outside/tools/bin/python" -m build --outdir dist . > "$outside/build.log" 2>&1 || { cat "$outside/build.log" >&2; exit 1; }
"$outside/tools/bin/twine" check --strict dist/*
"$outside/tools/bin/check-wheel-contents" dist/*.whl
"$python" .ci/release_files.py dist

wheel=$(echo "$root"/dist/*.whl)
cp .ci/smoke.py "$outside/smoke.py"
cd "$outside"

find_python() { # VERSION: the command of that Python, on the path or installed by pyenv
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if "$candidate" -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$1')" 2> /dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Each package is fetched once a Python, since several are gigabytes; nothing is compiled here.
fetch() { # EXTRAS
    pip --python venv/bin/python download --quiet --quiet --only-binary :all: --dest wheels \
        --constraint "$root/constraints.txt" "$wheel[$1]"
}

install() { # EXTRAS
    pip --python venv/bin/python install --quiet --quiet --root-user-action=ignore --no-compile --no-index \
        --find-links wheels --constraint "$root/constraints.txt" "$wheel[$1]"
}

reason() { # FILE: the last error in it as a line
    {
        grep -E '^ERROR: (No matching|Could not find|Cannot)' "$1" || grep -vE '^(WARNING|\[notice\]|\s*$)' "$1" \
            || echo "no reason given"
    } | tail -n 1 | cut -c 1-300
}

try() { # EXTRA: an environment with it alone, in which the doctor finds it complete; prints why not
    rm -rf venv
    "$interpreter" -m venv --without-pip venv
    if ! install "$1" 2> failure && ! { fetch "$1" && install "$1"; } 2> failure; then
        local why
        why=$(reason failure)
        [[ $why != *"No matching"* ]] || why+=": no wheel is offered, so the extra does not support Python $version"
        echo "cannot be installed: $why"
        return 1
    fi
    # Without a GPU, CUDA is the one thing that may be broken.
    venv/bin/tpeft-deploy --quiet doctor --json > found.json 2> failure || [ "$1" = gpu ] \
        || { echo "the doctor says: $(reason failure)"; return 1; }
    venv/bin/python -c 'import json, sys
found = {extra["extra"]: extra for extra in json.load(open("found.json"))["extras"]}[sys.argv[1]]
sys.exit(found["state"] != "complete" and f"the doctor finds it {found}")' "$1" 2>&1
}

smoke() { # in the environment of the extra train
    { install cpu,export,train || { fetch cpu,export,train && install cpu,export,train; }; } 2> failure \
        && (rm -rf work && mkdir work && cd work && ../venv/bin/python ../smoke.py) > answer 2> failure && cat answer \
        || { reason failure; return 1; }
}

failed=
for version in $versions; do
    if ! interpreter=$(find_python "$version"); then
        echo "Python $version: not found here, so nothing was tried on it; install it, or remove its classifier" >&2
        failed+=" $version"
        continue
    fi
    rm -rf venv wheels
    "$interpreter" -m venv --without-pip venv
    fetch "$(tr ' ' , <<< "$extras")" 2> failure \
        || echo "Python $version: each extra is fetched alone, since together: $(reason failure)"
    for extra in $extras; do
        if said=$(try "$extra"); then
            echo "Python $version, extra $extra: complete, and imported"
        else
            echo "Python $version, extra $extra: $said" >&2
            failed+=" $version:$extra"
        fi
        [ "$extra" = train ] || continue
        if said=$(smoke); then
            echo "Python $version, $said"
        else
            echo "Python $version, smoke: $said" >&2
            failed+=" $version:smoke"
        fi
    done
done
[ -z "$failed" ] || { echo "failed:$failed" >&2; exit 1; }
