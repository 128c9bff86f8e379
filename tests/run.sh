#!/usr/bin/env bash
# Lint and tests; makes .venv and installs the requirements when the current Python lacks them.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(bash run_all.sh python tests/requirements.txt)
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -q -n auto --dist loadfile --durations=10 tests "$@"
