#!/usr/bin/env bash
# Everything about training that needs a card, in one run: the gpu-marked tests, fine-tuning of 7B
# shapes beside transformers + PEFT + bitsandbytes, whether each preset fits its card, and SmolLM2
# taught on real pairs; then the same of reinforcement, beside TRL.
#
#     pip install -e '.[test,bench]' && bash nanopersrm/gpu.sh gpu-train [PAIRS]
#
# PAIRS: train.jsonl of data/build.py; without it, the demo writers. flash-attn is used where it is
# installed. The comparison writes 15 GB of random weights to TMPDIR, once for each run of it, and
# holds two or three 4-bit models at a time: 40 GB of card to be safe. Less is enough for the rest.
# A part that fails is named and does not stop the others.
set -uo pipefail
out=${1:-gpu-train}
pairs=()
if [ $# -gt 1 ]; then
    pairs=(--pairs "$(realpath "$2")")
fi
mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 1
failed=()
part() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name: $*"
    "$@" > "$out/$name.txt" 2>&1 || failed+=("$name")
    echo "took $((SECONDS - start)) s" >> "$out/$name.txt"
    tail -n 3 "$out/$name.txt"
}
part card nvidia-smi
part tests python -m pytest -m gpu -q

# Beside their peers: 7 billion random weights in NF4, rank 16, 4,096 packed tokens, recompute.
bench=(python -m nanopersrm.bench_train --device cuda "${pairs[@]+"${pairs[@]}"}" --pairs-a-step 8)
theirs=(peft-padded-autocast peft-packed-autocast peft-padded-16bit peft-packed-16bit)
part peers-7b "${bench[@]}" --shape qwen2.5-7b --nf4 --recompute --budget 4096 \
    --sides ours ours-whole "${theirs[@]}" --out "$out/peers-7b.json"
part peers-smollm2 "${bench[@]}" --out "$out/peers-smollm2.json"

# Presets: a few real steps each, held to the size of the card, and the forecast beside it. These
# need no more than the preset's own card.
for preset in 24gb 12gb 8gb; do
    part "forecast-$preset" python -m nanopersrm.memory --base-shape qwen2.5-7b --preset "$preset"
    part "preset-$preset" "${bench[@]}" --shape qwen2.5-7b --preset "$preset" --sides ours \
        --steps 3 --rounds 1 --out "$out/preset-$preset.json"
done

# The whole of it, with its time: SmolLM2 on real pairs.
part sft-smollm2 python train_sft.py "${pairs[@]+"${pairs[@]}"}" --base smollm2-135m-instruct \
    --out "$out/sft-smollm2"

# Reinforcement: a GRPO step of 7B shapes beside TRL + PEFT, each preset with our side alone, and
# SmolLM2 on real pairs.
rft=(python -m nanopersrm.bench_rft --device cuda --shape qwen2.5-7b --nf4 --recompute)
part rft-peers-7b "${rft[@]}" --prompt 2048 --reply 1024 --sides ours ours-whole trl \
    --out "$out/rft-peers-7b.json"
for preset in 24gb 12gb 8gb; do
    part "rft-preset-$preset" python -m nanopersrm.bench_rft --device cuda --shape qwen2.5-7b \
        --preset "$preset" --prompt 2048 --reply 1024 --sides ours --rounds 1 \
        --out "$out/rft-preset-$preset.json"
done
part rft-smollm2 python train_rft.py "${pairs[@]+"${pairs[@]}"}" --out "$out/rft-smollm2" \
    --adapter "$out/sft-smollm2/adapter"

echo "results in $out${failed:+; failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
