#!/usr/bin/env bash
# "CLEVR-Change mini", from scratch to scores: draws scenes whose camera and lamps move a little
# between the pictures, adapts and finetunes a small CLIP with random weights on them, and prints
# scores with 95 % intervals, by type, and how many captions are correct. Stage 1 begins with scenes in
# which camera and lamps do not move, so that a change can be seen patch by patch: without them it
# hardly learns. Stage 2 gets larger images, in which small objects can be told apart
# (docs/experiments.md). Epochs are chosen on val. Takes hours on two cores.
# Environment: MINI_DIR STILL TRAIN VAL TEST SEED EPOCHS0 EPOCHS1 EPOCHS2.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
python=.venv/bin/python
run=${MINI_DIR:-runs/mini}
common=(--datatype clevr --image_cache "$run/cache" --num_thread_reader 0 --max_words 28 --batch_size_val 100 --select_on val
  --seed "${SEED:-42}" --pretrained_clip_name modules/clip-mini.json --intra_num_hidden_layers 0 --linear_patch 3d --precision bf16
  --freeze_layer_num -1 --optimizer adamw)
adapt() { $python main_task_retrieval.py --do_train "${common[@]}" --batch_size 64 "$@"; }
truth=$run/gt/clevr_total_change_captions_reformat.json

echo "== draw scenes, make the ground truth"
draw() { [ -f "$2/splits.json" ] || $python preprocess/synthesize.py --seed "$1" --output "$2" "${@:3}"; }
draw 5 "$run/still" --jitter 0 --train "${STILL:-10000}" --val 500 --test 0
draw 0 "$run/data" --train "${TRAIN:-30000}" --val "${VAL:-1000}" --test "${TEST:-2000}"
$python gt/eval_utils.py --datatype clevr --data_path "$run/data" --output "$truth"

echo "== stage 1, adaptation: scenes without camera movement, then the others"
adapt --data_path "$run/still" --eval_split val --output_dir "$run/still-retrieval" --epochs "${EPOCHS0:-1}" --lr 7e-4
adapt --data_path "$run/data" --output_dir "$run/retrieval" --epochs "${EPOCHS1:-3}" --lr 5e-4 \
  --init_model "$run/still-retrieval/pytorch_model.bin.best"

echo "== stage 2, finetuning"
$python CLIP4IDCinference.py --do_train "${common[@]}" --data_path "$run/data" --gt_dir "$run/gt" --decoder_model decoder-mini \
  --image_resolution 192 --output_dir "$run/caption" --epochs "${EPOCHS2:-8}" --batch_size 16 --lr 3e-4 --warmup_proportion .03 \
  --init_model "$run/retrieval/pytorch_model.bin.best"

echo "== scores of the best epoch on the test scenes"
$python gt/eval_utils.py score --gt "$truth" --results "$run/caption/hyp_ep_eval.json" --type_mapping "$run/data/type_mapping.json" \
  --bootstrap 1000 --output "$run/scores.json"
echo "== captions compared with what was drawn"
$python gt/eval_utils.py changes --changed_object "$run/data/changed_object.json" --results "$run/caption/hyp_ep_eval.json" \
  --by size --output "$run/changes.json"
