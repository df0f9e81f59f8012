#!/usr/bin/env bash
# Score a split with a trained detector. Usage: bash stage_1_inference.sh --model FOLDER [--data.path P] [--split test]
set -euo pipefail
source "$(dirname "$0")/scripts/env.sh"
exec "$PYTHON" -m llava.cli evaluate "$@"
