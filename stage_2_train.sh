#!/usr/bin/env bash
# Stage 2. Usage: bash stage_2_train.sh [--config RECIPE] [--include localhost:0,1] [--any_setting value]
set -euo pipefail
source "$(dirname "$0")/scripts/env.sh"
exec "$PYTHON" -m llava.train.stages 2 "$@"
