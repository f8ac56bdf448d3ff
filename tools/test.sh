#!/usr/bin/env bash
# Compiles the CUDA sources where there is nvcc, and runs both test runners, each also where the one
# before fails. Repeats their closing lines.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.venv/bin

failed=0
.venv/bin/python tools/cuda_check.py --if-nvcc 2>&1 | tee build/cuda_check.log || failed=1
ctest --test-dir build/current --output-on-failure --no-tests=error -j "${JOBS:-$(nproc)}" 2>&1 |
    tee build/ctest.log || failed=1
# A file stays in one process, as its fixtures are made once.
.venv/bin/python -m pytest -q -n "${JOBS:-$(nproc)}" --dist loadfile 2>&1 | tee build/pytest.log || failed=1

# A process that ends late may write behind pytest's closing line.
summary=$(grep -E '[0-9]+ (passed|failed|errors?).* in [0-9.]+s' build/pytest.log | tail -n 1)

{
    tail -n 1 build/cuda_check.log
    printf 'ctest:  %s\n' "$(grep 'tests passed' build/ctest.log || tail -n 1 build/ctest.log)"
    printf 'pytest: %s\n' "${summary:-$(tail -n 1 build/pytest.log)}"
} | tee build/closing_lines
exit $failed
