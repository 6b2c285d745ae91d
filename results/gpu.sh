#!/usr/bin/env bash
# Does it hold in larger models, on one GPU? Stop it whenever you like: the next call goes on.
#
#     bash results/gpu.sh               --preset=small (19M, T = 512) from scratch, and post-training; 1,024 T
#     bash results/gpu.sh 130m          post-training of state-spaces/mamba2-130m (T = 2,048), downloaded; 64 T
#     bash results/gpu.sh --rehearse    both at tiny sizes, with made-up weights for 130m: minutes on a CPU
#
# Runs are in out/gpu; results/gpu gets the results and a figure of each stage.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=out/gpu shown=results/gpu stages="${*:-small}"
sizes=--preset=small T=512 length=$((1024 * 512)) post=
get=download official= official_T=2048 official_length=131072 # the held-out text has room for no more
if [ "$stages" = --rehearse ]; then
    folder=out/gpu-rehearsal shown=$folder/results stages="small 130m"
    tiny="--seq_len=16 --batch_size=4 --save_every=2 --dataset=train.py"
    sizes="$tiny --tokenizer=byte --d_model=32 --n_layer=1 --d_state=16 --headdim=16 --steps=4"
    T=16 length=256 post=--steps=2 get=make_up official=$tiny official_T=16 official_length=256
fi

once() { # once NAME COMMAND...: if it has not been done yet
    [ ! -e "$folder/$1.done" ] || return 0
    echo "$(date +%T) $1"
    "${@:2}" && touch "$folder/$1.done"
}

train() { # train NAME FLAGS...: a new run, or the rest of one
    if [ -e "$folder/$1/ckpt.pt" ]; then
        python train.py --out="$folder/$1" --resume
    else
        rm -rf "${folder:?}/$1" && python train.py --out="$folder/$1" "${@:2}"
    fi
}

cap() { # cap NAME RUN TOKENS: another memory without training
    python results/surgery.py cap "$folder/$2" "$folder/$1" --tokens="$3"
}

finish() { # finish STAGE LENGTH RUN...: evaluates one after the other, draws all
    local results=$folder/$1-eval/results.jsonl
    for run in "${@:3}"; do
        once "$run-$2" python eval_long.py "$folder/$run" --max_len="$2" --out="$folder/$1-eval"
    done
    cp "$results" "$shown/$1.jsonl"
    python - "$results" "$shown/$1.png" <<'P'
import json, sys
import eval_long
results = {}
for row in map(json.loads, open(sys.argv[1])):
    results.setdefault(row["run"], {})[row["to"]] = row
results = {run: list(rows.values()) for run, rows in results.items()}
eval_long.print_table(results)
eval_long.draw(sys.argv[2], results)
P
    echo "$shown/$1.png"
}

download() { # download FOLDER: config, weights (500 MB) and tokenizer
    for file in state-spaces/mamba2-130m/{config.json,pytorch_model.bin} EleutherAI/gpt-neox-20b/tokenizer.json; do
        local to=$1/${file##*/} from=https://huggingface.co/${file%/*}/resolve/main/${file##*/}
        [ -e "$to" ] || { curl -fL --create-dirs -o "$to.part" "$from" && mv "$to.part" "$to"; } || return
    done
}

make_up() { # make_up FOLDER: a tiny official checkpoint, for the rehearsal; needs tokenizers
    mkdir -p "$1" && python - "$1" <<'P'
import json, pathlib, sys, tokenizers, torch
from model import Mamba2Config, Mamba2LM
folder = pathlib.Path(sys.argv[1])
bpe, text = tokenizers.ByteLevelBPETokenizer(), pathlib.Path("train.py").read_text()
bpe.train_from_iterator([text], 300, special_tokens=["<|endoftext|>"], show_progress=False)
(folder / "tokenizer.json").write_text(bpe.to_str())
config = {"d_model": 32, "n_layer": 1, "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16}}
(folder / "config.json").write_text(json.dumps(config))
model = Mamba2LM(Mamba2Config(300, d_model=32, n_layer=1, d_state=16, headdim=16))
torch.save(model.state_dict(), folder / "pytorch_model.bin")
P
}

mkdir -p "$folder" "$shown"
for stage in $stages; do
    case $stage in
    small)
        once small-base train small-base $sizes
        for state in zero noise fitted prev tbtt; do # zero is the control
            once small-$state train small-$state --init_from=$folder/small-base --init_state=$state $post
        done
        for run in base zero; do
            once small-$run-cap cap small-$run-cap small-$run $((2 * T))
        done
        finish small $length small-{base,zero,noise,fitted,prev,tbtt,base-cap,zero-cap}
        ;;
    130m)
        once mamba2-130m $get $folder/mamba2-130m
        # The official weights as a run like the others: a step at a learning rate of 0 changes none of them.
        once 130m-base train 130m-base --init_from=$folder/mamba2-130m --steps=1 --lr=0 $official
        for state in zero prev; do
            once 130m-$state train 130m-$state --init_from=$folder/130m-base --init_state=$state --lr=3e-4 $post
        done
        once 130m-base-cap cap 130m-base-cap 130m-base $((2 * official_T))
        finish 130m $official_length 130m-{base,zero,prev,base-cap}
        ;;
    *) echo "no stage $stage" && exit 2 ;;
    esac
done
