#!/usr/bin/env bash
# Ask of every DD-VQA test image whether it is real: bash stage_3_inference_det.sh --model-path FOLDER [--setting value ...]
set -euo pipefail
source "$(dirname "$0")/scripts/env.sh"
exec "$PYTHON" -m llava.jobs.ddvqa_answers det "$@"
