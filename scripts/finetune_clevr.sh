#!/usr/bin/env bash
# Stage 2 on CLEVR-Change with the published settings, on one GPU. Further options are added to the
# command.
set -euo pipefail
cd "$(dirname "$0")/.."
DATA_PATH=${DATA_PATH:-data}
exec ${PYTHON:-python} CLIP4IDCinference.py --do_train --num_thread_reader=4 --epochs=50 --batch_size=16 --n_display=50 --data_path "${DATA_PATH}" \
  --features_path "${DATA_PATH}" --output_dir ckpts/ckpt_clevr_caption --lr 1e-4 --max_words 32 --batch_size_val 64 \
  --datatype clevr --coef_lr 1e-3 --freeze_layer_num 0 --linear_patch 2d --pretrained_clip_name ViT-B/32 --seed 2021 \
  --init_model pretrained/pytorch_model.bin.clevr "$@"
