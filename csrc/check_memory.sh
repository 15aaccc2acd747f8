#!/usr/bin/env bash
# Compiles the kernels with AddressSanitizer and UndefinedBehaviorSanitizer, and runs their tests with them.
#
#   bash csrc/check_memory.sh        needs g++, and the package installed with the extra "test"
set -euo pipefail
cd "$(dirname "$0")/.."
SANITIZERS="-fsanitize=address,undefined -fno-omit-frame-pointer -fno-sanitize-recover=undefined"
trap 'python setup.py -q build_ext --inplace --force' EXIT
# Which variable holds the options of C++ depends on the version of setuptools.
CFLAGS=$SANITIZERS CXXFLAGS=$SANITIZERS LDFLAGS=$SANITIZERS python setup.py -q build_ext --inplace --force
if ! nm -D opt_megatron/model/_cpu_kernels*.so | grep -q __asan; then
    echo "the kernels were not compiled with AddressSanitizer" >&2
    exit 1
fi
# Python itself is not instrumented: the sanitizer comes first, and what Python never frees is not looked at.
libraries=$(for name in asan ubsan stdc++; do gcc -print-file-name="lib$name.so"; done)
LD_PRELOAD=${libraries//$'\n'/ } ASAN_OPTIONS=detect_leaks=0 python -m pytest \
    tests/model/test_cpu_kernels.py tests/checkpoint/mezo/test_normal_numbers.py "$@"
