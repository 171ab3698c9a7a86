#!/usr/bin/env bash
# Run the GPU tests, then compare quarkrl with the textbook on one GPU. Takes up to 9 minutes on an H100; no network.
#
#     benchmarks/gpu.sh [--device cuda|cpu] [--quick] [--python PYTHON] [--output DIR] [--only PART]...
#
# --device cpu --quick runs every part with micro models on a CPU, in about two minutes: a test of this script.
# PYTHON is .venv/bin/python by default, or python3. It needs the dependencies of quarkrl and pytest;
# quarkrl is imported from src/. DIR is benchmarks/results by default, and a temporary directory with --quick. It gets
# gpu-tests.txt and gpu-gpt2, gpu-gpt2-xl and gpu-smollm2, each as .md and .json. PART is tests, gpt2, smollm2 or gpt2-xl.
# Without a GPU nothing is run, and the exit code is 0.
set -uo pipefail
cd "$(dirname "$0")/.."
device=cuda quick="" python=.venv/bin/python output="" only=""
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --quick) quick=1; shift ;;
        --python) python=$2; shift 2 ;;
        --output) output=$2; shift 2 ;;
        --only) only="$only $2"; shift 2 ;;
        *) echo "gpu.sh $1: must be --device, --quick, --python, --output or --only." >&2; exit 2 ;;
    esac
done
command -v "$python" > /dev/null || python=python3
if [ "$device" = cuda ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "gpu.sh: no CUDA device. Nothing is run."
    exit 0
fi
if [ -z "$output" ]; then
    output=benchmarks/results
    [ -z "$quick" ] || output=$(mktemp -d)
fi
mkdir -p "$output"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
failed=0

# part SECONDS COMMAND…: a part that fails or exceeds its limit does not keep the others from running.
part() {
    local limit=$1 began=$SECONDS
    shift
    timeout "$limit" "$python" "$@" || { echo "gpu.sh: failed: $*" >&2; failed=1; }
    echo "gpu.sh: $((SECONDS - began)) s: $*"
}

iteration=(benchmarks/iteration.py --device "$device" --repeats 1 --output "$output")
lora=(benchmarks/real_model.py --device "$device" --repeats 1 --output "$output" --name gpu-smollm2)
if [ -n "$quick" ]; then  # In float32: a processor without bf16 units takes a minute for its matmul rate.
    small=(--batch_size 8 --batches 1 --length 5)
    part 400 "${iteration[@]}" --name gpu-gpt2 --shape micro "${small[@]}" --sides textbook quarkrl generate
    part 400 "${lora[@]}" --shape micro-llama "${small[@]}"
    exit "$failed"
fi

wanted() { [ -z "$only" ] || [[ "$only " == *" $1 "* ]]; }

# The limits keep the whole within 9 minutes.
if wanted tests; then
    mapfile -t tests < <(grep -rl "mark.gpu" tests --include=*.py)
    timeout 60 "$python" -m pytest -m gpu "${tests[@]}" 2>&1 | tee "$output/gpu-tests.txt"
    status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || [ "$status" -eq 5 ] || failed=1  # pytest exits with 5 where no test is selected.
fi
bf16=(--sides textbook-bf16 quarkrl-bf16 generate-bf16)
! wanted gpt2 || part 150 "${iteration[@]}" --name gpu-gpt2 --shape gpt2 --batch_size 256 --batches 4 "${bf16[@]}"
# The real weights where `make real-model` has put them; random ones of the same size have the same throughput.
model=(--shape smollm2)
[ ! -f models/smollm2-135m-instruct/config.json ] || model=(--model models/smollm2-135m-instruct)
! wanted smollm2 || part 140 "${lora[@]}" "${model[@]}" --batch_size 128 --batches 4 --bf16 true
! wanted gpt2-xl || part 180 "${iteration[@]}" --name gpu-gpt2-xl --shape gpt2-xl --batch_size 64 --batches 2 "${bf16[@]}"
exit "$failed"
