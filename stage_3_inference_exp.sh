#!/usr/bin/env bash
# Ask the DD-VQA questions about reasons: bash stage_3_inference_exp.sh --model-path FOLDER [--setting value ...]
set -euo pipefail
source "$(dirname "$0")/scripts/env.sh"
exec "$PYTHON" -m llava.jobs.ddvqa_answers exp "$@"
