#!/usr/bin/env bash
# Stage 1 on CLEVR-Change with the published settings. Further options are added to the command.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA_PATH=${DATA_PATH:-data}
exec ${PYTHON:-python} main_task_retrieval.py --do_train --num_thread_reader=4 --epochs=12 --batch_size=128 --n_display=50 --data_path "${DATA_PATH}" \
  --features_path "${DATA_PATH}" --output_dir ckpts/ckpt_clevr_retrieval --lr 1e-4 --max_words 32 --batch_size_val 128 \
  --datatype clevr --coef_lr 1e-3 --freeze_layer_num 0 --linear_patch 2d --pretrained_clip_name ViT-B/32 "$@"
