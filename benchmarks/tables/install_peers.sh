#!/bin/sh
# Install the servers that `python -m benchmarks.tables` compares with, each in a virtual environment apart.
# install_peers.sh CACHE [SERVER...]; KServe's SDK comes with the extra "dev".
set -eu
cache=$1
shift
[ $# -gt 0 ] || set -- litserve mlserver ray
for name in "$@"; do
    case $name in
        litserve) packages="litserve==0.2.19" ;;
        mlserver) packages="mlserver==1.7.1 uvloop<0.22" ;;  # it does not start with the next one
        ray) packages="ray[serve]==2.60.0" ;;
        *) echo "expected litserve, mlserver or ray, got $name" >&2; exit 2 ;;
    esac
    "${PYTHON:-python3}" -m venv "$cache/servers/$name"
    "$cache/servers/$name/bin/python" -m pip --disable-pip-version-check install --quiet $packages onnxruntime==1.32.0
done
