#!/usr/bin/env bash
# build.sh DIRECTORY: stub libraries of CUDA there, beside a virtual environment with onnxruntime-gpu.
#
# The runtime is cudart.c. Of the other libraries, whatever the provider imports becomes a function that does nothing
# but log itself; cudnn.c has those that must answer. What is installed stays until the packages change.
set -euo pipefail
export LC_ALL=C
here=$(cd "$(dirname "$0")" && pwd)
constraints=$here/../../constraints.txt
runtime=$(grep '^onnxruntime-gpu==' "$constraints")
mapfile -t packages < <("${PYTHON:-python3}" -c 'import sys, tomllib
print(*tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"], sep="\n")' "$here/../../pyproject.toml")
packages+=("$runtime")
mkdir -p "$1"
cd "$1"

for tool in gcc nm strings awk; do
    command -v "$tool" > /dev/null || { echo "building the CUDA stub needs $tool (Debian: gcc, binutils, mawk)" >&2; exit 1; }
done

if [ "$(cat installed 2> /dev/null)" != "${packages[*]}" ]; then
    echo "installing $runtime (250 MB) for the CUDA stub"
    [ -x venv/bin/python ] || "${PYTHON:-python3}" -m venv venv
    # Neither needs CUDA's own libraries: of one only the headers are of use, and the stub stands for the others.
    venv/bin/python -m pip --disable-pip-version-check install --quiet --constraint "$constraints" \
        "${packages[@]}" &&
        venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --dest . 'nvidia-cuda-runtime~=13.0' ||
        { echo "the CUDA stub needs $runtime and nvidia-cuda-runtime 13 from the package index, which failed" >&2; exit 1; }
    venv/bin/python -m zipfile -e nvidia_cuda_runtime*.whl headers
    echo "${packages[*]}" > installed
fi

provider=$(echo venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime_providers_cuda.so)

library() { # NAME SOURCE...: NAME, whose version node is NAME too; all but the runtime log through the runtime
    printf '%s { global: *; };\n' "$1" > version-script
    local runtime=./libcudart.so.13
    [ "$1" != libcudart.so.13 ] || runtime=
    gcc -O1 -w -shared -fPIC "-I$here" -Iheaders/nvidia/cu13/include "-Wl,-soname,$1" -Wl,--version-script=version-script \
        -o "$1" "${@:2}" $runtime -lpthread
}

imports() { nm -D --undefined-only "$provider" | grep -oE "U $1[A-Za-z0-9_]+" | cut -c3- | sort -u || true; }

functions() { # names on stdin, C on stdout
    awk 'BEGIN { print "#include <stdlib.h>\nextern void stub_log(const char *what, const char *detail);" } {
        logs = $1 ~ /(Create|Destroy|Set|Get|Finalize)/ ? "" : "stub_log(\"library\", \"" $1 "\"); "
        gives = "return 0;"
        if ($1 ~ /Create/) gives = "*(void **)a = malloc(4096); return 0;"
        if ($1 ~ /(Status|Error)(Name|String)/) gives = "return (long)\"stub\";"
        if ($1 == "cudnnGetVersion") gives = "return 92400;"
        printf "long %s(void *a, void *b, void *c, void *d, void *e, void *f) { %s%s }\n", $1, logs, gives
    }'
}

library libcudart.so.13 "$here/cudart.c"
imports cublasLt | functions > cublasLt.c
library libcublasLt.so.13 cublasLt.c
imports cublas | grep -v '^cublasLt' | functions > cublas.c
library libcublas.so.13 cublas.c
imports curand | functions > curand.c
library libcurand.so.10 curand.c
echo cuTensorMapEncodeTiled | functions > cuda.c
library libcuda.so.1 cuda.c
# The provider looks cuDNN's functions up by name.
written=$(grep -oE '\bcudnn[A-Z][A-Za-z0-9_]+\(' "$here/cudnn.c" | tr -d '(' | sort -u)
strings -n 6 "$provider" | grep -E '^cudnn[A-Z][A-Za-z0-9_]+$' | sort -u | grep -vxF "$written" | functions > cudnn.gen.c
library libcudnn.so.9 cudnn.gen.c "$here/cudnn.c"
