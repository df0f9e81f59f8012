#!/usr/bin/env bash
# The training of stage 2 alone, between its merges: DeepSpeed ZeRO-2 on GPUs (or with --num_gpus/--include), else
# one plain process. Usage: bash scripts/finetune_stage_2.sh [--include localhost:0,1] [--master_port 29801] [flags]
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec "$PYTHON" -m llava.train.stages finetune_2 "$@"
