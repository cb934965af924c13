#!/usr/bin/env bash
# Everything that needs a card, in one run: correctness in bf16 and fp16, the table of what the
# kernels compile to, every operation against its peers, and decoding against transformers.
#
#     pip install -e '.[test,bench]' && bash kernels/gpu.sh gpu-report
#
# flash-attn is used where it is installed. A part that fails is named and does not stop the others.
set -uo pipefail
out=${1:-gpu-report}
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.."
failed=()
part() {
    local name=$1
    shift
    echo "== $name: $*"
    "$@" > "$out/$name.txt" 2>&1 || failed+=("$name")
    tail -n 3 "$out/$name.txt"
}
part card nvidia-smi
part tests python -m pytest -m gpu -q
part compiled python -m kernels.aot
part kernels python -m kernels.bench --all --report --device cuda --json "$out/kernels.json"
for shape in qwen2.5-1.5b qwen2.5-7b; do
    part "decode-$shape" python -m nanopersrm.bench --shape "$shape" --device cuda
done
echo "results in $out${failed:+; failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
