#!/usr/bin/env bash
# Everything that results/README.md shows: trains, evaluates, and ends with results/report.py.
#
#     bash results/reproduce.sh              all stages; each says how long it takes
#     bash results/reproduce.sh headline     one or some of them
#     bash results/reproduce.sh --quick      failure and repair: one seed, shorter; under 10 minutes; a figure in out/quick
#     JOBS=8 bash results/reproduce.sh       so many runs at once, of one thread each [the machine's cores]
#
# Stop it whenever you like: the next call goes on. Runs are in out/evidence, each with its log (<run>.txt); what was
# measured is in results/results.jsonl.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive # two runs of two threads each on two cores get in each other's way
folder=out/evidence bases=2000 steps=500 seeds="2 3 4 5 6 7" length=131072
stages="${*:-headline forgetting sensitivity past corpora origin dose}"
declare -A minutes=([headline]=110 [forgetting]=60 [sensitivity]=12 [past]=160 [corpora]=40 [origin]=45 [dose]=16)
if [ "$stages" = --quick ]; then
    minutes[headline]=15
    folder=out/quick bases=1000 steps=300 seeds=2 length=16384 stages=headline
fi

once() { # once NAME COMMAND...: if it has not been done yet
    [ -e "$folder/$1.done" ] || { "${@:2}" && touch "$folder/$1.done"; }
}

train() { # train NAME SCRIPT FLAGS...: a new run, or the rest of one
    if [ -e "$folder/$1/ckpt.pt" ]; then
        python "$2" --out="$folder/$1" --resume
    else
        rm -rf "${folder:?}/$1"
        python "$2" --out="$folder/$1" --compile=on --log_every=100 --save_every=500 "${@:3}"
    fi
}

evaluate() { # evaluate NAME LENGTH
    python eval_long.py "$folder/$1" --out="$folder/$1/eval" --max_len="$2" --sequences=8
}

run() { # run NAME LENGTH SCRIPT FLAGS...: trains and evaluates
    once "$1" train "$1" "${@:3}"
    once "$1-$2" evaluate "$1" "$2"
}

change() { # change NAME LENGTH ARGUMENTS OF SURGERY: another memory without training, and evaluates
    once "$1" python results/surgery.py "$3" "$folder/$4" "$folder/$1" "${@:5}"
    once "$1-$2" evaluate "$1" "$2"
}

measure() { # measure NAME MEASURE RUNS...
    once "$1" python results/measure.py "${@:2}" --out="$folder/$1.jsonl"
}

job() { # what stands in one line of a stage
    trap '[ $? = 0 ] || { echo "$2 failed: $(tail -n 1 "$folder/$2.txt")"; exit 255; }' EXIT
    "$@" >>"$folder/$2.txt" 2>&1
    echo "$(date +%T) $2"
}

in_parallel() {
    xargs -P "${JOBS:-$(getconf _NPROCESSORS_ONLN)}" -L 1 bash -euo pipefail -c 'job "$@"' job
}

export folder
export -f once train evaluate run change measure job
mkdir -p "$folder"
T=$(python -c "import train; print(train.make_parser().get_default('seq_len'))")

post() { # post NAME SEED BASE FLAGS...: a line for a stage: more training of a base
    echo "run $1 ${at:-32768} ${script:-train.py} --init_from=$folder/$3 --seed=$2 ${*:4}"
}

for stage in $stages; do
    echo "$(date +%T) stage $stage, about ${minutes[$stage]:-?} minutes of one core"
    case $stage in
    headline) # the question: does another initial state repair what fails, and more training from zero not?
        for s in $seeds; do
            echo "run base-$s $length train.py --seed=$s --steps=$bases"
        done | in_parallel
        for s in $seeds; do
            for state in zero prev tbtt fitted noise; do
                at=$length post "$state-$s" "$s" "base-$s" --init_state=$state --steps=$steps
            done
        done | in_parallel
        for s in $seeds; do
            echo "change cap-$s $length cap zero-$s --tokens=$((2 * T))"
        done | in_parallel
        ;;
    forgetting) # is it that the memories get shorter, or that the model tolerates late states?
        for s in $seeds; do
            for times in 1 2 4 8 32 100000; do
                echo "change cap$times-$s 32768 cap base-$s --tokens=$((times * T))"
            done
            echo "change prevs_rates-$s 32768 transplant base-$s --donor=$folder/prev-$s"
            echo "change bases_rates-$s 32768 transplant prev-$s --donor=$folder/base-$s"
        done | in_parallel
        for s in $seeds; do
            runs="$folder/base-$s $folder/zero-$s $folder/noise-$s $folder/fitted-$s $folder/prev-$s $folder/tbtt-$s"
            echo "measure memory-$s memory $runs"
            echo "measure late-$s late_state $runs --of $folder/base-$s"
            echo "measure remembrance-$s remembrance $runs"
        done | in_parallel
        for s in 2 3 4 5; do
            for state in zero noise prev; do
                script=results/frozen.py post "frozen-$state-$s" "$s" "base-$s" --init_state=$state
            done
        done | in_parallel
        ;;
    origin) # where the failure comes from: the slowest rates of forgetting at the start
        {
            echo "run official5000 32768 train.py --A_init=uniform --A_init_range 1 16 --seed=0 --steps=5000"
            for s in 0 1; do
                for low in 0.01 0.1 1; do
                    echo "run low$low-$s 32768 train.py --A_init_range $low 16 --seed=$s --steps=$bases"
                done
                echo "run official-$s 32768 train.py --A_init=uniform --A_init_range 1 16 --seed=$s --steps=$bases"
            done
        } | in_parallel
        ;;
    sensitivity) # what a wrong initial state costs
        for s in $seeds; do
            runs="$folder/base-$s $folder/zero-$s $folder/cap-$s $folder/prev-$s $folder/tbtt-$s"
            echo "measure wrong-$s wrong_state $runs"
        done | in_parallel
        ;;
    corpora) # another corpus: English prose, from Debian's package anarchism; another size: mid
        if [ ! -d out/anarchism ]; then
            (cd out && apt-get download anarchism && dpkg-deb -x anarchism_*.deb anarchism.deb)
            python - <<'P'
import html, pathlib, re
folder = pathlib.Path("out/anarchism")
folder.mkdir()
for page in pathlib.Path("out/anarchism.deb/usr/share/doc/anarchism/html").rglob("*.html"):
    text = re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", page.read_text(errors="ignore"))
    (folder / f"{page.stem}.txt").write_text(re.sub(r"\s*\n\s*", "\n", html.unescape(text)).strip())
P
        fi
        {
            echo "run mid-base 32768 train.py --preset=mid --seed=0"
            for s in 0 1; do
                echo "run prose-base-$s 32768 train.py --dataset=out/anarchism --seed=$s --steps=$bases"
            done
        } | in_parallel
        {
            for state in zero prev tbtt; do
                post mid-$state 0 mid-base --init_state=$state --lr=3e-3
            done
            for s in 0 1; do
                for state in zero prev; do
                    post "prose-$state-$s" "$s" "prose-base-$s" --init_state=$state
                done
            done
        } | in_parallel
        echo "change mid-cap 32768 cap mid-zero --tokens=512" | in_parallel
        ;;
    past) # who predicts better because of the longer past?
        for s in 2 3; do
            for steps in 500 2000; do
                post "past-zero-1-$steps-$s" "$s" "base-$s" --init_state=zero --steps=$steps
                for state in prev tbtt; do
                    for prob in 0.1 0.5 1; do
                        post "past-$state-$prob-$steps-$s" "$s" "base-$s" --init_state=$state \
                            --init_prob=$prob --steps=$steps
                    done
                done
            done
            for state in zero-1 tbtt-0.1; do # much longer, for those in which time might do it
                post "past-$state-8000-$s" "$s" "base-$s" --init_state="${state%-*}" \
                    --init_prob="${state#*-}" --steps=8000
            done
        done | in_parallel
        for s in 2 3; do
            for steps in 500 2000 8000; do
                echo "change past-cap-1-$steps-$s 32768 cap past-zero-1-$steps-$s --tokens=$((2 * T))"
            done
        done | in_parallel
        ;;
    dose) # how many steps does it take? (0, 500 and 2,000 are in forgetting and past)
        for s in 2 3; do
            for steps in 125 250 1000; do
                for state in zero prev; do
                    post "dose-$state-$steps-$s" "$s" "base-$s" --init_state=$state --steps=$steps
                done
            done
        done | in_parallel
        ;;
    *) echo "no stage $stage" && exit 2 ;;
    esac
done

if [ $folder = out/quick ]; then # results/ stays as it is
    python eval_long.py out/quick/{base,zero,prev,cap}-2 --max_len=$length --sequences=8 --out=out/quick
else
    python results/report.py --collect="$folder"
fi
