#!/usr/bin/env bash
# "CLEVR-Change mini", from nothing to scores: draws scenes with a camera and lamps that move a little (JITTER=0: stand still), adapts
# and finetunes a small CLIP of random weights on them, and tells scores with 95 % intervals, by type, and whether what captions say
# is right. Epochs are chosen on val. Hours on two cores. Environment: MINI_DIR TRAIN VAL TEST JITTER DRAW_SEED SEED EPOCHS1 EPOCHS2.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
python=.venv/bin/python
run=${MINI_DIR:-runs/mini}
data=$run/data
common="--datatype clevr --data_path $data --image_cache $run/cache --num_thread_reader 0 --max_words 28 --batch_size_val 100
  --select_on val --seed ${SEED:-42} --pretrained_clip_name modules/clip-mini.json --intra_num_hidden_layers 0 --linear_patch 3d
  --precision bf16 --freeze_layer_num -1"
caption="--decoder_model decoder-mini --gt_dir $run/gt"

if [ ! -f "$data/splits.json" ]; then
  echo "== draw scenes"
  $python preprocess/synthesize.py --output "$data" --train "${TRAIN:-20000}" --val "${VAL:-1000}" --test "${TEST:-2000}" \
    --jitter "${JITTER:-1}" --seed "${DRAW_SEED:-0}"
fi
$python gt/eval_utils.py --datatype clevr --data_path "$data" --output "$run/gt/clevr_total_change_captions_reformat.json"

echo "== stage 1, adaptation"
$python main_task_retrieval.py --do_train $common --output_dir "$run/retrieval" --epochs "${EPOCHS1:-8}" --batch_size 64 --lr 7e-4 \
  --optimizer adamw --distractor_negatives

echo "== stage 2, finetuning"
$python CLIP4IDCinference.py --do_train $common $caption --output_dir "$run/caption" --epochs "${EPOCHS2:-20}" --batch_size 32 \
  --lr 1e-3 --coef_lr 1 --optimizer adamw --freeze_vision --init_model "$run/retrieval/pytorch_model.bin.best"

echo "== scores of the best epoch on the test scenes"
$python gt/eval_utils.py score --gt "$run/gt/clevr_total_change_captions_reformat.json" --results "$run/caption/hyp_ep_eval.json" \
  --type_mapping "$data/type_mapping.json" --bootstrap 1000 --output "$run/scores.json"
echo "== what captions say, against what was drawn"
$python gt/eval_utils.py changes --changed_object "$data/changed_object.json" --results "$run/caption/hyp_ep_eval.json" \
  --output "$run/changes.json"
