"""Means over the seeds of what results/reproduce.sh measured: a table, a figure, and the base run without its optimizer.

python results/report.py out/reproduce      -> results/length/{results.jsonl, table.md, excess.png}, results/base
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from data import write_whole
from eval_long import draw
from model import load_run

LABELS = {"base": "base", "zero": "zero (control)"} | {name: name for name in ("noise", "fitted", "prev", "tbtt")}


def over_seeds(rows):
    """rows of one kind of run, all seeds -> a row for each bucket: means, and standard deviations over the seeds."""
    merged = []
    for to in sorted({row["to"] for row in rows}):
        same = [row for row in rows if row["to"] == to]
        values = {name: [row[name] for row in same] for name in ("perplexity", "excess", "window_loss")}
        means = {name: statistics.mean(numbers) for name, numbers in values.items()}
        spread = {f"{name}_se": statistics.stdev(v) if len(v) > 1 else 0.0 for name, v in values.items()}
        merged.append(same[0] | means | spread | {"seeds": len(same)})
    return merged


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the runs of results/reproduce.sh")
    folder = Path(parser.parse_args().folder)
    out = ROOT / "results" / ("length" if folder.name == "reproduce" else folder.name)
    rows = [json.loads(line) for line in (folder / "eval" / "results.jsonl").read_text().splitlines()]
    kinds = {}
    for row in rows:
        kinds.setdefault(LABELS[Path(row["run"]).name.rpartition("-")[0]], []).append(row)
    results = {kind: over_seeds(kinds[kind]) for kind in LABELS.values() if kind in kinds}
    seeds = next(iter(results.values()))[0]["seeds"]
    columns = [row["to"] for row in next(iter(results.values()))][1::2]
    lines = [f"Excess in nats/token at t up to ..., mean +- standard deviation over {seeds} seeds; window: loss in T tokens.", "",
             "| | " + " | ".join(f"{to:,}" for to in columns) + " | window |", "|---|" + "---|" * (len(columns) + 1)]  # fmt: skip
    for kind, buckets in results.items():
        cells = [f"{row['excess']:+.2f} +- {row['excess_se']:.2f}" for row in buckets if row["to"] in columns]
        window = f"{buckets[0]['window_loss']:.3f} +- {buckets[0]['window_loss_se']:.3f}"
        lines.append(f"| {kind} | " + " | ".join(cells) + f" | {window} |")
    text = "\n".join(lines) + "\n"
    print(text)
    write_whole(out / "table.md", lambda file: file.write(text.encode()))
    write_whole(
        out / "results.jsonl", lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    )
    draw(out / "excess.png", results)
    if folder.name == "reproduce":
        _, checkpoint = load_run(folder / "base-0")
        weights_only = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "init_state")}
        write_whole(ROOT / "results/base/ckpt.pt", lambda file: torch.save(weights_only, file))
        tokenizer = (folder / "base-0" / "tokenizer.json").read_bytes()
        write_whole(ROOT / "results/base/tokenizer.json", lambda file: file.write(tokenizer))


if __name__ == "__main__":
    main()
