#!/usr/bin/env bash
# Train a detector: bash stage_1_train.sh [--config RECIPE] [--setting value ...]; --help lists all settings.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m llava.train.stage_1 "$@"
