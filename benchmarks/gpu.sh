#!/usr/bin/env bash
# Run the GPU tests, then compare quarkrl with the textbook on a GPU. Takes up to 8 minutes on one H100.
#
#     benchmarks/gpu.sh [PYTHON]
#
# PYTHON is the interpreter, .venv/bin/python by default. Results are written to benchmarks/results: gpu-tests.txt,
# iteration-gpt2-cuda.{md,json} and iteration-gpt2-xl-cuda.{md,json}. Without a GPU, the script exits with code 0.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
command -v "$python" > /dev/null || python=python3
results=benchmarks/results

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device. Nothing is run."
    exit 0
fi
mkdir -p "$results"
failed=0

# Time limits in seconds keep the whole within 8 minutes; a part that exceeds its limit counts as failed.
timeout 120 "$python" -m pytest -m gpu tests 2>&1 | tee "$results/gpu-tests.txt"
status=${PIPESTATUS[0]}
[ "$status" -eq 0 ] || [ "$status" -eq 5 ] || failed=1  # pytest exits with 5 where no test is selected.

# One repeat of each side. 989 TFLOP/s is the dense bf16 rate of an H100 SXM by its data sheet.
timeout 180 "$python" benchmarks/iteration.py --device cuda --peak_tflops 989 --shape gpt2 --batch_size 128 --batches 8 \
    --repeats 1 --sides textbook textbook-bf16 quarkrl quarkrl-bf16 generate --output "$results" || failed=1
timeout 180 "$python" benchmarks/iteration.py --device cuda --peak_tflops 989 --shape gpt2-xl --batch_size 64 --batches 2 \
    --repeats 1 --sides textbook-bf16 quarkrl-bf16 generate-bf16 --output "$results" || failed=1
exit "$failed"
