#!/usr/bin/env bash
# Everything that results/README.md shows, from the first base model to the last figure.
#
#     bash results/reproduce.sh             three seeds; two to three hours on two CPU cores
#     bash results/reproduce.sh --quick     failure and repair only: one seed, a shorter base, shorter texts; 8 minutes
#     JOBS=8 bash results/reproduce.sh      so many runs at once, of one thread each [as many as the machine has cores]
#
# Stop it whenever you like: the next call goes on. Runs are in out/reproduce, what they gave in results/results.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive # two runs of two threads each on two cores are ten times slower
folder=out/reproduce base=2000 post=500 seeds="0 1 2" length=131072
if [ "${1:-}" = --quick ]; then
    folder=out/quick base=500 post=200 seeds=0 length=16384
fi

train() { # train NAME FLAGS...: a new run, or the rest of one, or nothing
    if [ -e "$folder/$1/ckpt.pt" ]; then
        python train.py --out="$folder/$1" --resume
    else
        python train.py --out="$folder/$1" --compile=on --log_every=100 --val_every=500 --save_every=250 "${@:2}"
    fi
}

measure() { # measure NAME FLAGS...
    python eval_long.py "$folder/$1" --out="$folder/$1/eval" "${@:2}"
}

evaluate() { # evaluate NAME: all that is asked about this kind of run
    case $1 in
    copy-*)
        measure "$1" --measure=recall --max_len=256 ;;
    passkey-*)
        measure "$1" --measure=recall ;;
    T=* | n=* | A=* | steps=*)
        measure "$1" --max_len=32768 --sequences=8 ;;
    *)
        measure "$1" --max_len=$length --sequences=8 ;;
    esac
    [ $folder = out/quick ] && return
    case $1 in base-* | zero-* | noise-* | fitted-* | prev-* | tbtt-*)
        measure "$1" --measure=remembrance --max_len=128 --sequences=32
        measure "$1" --measure=remembrance --max_len=4096 --sequences=32
        measure "$1" --measure=init_state --sequences=96 ;;
    esac
    case $1 in base-*) # the repair without training: the scale is chosen on training text
        for scale in 0.03 0.06 0.12 0.25 0.5; do
            measure "$1" --dt_scale=$scale --part=train --max_len=8192 --sequences=4
        done
        measure "$1" --dt_scale="$(python results/report.py --best_dt_scale="$folder/$1")" --max_len=$length --sequences=8 ;;
    esac
}

job() { # job train|evaluate NAME FLAGS...
    name=$2
    trap '[ $? = 0 ] || { echo "$name failed: $(tail -n 1 "$folder/$name.txt")"; exit 255; }' EXIT
    "$@" >>"$folder/$name.txt" 2>&1
    echo "$(date +%T) $1 $name, $((SECONDS / 60)):$(printf %02d $((SECONDS % 60)))"
}

in_parallel() { # a job for each line of what comes in
    xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -euo pipefail -c 'job "$@"' job
}

export folder length
export -f train measure evaluate job
mkdir -p "$folder"

{
    for seed in $seeds; do
        echo "train base-$seed --steps=$base --seed=$seed"
    done
    [ "$folder" = out/quick ] || {
        for seed in $seeds; do # 6. from scratch, as many tokens as base and post-training together
            for state in prev tbtt; do
                echo "train scratch-$state-$seed --init_state=$state --steps=$((base + post)) --seed=$seed"
            done
            echo "train long-$seed --seq_len=256 --batch_size=16 --steps=$base --seed=$seed" # for 1.
        done
        for state in zero prev; do # 5. strict generalization
            echo "train copy-$state --init_state=$state --dataset=copy --tokenizer=byte --steps=1500"
        done
        for steps in 1000 500; do # 2. when does a model fail: one factor at a time, changed in steps=500
            echo "train steps=$steps --steps=$steps"
        done
        for T in 16 64 128; do
            echo "train T=$T --seq_len=$T --batch_size=$((4096 / T)) --steps=500"
        done
        for n in 16 64; do
            echo "train n=$n --d_state=$n --steps=500"
        done
        for low in 0.1 1; do
            echo "train A=$low --A_init_range $low 16 --steps=500"
        done
        echo "train A=official --A_init=uniform --A_init_range 1 16 --steps=500"
    }
} | in_parallel

{
    for seed in $seeds; do # 1. failure and repair
        for state in zero noise fitted prev tbtt; do
            echo "train $state-$seed --init_from=$folder/base-$seed --init_state=$state --steps=$post --seed=$seed"
        done
    done
    [ "$folder" = out/quick ] || {
        for seed in $seeds; do
            echo "train plain-$seed --init_from=$folder/base-$seed --rates_lr=1 --steps=$post --seed=$seed"
        done
        for std in 0.01 0.03 0.3; do
            echo "train noise_std=$std --init_from=$folder/base-0 --init_state=noise --noise_std=$std"
        done
        for flag in init_prob=0.5 init_prob=1 rates_lr=1; do # what the repair depends on
            echo "train $flag --init_from=$folder/base-0 --init_state=prev --$flag"
        done
        for state in zero fitted prev; do # 5.
            echo "train passkey-$state --init_from=$folder/base-0 --init_state=$state --dataset=passkey"
        done
    }
} | in_parallel

for run in "$folder"/*/; do
    echo "evaluate $(basename "$run")"
done | in_parallel

cat "$folder"/*/eval/results.jsonl >"$folder/results.jsonl"
python results/report.py "$folder"
