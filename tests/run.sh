#!/usr/bin/env bash
# Lint and tests. Makes .venv and installs the requirements if the current Python lacks them, and
# Chromium if there is no browser: a test votes on the user study's page in it. The fault tests and
# other long ones take ten minutes more and are run separately: python -m pytest -n auto -m slow tests
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(command -v python3 || command -v python) || { echo "tests/run.sh: no Python" >&2; exit 2; }
PYTHON=$("$PYTHON" tools/environment.py tests/requirements.txt)
if ! command -v chromium chromium-browser google-chrome >/dev/null; then
  echo "installing Chromium for the user study's test (once)" >&2
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y chromium; } >/dev/null 2>&1 ||
      echo "tests/run.sh: apt-get install chromium failed" >&2
  else
    "$PYTHON" -m playwright install chromium >&2 || echo "tests/run.sh: no Chromium" >&2
  fi
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -q -n auto --dist loadfile --durations=10 -m "not slow" tests "$@"
