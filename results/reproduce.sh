#!/usr/bin/env bash
# Failure and repair: a base model per seed, then the same post-training of it from each initial state, then perplexity
# and excess up to 4,096 T.
#
#     bash results/reproduce.sh             three seeds, or those in SEEDS="0 1"
#     bash results/reproduce.sh --quick     one seed, a shorter base and shorter texts
#
# Stop it whenever you like: the next call goes on. Runs are in out/reproduce, numbers and figure in results/length.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --quick ]; then
    folder=quick base_steps=1000 seeds="0" length=8192
else
    folder=reproduce base_steps=4000 seeds="${SEEDS:-0 1 2}" length=131072
fi

run() { # run NAME FLAGS...: trains it, goes on with it, or finds that it is finished
    if [ -e "out/$folder/$1/ckpt.pt" ]; then
        python train.py --resume --out="out/$folder/$1"
    else
        python train.py --out="out/$folder/$1" --log_every=100 --val_every=500 --save_every=500 "${@:2}"
    fi
}

runs=()
for seed in $seeds; do
    run "base-$seed" --init_state=zero --steps=$base_steps --seed="$seed"
    runs+=("out/$folder/base-$seed")
    for state in zero noise fitted prev tbtt; do
        run "$state-$seed" --init_from="out/$folder/base-$seed" --init_state=$state --seed="$seed"
        runs+=("out/$folder/$state-$seed")
    done
    python eval_long.py "${runs[@]}" --max_len=$length --sequences=8 --out="out/$folder/eval"
done
python results/report.py "out/$folder"
