#!/usr/bin/env bash
# Make the model that the product ships: detector on forgeries in memory, tiny LLaVA, adapter, LoRA, half precision.
#
# Usage: bash scripts/make_starter.sh TABLE WEIGHTS [--output FOLDER] [--seed NUMBER]
#   TABLE     csv of real faces (file, label, split, group), one image for each person, splits train, val and test
#   WEIGHTS   ImageNet weights of EfficientNet-Lite0 (docs/detectors/cnn.md says where they are)
#   --output  folder of everything that is made; default: outputs/starter. The model is FOLDER/model.
#   --seed    of the detector's training; default: 100
# Forged pictures of these people lie in a temporary folder while the words are learned, and are removed at the end.
set -euo pipefail
source "$(dirname "$0")/env.sh"

refuse() { echo "make_starter.sh: $*" >&2; exit 2; }
m2f2() { "$PYTHON" -m llava.cli "$@"; }

out=outputs/starter seed=100 given=()
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^set/{/^#/p;}' scripts/make_starter.sh; exit 0 ;;
    --output | --seed)
      (($# > 1)) || refuse "$1 needs a value."
      [[ $1 == --seed ]] && seed=$2 || out=$2
      shift ;;
    -*) refuse "Unknown option '$1'; allowed: --output, --seed." ;;
    *) given+=("$1") ;;
  esac
  shift
done
((${#given[@]} == 2)) || refuse "Give TABLE and WEIGHTS, two files; ${#given[@]} given. --help says what they are."
for file in "${given[@]}"; do [[ -f $file ]] || refuse "File '$file' does not exist."; done
table=$(realpath "${given[0]}") weights=$(realpath "${given[1]}") recipes=scripts/configs/starter
mkdir -p "$out"
forged=$(mktemp -d "${TMPDIR:-/tmp}/starter.XXXXXX")
trap 'rm -rf "$forged"' EXIT

echo "== the detector"
bash stage_1_train.sh --config scripts/configs/stage_1/starter.yaml --data.source csv --data.path "$table" \
  --model.weights "$weights" --seed "$seed" --output_dir "$out/detector"

echo "== forgeries to speak of"
"$PYTHON" - "$table" "$forged" << 'PYTHON'
import csv, sys
from pathlib import Path
table, forged = map(Path, sys.argv[1:])
rows = [row for row in csv.DictReader(table.open(newline="")) if row["split"] in ("train", "val", "test")]
(forged / "photos").mkdir()
for row in rows:
    file = table.parent / row["file"]
    (forged / "photos" / f"{row['group']}{file.suffix}").symlink_to(file)
names = {split: ", ".join(row["group"] for row in rows if row["split"] == split) for split in ("test", "val")}
(forged / "splits.yaml").write_text("".join(f"{split}_groups: [{groups}]\n" for split, groups in names.items()))
PYTHON
m2f2 data forge "$forged/photos" --config "$recipes/forge.yaml" --config "$forged/splits.yaml" --output "$forged/data"

echo "== the words"
train=$forged/data/train images=(--image_folder "$forged/data/images")
m2f2 tiny-base --config "$recipes/tiny_base.yaml" --data "$train/label_free.json" "$train/dialogue.json" "${images[@]}" \
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
echo "The model is $out/model."
