#!/usr/bin/env bash
# Score a split with a trained detector: bash stage_1_inference.sh --model FOLDER [--setting value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=$root/.venv/bin/python
[ -x "$python" ] || python=python3
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m llava.train.infer "$@"
