#!/usr/bin/env bash
# Runs both test runners, the second one also where the first fails, and repeats their closing lines.
set -uo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:$PWD/.venv/bin

failed=0
ctest --test-dir build/current --output-on-failure --no-tests=error -j "${JOBS:-$(nproc)}" 2>&1 |
    tee build/ctest.log || failed=1
.venv/bin/python -m pytest -q 2>&1 | tee build/pytest.log || failed=1

{
    printf 'ctest:  %s\n' "$(grep 'tests passed' build/ctest.log || tail -n 1 build/ctest.log)"
    printf 'pytest: %s\n' "$(tail -n 1 build/pytest.log)"
} | tee build/closing_lines
exit $failed
