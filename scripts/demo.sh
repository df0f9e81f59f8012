#!/usr/bin/env bash
# The whole path with the tiny recipes on one data set: stages 1 to 3, questions, scores. Usage: make demo DATA=FOLDER
# FOLDER: DD-VQA (annotations/DQ_FFpp with images/c40), or class folders {train,val,test}/{real,fake}.
set -euo pipefail
case "${1:-}" in
    "" | -h | --help)
        sed -n '2,3s/^# //p' "$0"
        exit $(($# == 0))
        ;;
esac
DATA=$(cd "$1" && pwd)
source "$(dirname "$0")/env.sh"
OUT=${OUT:-outputs/demo}
CONFIGS=scripts/configs
started=$SECONDS

step() {
    echo "== $1 ($((SECONDS - started)) s)"
    shift
    "$@"
}

conversations=$OUT/conversations
if [ -d "$DATA/annotations/DQ_FFpp" ]; then
    images=$DATA/images/c40
    style=dialogue
    list=$DATA/splits/heldval_300.txt
    step "data: DD-VQA to conversations" "$PYTHON" -m llava.cli data ddvqa --annotations "$DATA/annotations/DQ_FFpp" \
        --images "$images" --output "$conversations" $([ -f "$list" ] && echo --val_list "$list")
else
    images=$DATA
    style=verdict_only
    step "data: labels to conversations" "$PYTHON" -m llava.cli data verdicts --data.path "$DATA" --output "$conversations"
fi
train=$conversations/train
test=$conversations/test

step "stage 1: the detector" bash stage_1_train.sh --config $CONFIGS/stage_1/m2f2_tiny.yaml --output_dir "$OUT/stage_1" \
    --data.source conversations --data.path "$conversations" --data.root "$images" --data.cache true
step "stage 1: scores" bash stage_1_inference.sh --model "$OUT/stage_1" --output_dir "$OUT/scores"
base_files=("$train/verdict_only.json")
[ $style = dialogue ] && base_files+=("$train/dialogue.json")
step "the tiny LLaVA base" "$PYTHON" -m llava.cli tiny-base --data "${base_files[@]}" --image_folder "$images" \
    --detector "$OUT/stage_1" --out "$OUT/base"
step "stage 2: the adapter" bash stage_2_train.sh --config $CONFIGS/stage_2/m2f2_tiny.yaml --merge.base "$OUT/base/model" \
    --merge.detector "$OUT/stage_1" --merge.start "$OUT/stage_2-start" --output_dir "$OUT/stage_2-delta" \
    --data_path "$train/verdict_only.json" --image_folder "$images"
step "stage 3: LoRA" bash stage_3_train.sh --config $CONFIGS/stage_3/m2f2_tiny.yaml --merge.base_of_delta "$OUT/stage_2-start" \
    --merge.delta "$OUT/stage_2-delta" --merge.start "$OUT/stage_2" --merge.final "$OUT/explainer" \
    --output_dir "$OUT/stage_3-delta" --data_path "$train/$style.json" --image_folder "$images"
step "inference: judgement" bash stage_3_inference_det.sh --model-path "$OUT/explainer" --images "$images" \
    --questions "$test/verdict_only.json" \
    --output "$OUT/det.jsonl"
step "scores: judgement" "$PYTHON" eval/eval_judgement.py --predict_path "$OUT/det.jsonl" \
    --gt_path "$test/verdict_only.json" --json "$OUT/judgement.json"
if [ $style = dialogue ]; then
    step "inference: explanation" bash stage_3_inference_exp.sh --model-path "$OUT/explainer" --images "$images" \
        --questions "$test/label_free.jsonl" --output "$OUT/exp.jsonl"
    step "scores: explanation" "$PYTHON" eval/eval_explanation.py --predict_path "$OUT/exp.jsonl" \
        --gt_path "$test/label_free.jsonl" --json "$OUT/explanation.json"
fi
step "summary" "$PYTHON" eval/compare.py --runs "$OUT"
echo "all of it took $((SECONDS - started)) s; the explainer is $OUT/explainer: m2f2 chat IMAGE --model $OUT/explainer"
