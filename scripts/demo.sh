#!/usr/bin/env bash
# A small end-to-end run from scratch: draws simple scenes in CLEVR-Change's layout, seen by a camera
# that does not move, adapts and finetunes a small CLIP with random weights on them, and evaluates
# both stages.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
python=.venv/bin/python
run=${DEMO_DIR:-runs/demo}
data=$run/data
common=(--datatype clevr --data_path "$data" --image_cache "$run/cache" --num_thread_reader 0 --max_words 24 --n_display 50
  --batch_size_val 100 --pretrained_clip_name modules/clip-demo.json --intra_num_hidden_layers 0 --linear_patch 3d --freeze_layer_num -1)
caption=(--decoder_model decoder-demo --gt_dir "$run/gt")

echo "== draw scenes, make the ground truth"
rm -rf "$run/cache"  # its images are drawn again
$python preprocess/synthesize.py --output "$data" --train 3000 --val 20 --test 200 --captions_per_image 3 --jitter 0 --overwrite
$python gt/eval_utils.py --datatype clevr --data_path "$data" --output "$run/gt/clevr_total_change_captions_reformat.json"

echo "== stage 1, adaptation"
$python main_task_retrieval.py --do_train "${common[@]}" --output_dir "$run/retrieval" --epochs 7 --batch_size 64 --lr 7e-4

echo "== stage 2, finetuning"
$python CLIP4IDCinference.py --do_train "${common[@]}" "${caption[@]}" --output_dir "$run/caption" --epochs 8 --batch_size 12 --lr 1e-3 \
  --coef_lr 2 --freeze_vision --init_model "$run/retrieval/pytorch_model.bin.best"

echo "== evaluation of the best epochs"
$python main_task_retrieval.py --do_eval "${common[@]}" --output_dir "$run/retrieval-eval" \
  --init_model "$run/retrieval/pytorch_model.bin.best" 2>&1 | sed -n '/^retrieval among/,$p'
$python CLIP4IDCinference.py --do_eval "${common[@]}" "${caption[@]}" --output_dir "$run/caption-eval" \
  --init_model "$run/caption/pytorch_model.bin.best" 2>&1 | sed -n '/^baselines/,$p'
