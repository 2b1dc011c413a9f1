#!/usr/bin/env bash
# The GPU path in one command of at most eight minutes: tests/gpu.sh [--dry] [FILE]. Writes one JSON file (gpu.json).
# --dry goes the same way on the CPU with tiny sizes, so that it can't rot: a test runs it.
# It uses .venv where there is one, else $PYTHON or python3, which must then hold what settings.ini lists.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 MPLBACKEND=agg
exec timeout --kill-after=10 "${GPU_SECONDS:-480}" "$python" tests/gpu.py "$@"
