#!/usr/bin/env bash
# Test the console in Debian's Chromium, and build it again where Node is: the committed files must come out.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v chromium > /dev/null && [ -z "${CHROMIUM:-}" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -qq -y --no-install-recommends chromium
    else
        echo "no Chromium, and no apt-get as root to install it: the console's tests are skipped"
    fi
fi
make console-test

if ! command -v npm > /dev/null || [ "$(node -p 'process.versions.node.split(".")[0] >= 20')" != true ]; then
    echo "no Node 20 or newer: the console is not built again"
    exit 0
fi
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
cp -r console "$built/console"
rm -rf "$built/console/node_modules"
mkdir -p "$built/runtime/server/console"
(cd "$built/console" && npm ci --no-audit --no-fund --silent && npm run --silent build > "$built/log" || { cat "$built/log"; exit 1; })
diff -r "$built/runtime/server/console/static" runtime/server/console/static ||
    { echo "runtime/server/console/static is not what console/ builds: make console"; exit 1; }
echo "the committed console is what its sources build"
