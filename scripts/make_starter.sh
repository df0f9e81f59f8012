#!/usr/bin/env bash
# Make the model that the product ships: detector on forgeries in memory, tiny LLaVA, adapter, LoRA, half precision.
#
# Usage: bash scripts/make_starter.sh TABLE [--weights FILE] [--output FOLDER] [--seed NUMBER] [--recipes FOLDER]
#   TABLE      csv of real faces (file, label, split, group), one image for each person, splits train, val and test
#   --weights  ImageNet weights of EfficientNet-Lite0 to start from (docs/detectors/cnn.md says where they are)
#   --output   folder of everything that is made; default: outputs/starter. The model is FOLDER/model.
#   --seed     of the detector's training; default: 100
#   --recipes  folder of recipes; default: scripts/configs/starter
# Forged pictures of these people lie in a temporary folder while the words are learned, and are removed at the end.
set -euo pipefail
source "$(dirname "$0")/env.sh"

refuse() { echo "make_starter.sh: $*" >&2; exit 2; }
m2f2() { "$PYTHON" -m llava.cli "$@"; }

table="" weights=() out=outputs/starter seed=100 recipes=scripts/configs/starter
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^set/{/^#/p;}' scripts/make_starter.sh; exit 0 ;;
    --weights | --output | --seed | --recipes)
      (($# > 1)) || refuse "$1 needs a value."
      case "$1" in --weights) weights=(--model.weights "$2") ;; --output) out=$2 ;; --seed) seed=$2 ;; *) recipes=$2 ;; esac
      shift ;;
    -*) refuse "Unknown option '$1'; allowed: --weights, --output, --seed, --recipes." ;;
    *) [[ -z $table ]] || refuse "Give one TABLE, not '$table' and '$1'."; table=$1 ;;
  esac
  shift
done
[[ -n $table ]] || refuse "Give TABLE, a csv of real faces; --help says what it holds."
for file in "$table" "${weights[@]:1}"; do [[ -f $file ]] || refuse "File '$file' does not exist."; done
[[ -f $out/detector/run.json || -z $(ls -A "$out" 2>/dev/null) ]] ||
  refuse "Folder '$out' holds other things; give an empty one, or that of an earlier run."
mkdir -p "$out"
forged=$(mktemp -d "${TMPDIR:-/tmp}/starter.XXXXXX")
trap 'rm -rf "$forged"' EXIT

echo "== the detector"
bash stage_1_train.sh --config "$recipes/stage_1.yaml" \
  --data.source csv --data.path "$table" "${weights[@]}" --seed "$seed" --output_dir "$out/detector"

echo "== forgeries to speak of"
m2f2 data forge "$table" --config "$recipes/forge.yaml" --output "$forged/data"

echo "== the words"
# Learned anew each time, in minutes: the forgeries lie elsewhere now. The detector above goes on where it stopped.
for made in base stage_2-start stage_2-delta stage_2 stage_3-delta full model exp.jsonl exp_run det.jsonl det_run; do
  rm -rf "${out:?}/$made"
done
train=$forged/data/train images=(--image_folder "$forged/data/images")
m2f2 tiny-base --config "$recipes/tiny_base.yaml" --data "$train/label_free.json" "${images[@]}" \
  --detector "$out/detector" --out "$out/base"
bash stage_2_train.sh --config scripts/configs/stage_2/m2f2_tiny.yaml --config "$recipes/stage_2.yaml" "${images[@]}" \
  --data_path "$train/label_free.json" --merge.base "$out/base/model" --merge.detector "$out/detector" \
  --merge.start "$out/stage_2-start" --output_dir "$out/stage_2-delta"
bash stage_3_train.sh --config scripts/configs/stage_3/m2f2_tiny.yaml --config "$recipes/stage_3.yaml" "${images[@]}" \
  --data_path "$train/dialogue.json" --merge.base_of_delta "$out/stage_2-start" --merge.delta "$out/stage_2-delta" \
  --merge.start "$out/stage_2" --merge.final "$out/full" --output_dir "$out/stage_3-delta"
"$PYTHON" scripts/halve_weights.py --model_path "$out/full" --save_path "$out/model"

echo "== what the words are worth, on people who were not learned from"
bash stage_3_inference_exp.sh --model_path "$out/model" --images "$forged/data/images" \
  --questions "$forged/data/test/label_free.jsonl" --output "$out/exp.jsonl"
for script in explanation integrity; do
  extra=()
  [[ $script != integrity ]] || extra=(--train_path "$train/label_free.json")
  "$PYTHON" "eval/eval_$script.py" --predict_path "$out/exp.jsonl" --gt_path "$forged/data/test/label_free.jsonl" \
    "${extra[@]}" --json "$out/$script.json"
done
bash stage_3_inference_det.sh --model_path "$out/model" --images "$forged/data/images" \
  --questions "$forged/data/test/verdict_only.jsonl" --output "$out/det.jsonl"
"$PYTHON" eval/eval_judgement.py --predict_path "$out/det.jsonl" --gt_path "$forged/data/test/verdict_only.json" \
  --json "$out/judgement.json"
echo "The model is $out/model."
