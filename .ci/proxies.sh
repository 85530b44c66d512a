#!/usr/bin/env bash
# Install the proxies of deploy/proxies/ where apt can, for their tests, which skip themselves otherwise.
set -euo pipefail
missing=()
command -v nginx > /dev/null || [ -x /usr/sbin/nginx ] || missing+=(nginx-light)
command -v haproxy > /dev/null || [ -x /usr/sbin/haproxy ] || missing+=(haproxy)
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "not installed, their tests are skipped: ${missing[*]}"
    exit 0
fi
# With this run level no service is started.
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
apt-get update -qq
apt-get install -qq -y --no-install-recommends "${missing[@]}"
