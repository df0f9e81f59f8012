#!/usr/bin/env bash
# The whole path, small: data, three stages, questions, scores, in the commands that you would type yourself.
#
# Usage: bash scripts/demo.sh [FOLDER] [--output FOLDER] [--model NAME] [--recipes FOLDER]
#   FOLDER     your own images: DD-VQA (annotations/DQ_FFpp, images/c40) or class folders {train,val,test}/{real,fake};
#              without it, the four embedded photos are forged
#   --output   folder of everything that is made on the way; default: outputs/demo
#   --model    name of the finished explainer in checkpoints/ (or $M2F2_CHECKPOINTS); default: demo, or demo-FOLDER
#   --recipes  folder of what is forged and what differs from the tiny recipes; default: scripts/configs/demo, and
#              nothing differs for your own images
set -euo pipefail
source "$(dirname "$0")/env.sh"
SECONDS=0

refuse() { echo "demo.sh: $*" >&2; exit 2; }
m2f2() { "$PYTHON" -m llava.cli "$@"; }
python() { "$PYTHON" "$@"; }

data="" out=outputs/demo name="" recipes=""
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,/^set/{/^#/p;}' scripts/demo.sh; exit 0 ;;
    --output | --model | --recipes)
      (($# > 1)) || refuse "$1 needs a value."
      case "$1" in --output) out=$2 ;; --model) name=$2 ;; *) recipes=$2 ;; esac
      shift ;;
    -*) refuse "Unknown option '$1'; allowed: --output, --model, --recipes." ;;
    *) data=$1 ;;
  esac
  shift
done

if [[ -z $data ]]; then
  kind=embedded recipes=${recipes:-scripts/configs/demo} name=${name:-demo}
elif [[ -d $data ]]; then
  kind=folders name=${name:-demo-$(basename "$(cd "$data" && pwd)")}
  [[ ! -d $data/annotations/DQ_FFpp ]] || kind=ddvqa
else
  refuse "Folder '$data' does not exist; give DD-VQA or class folders, or no folder at all."
fi
model=${M2F2_CHECKPOINTS:-checkpoints}/$name
echo "From ${data:-the embedded photos} to the model $model; everything on the way goes to $out."

mkdir -p "$out"
exec 9> "$out/.lock"
flock --nonblock 9 || refuse "another run writes to '$out' now; wait for it, or give --output."

title="" begun=0 spent=""
step() { # ends the step before, whose seconds it notes for the report, and says which one begins
  [[ -z $title ]] || spent+="${spent:+, }\"$title\": $((SECONDS - begun))"
  echo "{$spent}" > "$out/seconds.json"
  title=$1 begun=$SECONDS
  [[ -z $title ]] || echo "== $title ($SECONDS s)"
}
say_where() {
  local code=$?
  [[ $code == 0 || -z $title ]] || echo "The step '$title' ended with $code; its message stands above." >&2
}
trap say_where EXIT

if [[ $kind == embedded ]]; then
  step "the starter: verdicts and reasons"
  rm -rf "$out/navy" && mkdir -p "$out/navy" && cp utils/demo_faces/grace_hopper.jpg "$out/navy/"
  m2f2 data forge "$out/navy" --config "$recipes/edit.yaml" --output "$out/edited" > "$out/edited.json"
  m2f2 explain utils/demo_faces/*.png utils/demo_faces/*.jpg "$out"/edited/images/train/*_1.png \
    --question "Does this image look real or fake? Give the reasons."
fi

step "data"
tiny=scripts/configs/stage_1/m2f2_tiny.yaml
case $kind in
  embedded)
    conversations=$out/data images=$out/data/images train=$out/data/train reasons=yes
    tiny=scripts/configs/starter/stage_1.yaml
    pictures=(--data.source csv --data.path "$out/data/manifest.csv")
    base=("$train/label_free.json" "$train/dialogue.json") second=$train/label_free.json third=$train/dialogue.json
    m2f2 data forge --config "$recipes/forge.yaml" --output "$out/data"
    ;;
  ddvqa)
    conversations=$out/conversations images=$data/images/c40 train=$out/conversations/train reasons=yes
    pictures=(--data.source conversations --data.path "$conversations" --data.root "$images")
    base=("$train/dialogue.json" "$train/verdict_only.json") second=$train/verdict_only.json third=$train/dialogue.json
    held_out=$data/splits/heldval_300.txt
    [[ -f $held_out ]] || held_out=none
    m2f2 data ddvqa --annotations "$data/annotations/DQ_FFpp" --images "$images" --val_list "$held_out" \
      --output "$conversations"
    ;;
  folders)
    conversations=$out/conversations images=$data train=$out/conversations/train reasons=""
    pictures=(--data.source conversations --data.path "$conversations" --data.root "$images")
    base=("$train/verdict_only.json") second=$train/verdict_only.json third=$train/verdict_only.json
    m2f2 data verdicts --data.path "$data" --output "$conversations"
    ;;
esac

step "stage 1: the detector"
bash stage_1_train.sh --config "$tiny" ${recipes:+--config "$recipes/stage_1.yaml"} "${pictures[@]}" \
  --output_dir "$out/stage_1"

step "stage 1: scores on test"
m2f2 evaluate --model "$out/stage_1" --output_dir "$out/scores"

step "the tiny LLaVA base"
m2f2 tiny-base ${recipes:+--config "$recipes/tiny_base.yaml"} --data "${base[@]}" --image_folder "$images" \
  --detector "$out/stage_1" --out "$out/base"

step "stage 2: the adapter"
bash stage_2_train.sh --config scripts/configs/stage_2/m2f2_tiny.yaml ${recipes:+--config "$recipes/stage_2.yaml"} \
  --data_path "$second" --image_folder "$images" --merge.base "$out/base/model" --merge.detector "$out/stage_1" \
  --merge.start "$out/stage_2-start" --output_dir "$out/stage_2-delta"

step "stage 3: LoRA"
bash stage_3_train.sh --config scripts/configs/stage_3/m2f2_tiny.yaml ${recipes:+--config "$recipes/stage_3.yaml"} \
  --data_path "$third" --image_folder "$images" --merge.base_of_delta "$out/stage_2-start" \
  --merge.delta "$out/stage_2-delta" --merge.start "$out/stage_2" --merge.final "$model" \
  --output_dir "$out/stage_3-delta"

step "answers: det"
bash stage_3_inference_det.sh --model_path "$model" --images "$images" \
  --questions "$conversations/test/verdict_only.json" --output "$out/det.jsonl"

if [[ -n $reasons ]]; then
  step "answers: exp"
  bash stage_3_inference_exp.sh --model_path "$model" --images "$images" \
    --questions "$conversations/test/label_free.jsonl" --output "$out/exp.jsonl"
fi

step "scores"
python eval/eval_judgement.py --predict_path "$out/det.jsonl" --gt_path "$conversations/test/verdict_only.json" \
  --json "$out/judgement.json"
if [[ -n $reasons ]]; then
  python eval/eval_explanation.py --predict_path "$out/exp.jsonl" --gt_path "$conversations/test/label_free.jsonl" \
    --json "$out/explanation.json"
  python eval/eval_integrity.py --predict_path "$out/exp.jsonl" --gt_path "$conversations/test/label_free.jsonl" \
    --train_path "$train/label_free.json" --json "$out/integrity.json"
fi

if [[ $kind == embedded ]]; then
  step "report"
  python -m llava.jobs.demo_report --folder "$out" --model "$model"
fi

step ""
python eval/compare.py --runs "$out"
[[ $kind != embedded ]] || echo "The report is $out/report.html: open it in a browser."
echo "All of it took $((SECONDS / 60)).$((SECONDS % 60 / 6)) minutes. Ask it: m2f2 chat IMAGE --model $model"
[[ $kind != embedded ]] || echo "This model is a demonstration and no tool."
