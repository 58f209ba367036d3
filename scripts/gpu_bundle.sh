#!/usr/bin/env bash
# Fetches the wheels that benchmarks/gpu.py needs on a GPU machine without network, into the ignored
# folder wheels/. Such a machine is taken to have torch, torchvision, OpenCV, pandas, safetensors,
# tensorboard and what these bring. Name more packages if it lacks some; PYTHON is its version.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
platforms=()
for version in 2_17 2_24 2_27 2_28 2_31 2_34; do
  platforms+=(--platform "manylinux_${version}_x86_64")
done
mkdir -p wheels
"$python" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp \
  --python-version "${PYTHON:-3.12}" "${platforms[@]}" --platform manylinux2014_x86_64 --dest wheels \
  ftfy wcwidth open_clip_torch "$@"
du -ch --apparent-size wheels/*.whl
echo "bring this checkout with wheels/ to the GPU machine; there, run:"
echo "  python3 -m pip install --no-index --no-deps --target wheels/site wheels/*.whl"
echo "  PYTHONPATH=wheels/site python3 benchmarks/gpu.py --output gpu.jsonl --table gpu.md"
