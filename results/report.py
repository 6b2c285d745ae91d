"""The figures and tables of results/ from what results/reproduce.sh measured: means and standard deviations over seeds.

python results/report.py                  results/results.jsonl -> results/*.png, and the tables, also into the READMEs
python results/report.py out/reproduce    the same, but first takes the results from the runs there, and base-0 itself
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import re
import statistics
import sys
import textwrap
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import write_whole
from eval_long import MEASURES, draw, panels, print_perplexity
from model import load_run

RESULTS = ROOT / "results"
PLACE = ("seq_len", "to", "N", "context", "start", "depth")  # what tells the rows of a run and measure apart
NUMBERS = ("nll", "excess", "window_loss", "state_std", "remembrance", "cost", "accuracy")
LABELS = {"base": "base", "zero": "zero (control)", "plain": "zero, rates_lr 1", "noise": "noise", "fitted": "fitted",
          "prev": "prev", "tbtt": "tbtt", "long": "trained at 8 T", "dt": "base, dt scaled"}  # fmt: skip
WHEN = {"training length T": ("T=16", "steps=500", "T=64", "T=128"),
        "range of A": ("steps=500", "A=0.1", "A=1", "A=official"),
        "state size n": ("n=16", "n=64", "steps=500"),
        "training tokens": ("steps=500", "steps=1000", "base")}  # fmt: skip
WHEN_LABELS = {("training length T", "steps=500"): "T=32", ("range of A", "steps=500"): "0.01 to 16",
               ("state size n", "steps=500"): "n=128", "A=0.1": "0.1 to 16", "A=1": "1 to 16, logarithmic",
               "A=official": "1 to 16, uniform (official)", "steps=500": "2M", "steps=1000": "4.1M", "base": "8.2M"}  # fmt: skip
DEPENDS = {"zero": "zero (control)", "prev": "prev", "init_prob=0.5": "prev, init_prob 0.5", "init_prob=1": "prev, init_prob 1",
           "rates_lr=1": "prev, rates_lr 1", "noise_std=0.01": "noise, std 0.01", "noise_std=0.03": "noise, std 0.03",
           "noise": "noise, std 0.1", "noise_std=0.3": "noise, std 0.3"}  # fmt: skip
SCRATCH = {"prev": "prev", "tbtt": "tbtt", "scratch-prev": "prev from scratch", "scratch-tbtt": "tbtt from scratch"}
SHADES = ("#DCC15A", "#56A36C", "#2D708E", "#440154")


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def kind_of(row):
    """base-1 -> base; the base with a scaled dt -> dt"""
    name, _, seed = Path(row["run"]).name.rpartition("-")
    return "dt" if row["dt_scale"] != 1 else name if seed.isdigit() else Path(row["run"]).name


def over_seeds(rows, measure):
    """-> {kind of run: its rows, means over the seeds, with the standard deviation in <name>_se}"""
    groups = {}
    for row in rows:
        if row["measure"] == measure and row["part"] == "val":
            groups.setdefault(kind_of(row), {}).setdefault(tuple(row.get(name) for name in PLACE), []).append(row)
    merged = {}
    for kind, places in groups.items():
        for same in places.values():
            means = {"seeds": len(same)}
            for name in NUMBERS:
                if name in same[0]:
                    values = [row[name] for row in same]
                    means |= {name: statistics.mean(values),
                              f"{name}_se": statistics.stdev(values) if len(values) > 1 else 0.0}  # fmt: skip
            if measure == "perplexity":
                means["perplexity"] = math.exp(means["nll"])
            merged.setdefault(kind, []).append(same[0] | means)
    return merged


def of_seed_0(rows):
    """To compare with runs that there is one of: the same base, batches and noise."""
    return [row for row in rows if not re.search("-[1-9]$", row["run"])]


def pick(results, labels):
    return {label: results[kind] for kind, label in labels.items() if kind in results}


def excess_table(results, ts=(128, 512, 2048, 8192, 32768, 131072)):
    """Excess up to some t, mean and spread over the seeds; the loss within T."""
    present = {row["to"] for rows in results.values() for row in rows}
    ts = [t for t in ts if t in present]
    lines = ["| | " + " | ".join(f"t = {t:,}" for t in ts) + " | window loss |", "|---" * (len(ts) + 2) + "|"]
    for name, rows in results.items():
        at = {row["to"]: row for row in rows}
        cells = [spread(at[t], "excess", "+.2f") if t in at else "" for t in ts]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {spread(rows[0], 'window_loss', '.3f')} |")
    return "\n".join(lines)


def spread(row, name, how):
    """A mean with its standard deviation over the seeds, if there were several."""
    return f"{row[name]:{how}}" + (f" ± {row[name + '_se']:{how[-3:]}}" if row["seeds"] > 1 else "")


def when_label(title, kind):
    return WHEN_LABELS.get((title, kind), WHEN_LABELS.get(kind, kind))


def when_pictures(results):
    pictures = []
    for title, kinds in WHEN.items():
        lines = {when_label(title, kind):
                 (shade, [(row["to"], row["excess"], 0) for row in results[kind] if row["to"] <= 32768])
                 for kind, shade in zip(kinds, SHADES[-len(kinds) :]) if kind in results}  # fmt: skip
        pictures.append((title, "excess over a restart (nats/token)", lines))
    return pictures


def when_table(results):
    lines = ["| changed | excess at 256 T | window loss |", "|---|---|---|"]
    for title, kinds in WHEN.items():
        for kind in kinds:
            for row in results.get(kind, []):
                if row["to"] == 256 * row["seq_len"]:
                    lines.append(
                        f"| {title}: {when_label(title, kind)} | {row['excess']:+.2f} | {row['window_loss']:.2f} |"
                    )
    return "\n".join(lines)


def remembrance_table(results):
    """Effective Remembrance when only the last half, or the last T = 32 tokens, are kept."""
    places = [(128, 64), (128, 32), (4096, 2048), (4096, 32)]
    lines = ["| | " + " | ".join(f"N = {N:,}, last {context:,}" for N, context in places) + " |", "|---" * 5 + "|"]
    for name, rows in results.items():
        at = {(row["N"], row["context"]): row for row in rows}
        lines.append(f"| {name} | " + " | ".join(spread(at[place], "remembrance", ".2f") for place in places) + " |")
    return "\n".join(lines)


def start_table(results):
    """The cost of initial states over the first tokens (the buckets up to 8, weighted by their tokens) and at 129 to 256."""
    lines = ["| | " + " | ".join(f"{start}, {span}" for start in ("foreign", "true") for span in ("first 8", "129 to 256"))
             + " | noise, first 8 | fitted, first 8 |", "|---" * 7 + "|"]  # fmt: skip
    for name, rows in results.items():
        cost = {}
        for row in rows:
            if row["to"] <= 8:
                cost[row["start"], 8] = cost.get((row["start"], 8), 0) + row["cost"] * (row["to"] - row["from"]) / 8
            cost[row["start"], row["to"]] = row["cost"] if row["to"] > 8 else cost[row["start"], 8]
        keys = [("foreign", 8), ("foreign", 256), ("true", 8), ("true", 256), ("noise", 8), ("fitted", 8)]
        lines.append(f"| {name} | " + " | ".join(f"{cost[key]:+.2f}" for key in keys) + " |")
    return "\n".join(lines)


def recall_table(tasks):
    lines = ["| | " + " | ".join(f"size {name}" for name in ("1x", "2x", "4x", "8x")) + " |", "|---" * 5 + "|"]
    for name, rows in tasks.items():
        for depth in sorted({row["depth"] for row in rows}, key=str):
            found = [row for row in rows if row["depth"] == depth][:4]
            label = name if depth is None else f"{name}, depth {depth}"
            lines.append(f"| {label} | " + " | ".join(f"{row['accuracy']:.2f}" for row in found) + " |")
    return "\n".join(lines)


def quickstart_block():
    """What eval_long.py prints at the end of the README's quick start."""
    rows = read_jsonl(RESULTS / "quickstart/results.jsonl")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        print_perplexity({run: [row for row in rows if row["run"] == run] for run in ("out/zero", "out/prev")})
    lines = [line.rstrip() for line in printed.getvalue().splitlines()[1:-3]]  # without the footnotes
    return textwrap.indent("\n".join(lines), "    ")


def speed_table():
    """From what `train.py --bench` printed, on two machines: their dtypes tell them apart."""
    lines = [line for line in (RESULTS / "speed.txt").read_text().splitlines() if line.startswith('{"preset"')]
    rows = {tuple(row[name] for name in ("preset", "compile", "dtype")): row for row in map(json.loads, lines)}
    table = ["| preset | | without AMX: tokens/s | step / floor (range) | with AMX: tokens/s | step / floor (range) |",
             "|---" * 6 + "|"]  # fmt: skip
    for preset, (flag, name) in itertools.product(("tiny", "mid"), (("off", "eager"), ("on", "`--compile=on`"))):
        cells = []
        for row in (rows[preset, flag, dtype] for dtype in ("float32", "bfloat16")):
            least, most = row["floor_ratio_range"]
            cells += [f"{row['tokens_per_s']:,}", f"{row['floor_ratio']:.1f} ({least:.1f} - {most:.1f})"]
        table.append(f"| {preset} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def kernel_table():
    """The rows of kernel_compile.txt for the preset small in bfloat16: the larger of forward and backward."""
    found = {}  # kernel: rows (target, registers, spilled, bytes shared, instructions, products)
    for line in (RESULTS / "kernel_compile.txt").read_text().splitlines():
        if row := re.match(r"small +bf16 +(sm_[89]0) +(\w+)_kernel.* (\d+) +(\d+) +(\S+) +(\d+) / (\d+) +\d+%", line):
            numbers = [int(number.replace(",", "")) for number in row.groups()[2:]]
            found.setdefault(row[2], []).append((row[1], *numbers))
    lines = ["| kernel | launches | registers sm_80 / sm_90 | spills | shared memory, most | tensor-core instructions sm_90 |",
             "|---" * 6 + "|"]  # fmt: skip
    for kernel, rows in found.items():
        ampere, hopper = ([row for row in rows if row[0] == target] for target in ("sm_80", "sm_90"))
        registers = " / ".join(str(max(row[1] for row in side)) for side in (ampere, hopper))
        spills, shared = max(row[2] for row in rows), math.ceil(max(row[3] for row in rows) / 1024)
        label, (*_, instructions, products) = "walk (either way)" if kernel == "walk" else kernel, hopper[0]
        lines.append(f"| {label} | {len(hopper)} | {registers} | {spills} | {shared} KB | {instructions} for "
                     f"{products} product{'s' * (products > 1)} |")  # fmt: skip
    return "\n".join(lines)


def head_pictures(rows):
    """For seed 0: how the state of each head grows, a colour for each layer."""
    pictures = []
    for kind in ("base", "prev", "tbtt"):
        points = [row for row in rows if row["measure"] == "perplexity" and kind_of(row) == kind
                  and Path(row["run"]).name.endswith("-0")]  # fmt: skip
        if points:
            lines = {f"layer {i}" if j == 0 else f"_{i} {j}": (f"C{i}", [(row["to"], row["head_std"][i][j], 0) for row in points])
                     for i, heads in enumerate(points[0]["head_std"]) for j in range(len(heads))}  # fmt: skip
            pictures.append((kind, "standard deviation of a head's state", lines))
    return pictures


def best_dt_scale(run):
    """The scale with the lowest loss on training text, in the last bucket."""
    rows = read_jsonl(Path(run) / "eval" / "results.jsonl")
    rows = [row for row in rows if row["part"] == "train" and row["to"] == row["max_len"]]
    return min(rows, key=lambda row: row["nll"])["dt_scale"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", help="of the runs of results/reproduce.sh")
    parser.add_argument("--best_dt_scale", metavar="RUN", help="only print what was best for this run")
    args = parser.parse_args()
    if args.best_dt_scale:
        return print(best_dt_scale(args.best_dt_scale))
    out, source = RESULTS, RESULTS / "results.jsonl"
    if args.folder:
        folder = Path(args.folder)
        quick = folder.name == "quick"
        out, source = (folder, folder / "results.jsonl") if quick else (RESULTS, RESULTS / "results.jsonl")
        rows = read_jsonl(folder / "results.jsonl") + list(memories(folder))
        write_whole(source, "".join(json.dumps(short(row)) + "\n" for row in rows).encode())
        if not quick:
            export(folder / "base-0")
    rows = read_jsonl(source)
    found = tables(rows)
    for name, table in found.items():
        print(f"\n{name}\n{table}")
    for path in (ROOT / "README.md", RESULTS / "README.md") if out == RESULTS else ():
        write_whole(path, fill(path.read_text(encoding="utf-8"), found).encode())
    for name, (pictures, measure) in figures(rows).items():
        draw(out / f"{name}.png", pictures, MEASURES[measure][4], [32])
        print(out / f"{name}.png")


def short(row):
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}


def memories(folder):
    """How many tokens each head remembers, 1 / (A dt) with dt for an input of zero: sorted, of all layers."""
    for run in sorted(path.parent for path in Path(folder).glob("*-[0-9]/ckpt.pt")):
        mixers = [block.mixer for block in load_run(run)[0].backbone.layers]
        rates = torch.cat([torch.exp(m.A_log) * torch.nn.functional.softplus(m.dt_bias) for m in mixers])
        tokens = sorted((1 / rates).tolist())
        yield {"run": str(run), "measure": "memory", "part": "val", "dt_scale": 1, "tokens": tokens}


def memory_table(rows):
    """The longest memory and the median one, for each seed."""
    lines = ["| | longest memory of a head, in tokens, by seed | median |", "|---|---|---|"]
    for kind, label in LABELS.items():
        found = [row["tokens"] for row in rows if row["measure"] == "memory" and kind_of(row) == kind]
        if found and kind != "long":
            cells = (" · ".join(f"{f(tokens):,.0f}" for tokens in found) for f in (max, statistics.median))
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fill(text, found):
    """Puts each table between its marks, <!-- name --> and <!-- end -->."""
    return re.sub(
        r"(<!-- (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{found[m[2]]}\n{m[3]}", text, flags=re.DOTALL
    )


def tables(rows):
    """{name: Markdown} of all there is."""
    results, tasks = over_seeds(rows, "perplexity"), over_seeds(rows, "recall")
    remembrance, starts = over_seeds(rows, "remembrance"), over_seeds(rows, "init_state")
    found = {"repair": excess_table(pick(results, LABELS)), "memory": memory_table(rows)}
    if remembrance:
        found |= {
            "remembrance": remembrance_table(pick(remembrance, LABELS)),
            "starts": start_table(pick(starts, LABELS)),
        }
    if "steps=500" in results:
        first = over_seeds(of_seed_0(rows), "perplexity")
        found |= {"depends": excess_table(pick(first, DEPENDS)), "when": when_table(first), "tasks": recall_table(tasks),
                  "scratch": excess_table(pick(results, SCRATCH)), "quickstart": quickstart_block(),
                  "speed": speed_table(), "kernels": kernel_table()}  # fmt: skip
    return found


def figures(rows):
    """{name: (pictures, measure)} of all there is."""
    results, remembrance = over_seeds(rows, "perplexity"), over_seeds(rows, "remembrance")
    repair = panels(
        "perplexity", pick(results, {kind: LABELS[kind] for kind in LABELS if kind not in ("plain", "long", "dt")})
    )
    found = {"repair": (repair[:2], "perplexity")}
    if remembrance:
        found["heads"] = (head_pictures(rows), "perplexity")
        found["std"] = (repair[2:], "perplexity")
        found["remembrance"] = (panels("remembrance", pick(remembrance, LABELS)), "remembrance")
        found["init_state"] = (panels("init_state", pick(over_seeds(rows, "init_state"), LABELS)), "init_state")
    if "steps=500" in results:
        first = over_seeds(of_seed_0(rows), "perplexity")
        found["depends"] = (panels("perplexity", pick(first, DEPENDS))[1:2], "perplexity")
        found["when"] = (when_pictures(first), "perplexity")
        found["scratch"] = (panels("perplexity", pick(results, SCRATCH))[:2], "perplexity")
        tasks = over_seeds(rows, "recall")
        for task in ("copy", "passkey"):
            found[task] = (panels("recall", {k: v for k, v in tasks.items() if k.startswith(task)}), "recall")
    return found


def export(run):
    """The base run without its optimizer."""
    checkpoint = load_run(run)[1]
    weights = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "init_state", "file")}
    write_whole(RESULTS / "base" / "ckpt.pt", lambda file: torch.save(weights, file))
    for name in ("tokenizer.json", "args.json"):
        write_whole(RESULTS / "base" / name, (Path(run) / name).read_bytes())


if __name__ == "__main__":
    main()
