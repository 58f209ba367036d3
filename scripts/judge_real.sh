#!/usr/bin/env bash
# Captions all scenes of a folder in CLEVR-Change's layout, whatever split they are in, and prints
# how many captions are correct. The folder needs a changed_object.json.
# scripts/judge_real.sh SCENES WEIGHTS OUTPUT [further options of CLIP4IDCinference.py]
set -euo pipefail
scenes=$(realpath "$1") weights=$(realpath "$2") output=$(realpath -m "$3")
shift 3
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
mkdir -p "$output/data" "$output/gt"
ln -sfn "$scenes"/* "$output/data" 2>/dev/null || cp -R "$scenes"/* "$output/data"
rm "$output/data/splits.json"
"$python" - "$scenes/splits.json" "$output/data/splits.json" <<'EOF'
import json
import sys

with open(sys.argv[1]) as file:
    splits = json.load(file)
scenes = list(dict.fromkeys(sum(splits.values(), [])))
with open(sys.argv[2], "w") as file:
    json.dump({"train": scenes, "val": scenes, "test": scenes}, file)
EOF
"$python" gt/eval_utils.py --datatype clevr --data_path "$output/data" --output "$output/gt/clevr_total_change_captions_reformat.json"
"$python" CLIP4IDCinference.py --do_eval --datatype clevr --data_path "$output/data" --gt_dir "$output/gt" --output_dir "$output/run" \
  --init_model "$weights" --intra_num_hidden_layers 0 --linear_patch 3d --decoder_model decoder-mini --max_words 28 \
  --batch_size_val 96 --num_thread_reader 0 "$@" >"$output/log.txt" 2>&1 || { tail -n 3 "$output/log.txt"; exit 1; }
"$python" gt/eval_utils.py changes --changed_object "$output/data/changed_object.json" --results "$output/run/hyp_ep_eval.json"
