#!/usr/bin/env bash
# Stage 1: train a detector. Usage: bash stage_1_train.sh [--config RECIPE] [--any_setting value]; --help lists them all.
set -euo pipefail
source "$(dirname "$0")/scripts/env.sh"
exec "$PYTHON" -m llava.train.stage_1 "$@"
