#!/usr/bin/env bash
# The whole of CLIP4IDC in small, from nothing: draws a Spot-the-Diff of simple scenes, adapts and finetunes a small CLIP of
# random weights on it, evaluates both stages. About ten minutes on two CPU cores after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
python=.venv/bin/python
run=${DEMO_DIR:-runs/demo}
data=$run/data
clip="--pretrained_clip_name modules/clip-demo.json --intra_num_hidden_layers 1 --linear_patch 3d"
common="--datatype spot --data_path $data --features_path $data/images_test --num_thread_reader 2 --max_words 24 --n_display 20
  --batch_size_val 75 --coef_lr 1 --freeze_layer_num -1 $clip"

echo "== draw 2,770 pairs of scenes, merge repeated ids, make the ground truth"
$python preprocess/synthesize.py --datatype spot --output $data --train 2600 --val 20 --test 150 --overwrite
$python preprocess/reformat_dataset.py --data_path $data
$python gt/eval_utils.py --data_path $data --output $data/gt/spot_total_change_captions_reformat.json

echo "== stage 1, adaptation"
$python main_task_retrieval.py --do_train $common --output_dir $run/retrieval --epochs 1 --batch_size 64 --lr 5e-4

echo "== stage 2, finetuning"
$python CLIP4IDCinference.py --do_train $common --output_dir $run/caption --epochs 4 --batch_size 32 --lr 1e-3 \
  --decoder_num_hidden_layers 2 --gt_dir $data/gt --init_model $run/retrieval/pytorch_model.bin.best

echo "== evaluation of the best epochs"
$python main_task_retrieval.py --do_eval $common --output_dir $run/retrieval-eval --init_model $run/retrieval/pytorch_model.bin.best \
  2>&1 | sed -n '/^retrieval among/,$p'
$python CLIP4IDCinference.py --do_eval $common --output_dir $run/caption-eval --decoder_num_hidden_layers 2 --gt_dir $data/gt \
  --init_model $run/caption/pytorch_model.bin.best 2>&1 | sed -n '/^baselines/,$p'
