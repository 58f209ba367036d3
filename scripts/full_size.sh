#!/usr/bin/env bash
# Both stages at the published sizes and batches (CLEVR-Change's, docs/train_on_clevr_change.md) on
# drawn scenes: how long a step takes, and how much memory. The weights are random, in ViT-B/32's
# sizes, so that no download is needed. With TRAIN=1067 an epoch of stage 1 has 50 steps.
# Environment: FULL_DIR TRAIN VAL TEST EPOCHS1 EPOCHS2 MORE (options of both stages).
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
python=.venv/bin/python
run=${FULL_DIR:-runs/full}
read -ra more <<<"${MORE:-}"
common=(--do_train --datatype clevr --data_path "$run/data" --image_cache "$run/cache" --n_display 10 --max_words 32 --lr 1e-4 --freeze_layer_num -1
  --pretrained_clip_name modules/clip-vit-b-32.json --linear_patch 2d --intra_num_hidden_layers 9 --select_on val ${more[@]+"${more[@]}"})
[ -f "$run/data/splits.json" ] || $python preprocess/synthesize.py --seed 0 --output "$run/data" --train "${TRAIN:-20000}" \
  --val "${VAL:-1000}" --test "${TEST:-2000}"
$python gt/eval_utils.py --datatype clevr --data_path "$run/data" --output "$run/gt/clevr_total_change_captions_reformat.json"
$python main_task_retrieval.py "${common[@]}" --batch_size 128 --batch_size_val 128 --epochs "${EPOCHS1:-12}" --output_dir "$run/retrieval"
$python CLIP4IDCinference.py "${common[@]}" --batch_size 16 --batch_size_val 64 --epochs "${EPOCHS2:-50}" --output_dir "$run/caption" \
  --gt_dir "$run/gt" --init_model "$run/retrieval/pytorch_model.bin.best"
