#!/usr/bin/env bash
# Ask the DD-VQA questions about reasons: bash stage_3_inference_exp.sh --model-path FOLDER [--setting value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/env.sh"
exec "$python" -m llava.pipeline.ddvqa exp "$@"
