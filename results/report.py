"""Figures and tables of both READMEs, from what results/reproduce.sh measured.

python results/report.py                          results/results.jsonl -> results/*.png, and the tables
python results/report.py --collect=out/evidence   first takes the results from the runs there
"""

import argparse
import contextlib
import io
import itertools
import json
import re
import statistics
import sys
import textwrap
from functools import partial
from pathlib import Path

import matplotlib
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import eval_long
from data import run_script, write_whole
from model import load_run

matplotlib.use("Agg")
from matplotlib import pyplot  # after the choice of a backend

RESULTS = ROOT / "results"
FAR = 32768  # tokens: where the arms are compared
SEEDS = (2, 3, 4, 5, 6, 7)  # 0 and 1 chose the setting
COLORS = {"zero": "#000000", "noise": "#E69F00", "fitted": "#009E73", "prev": "#0072B2", "tbtt": "#CC79A7"}
COLORS |= {"base": "#999999", "cap": "#D55E00"}
LABELS = {
    "base": "base",
    "zero": "control: 500 more from zero",
    "cap": "control, memories capped at 2 T",
    "noise": "noise",
    "fitted": "fitted noise",
    "prev": "State Passing (prev)",
    "tbtt": "TBTT",
}
KEPT = (
    "run",
    "init_state",
    "step",
    "seq_len",
    "from",
    "to",
    "tokens",
    "nll",
    "excess",
    "excess_se",
    "window_loss",
)


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def collect(folder):
    """One file of all results in a folder of runs, and the base of the first seed without its optimizer."""
    rows = []
    for path in sorted(folder.glob("*/eval/results.jsonl")):
        for row in read_jsonl(path):
            rows.append({name: row[name] for name in KEPT} | {"run": path.parts[-3]})
    for path in sorted(folder.glob("*.jsonl")):
        rows += read_jsonl(path)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, float):
                row[name] = round(value, 5)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(RESULTS / "results.jsonl", lines)
    _, checkpoint = load_run(folder / f"base-{SEEDS[0]}")
    kept = {name: value for name, value in checkpoint.items() if name not in ("optimizer", "kept")}
    write_whole(RESULTS / "base/ckpt.pt", lambda file: torch.save(kept, file))
    write_whole(RESULTS / "base/tokenizer.json", (folder / f"base-{SEEDS[0]}/tokenizer.json").read_text())


class Results:
    """What was measured, by the name of the run."""

    def __init__(self, rows):
        self.curves = {}  # {run: its rows of eval_long.py}
        self.measures = {}  # {(measure, run): its rows of measure.py}
        for row in rows:
            if "measure" in row:
                self.measures.setdefault((row["measure"], row["run"]), []).append(row)
            else:
                self.curves.setdefault(row["run"], []).append(row)

    def at(self, run, name, t=FAR):
        """A number of a run in the bucket that ends at t."""
        return next(row[name] for row in self.curves[run] if row["to"] == t)

    def per_seed(self, arm, name, t=FAR, seeds=SEEDS):
        return [self.at(f"{arm}-{seed}", name, t) for seed in seeds if f"{arm}-{seed}" in self.curves]

    def numbers(self, run):
        """Excess, NLL and window loss of a run, as cells of a table."""
        styles = (("excess", "+.2f"), ("nll", ".3f"), ("window_loss", ".3f"))
        return [f"{self.at(run, name):{style}}" for name, style in styles]

    def T(self):
        return self.curves[f"base-{SEEDS[0]}"][0]["seq_len"]


def spread(values, style="+.2f"):
    """Median and range"""
    return f"{statistics.median(values):{style}} ({min(values):{style}} to {max(values):{style}})"


def sign_flip_p(differences):
    """Two-sided: the share of all ways to flip signs that give a mean at least as far from 0."""
    observed = abs(sum(differences))
    flips = list(itertools.product((1, -1), repeat=len(differences)))
    sums = [abs(sum(sign * d for sign, d in zip(signs, differences))) for signs in flips]
    return sum(total >= observed - 1e-12 for total in sums) / len(flips)


def table(head, rows):
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


# ------------------------------------------------------------------------------------------------------------
# Tables


def readme_table(results):
    rows = []
    for arm in ("base", "zero", "prev", "tbtt"):
        excess = results.per_seed(arm, "excess")
        repaired = sum(value <= 0.05 for value in excess)
        window = statistics.median(results.per_seed(arm, "window_loss"))
        cells = [LABELS[arm], spread(excess), f"{repaired} of {len(excess)}", f"{window:.3f}"]
        rows.append(cells)
    return table(["", f"excess at {FAR:,} tokens: median (range)", "repaired", "window loss"], rows)


def headline_table(results):
    """D = excess of the control - excess of the arm, paired by seed; costs against the control."""
    rows = []
    for arm in ("noise", "fitted", "prev", "tbtt", "cap"):
        pairs = list(zip(results.per_seed("zero", "excess"), results.per_seed(arm, "excess")))
        gains = [control - excess for control, excess in pairs]
        cells = [LABELS[arm], " ".join(f"{gain:+.2f}" for gain in gains), f"{statistics.median(gains):+.2f}"]
        repaired = sum(excess <= 0.05 for _, excess in pairs)
        cells += [f"{sign_flip_p(gains):.3f}", f"{repaired} of {len(pairs)}"]
        rows.append(cells)
    return table(["", "D of each seed", "median", "p", "repaired"], rows)


def cost_table(results):
    T = results.T()
    rows = []
    for arm in ("noise", "fitted", "prev", "tbtt", "cap"):
        cells = [LABELS[arm]]
        for name, t in (("window_loss", FAR), ("nll", 2 * T), ("nll", 4 * T), ("nll", FAR)):
            pairs = zip(results.per_seed("zero", name, t), results.per_seed(arm, name, t))
            cells.append(spread([value - control for control, value in pairs], "+.3f"))
        rows.append(cells)
    return table(["", "window loss", f"NLL at {2 * T}", f"NLL at {4 * T}", f"NLL at {FAR:,}"], rows)


def seeds_table(results):
    rows = []
    for arm, label in LABELS.items():
        excess = results.per_seed(arm, "excess")
        rows.append([label] + [f"{value:+.2f}" for value in [*excess, statistics.median(excess)]])
    return table([f"excess at {FAR:,}"] + [f"seed {seed}" for seed in SEEDS] + ["median"], rows)


def frozen_table(results):
    seeds = SEEDS[:4]
    rows = []
    for arm in ("zero", "noise", "prev"):
        free = results.per_seed(arm, "excess", seeds=seeds)
        frozen = results.per_seed(f"frozen-{arm}", "excess", seeds=seeds)
        cells = [" ".join(f"{value:+.2f}" for value in values) for values in (free, frozen)]
        rows.append([LABELS[arm], *cells])
    return table([f"excess at {FAR:,}, seeds 2 to 5", "as in section 1", "forgetting held fixed"], rows)


def surgery_table(results):
    """Against a base whose cap changes nothing, on the same texts (shorter ones than the headline's)."""
    names = {"cap100000": "base"}
    names |= {f"cap{times}": f"base, memories capped at {times} T" for times in (1, 2, 4, 8, 32)}
    names |= {"prevs_rates": "base with A, dt_bias of prev", "bases_rates": "prev with A, dt_bias of base"}
    rows = []
    for arm, label in names.items():
        excess = results.per_seed(arm, "excess")
        losses = zip(results.per_seed(arm, "window_loss"), results.per_seed("cap100000", "window_loss"))
        rows.append([label, spread(excess), spread([loss - base for loss, base in losses], "+.3f")])
    return table(["", f"excess at {FAR:,}", "window loss - that of the base"], rows)


def late_table(results):
    rows = []
    for arm, label in LABELS.items():
        costs = {"own": [], "base": []}
        for seed in SEEDS:
            losses = {}
            for row in results.measures.get(("late_state", f"{arm}-{seed}"), []):
                losses[row["state_of"].split("-")[0]] = row["nll"]
            for whose in costs if losses else ():
                costs[whose].append(losses[whose] - losses["zero"])
        if costs["own"]:
            rows.append([label, spread(costs["own"]), spread(costs["base"])])
    return table(["", "from its own late state", "from the base's late state"], rows)


def memory_table(results):
    rows = []
    for arm, label in LABELS.items():
        found = [results.measures.get(("memory", f"{arm}-{seed}"), []) for seed in SEEDS]
        tokens = [rows[0]["tokens"] for rows in found if rows]
        if tokens:
            longest = " ".join(f"{max(heads):,.0f}" for heads in tokens)
            long = " ".join(str(sum(t > 2 * results.T() for t in heads)) for heads in tokens)
            rows.append([label, longest, long])
    return table(["", "longest memory, tokens, by seed", "heads (of 16) beyond 2 T, by seed"], rows)


def remembrance_table(results):
    T = results.T()
    rows = []
    for arm, label in LABELS.items():
        cells = []
        for context in (T // 2, T, 2 * T):
            values = []
            for seed in SEEDS:
                for row in results.measures.get(("remembrance", f"{arm}-{seed}"), []):
                    if row["context"] == context:
                        values.append(row["remembrance"])
            if values:
                cells.append(spread(values, ".2f"))
        if cells:
            rows.append([label, *cells])
    return table(["", *(f"last {context} of {4 * T} tokens" for context in (T // 2, T, 2 * T))], rows)


ORIGINS = {
    "low0.01": "0.01 to 16 (ours)",
    "low0.1": "0.1 to 16",
    "low1": "1 to 16",
    "official": "1 to 16, uniform (official)",
}


def origin_table(results):
    rows = []
    for arm, label in ORIGINS.items():
        for seed in (0, 1):
            if f"{arm}-{seed}" in results.curves:
                rows.append([label, str(seed), *results.numbers(f"{arm}-{seed}")])
    if "official5000" in results.curves:
        rows.append(["official, for 5,000 steps", "0", *results.numbers("official5000")])
    return table(["-A at the start", "seed", f"excess at {FAR:,}", "NLL there", "window loss"], rows)


def wrong_losses(results, arm, seed):
    """{(start, with conv inputs, first token): loss} of a run"""
    rows = results.measures.get(("wrong_state", f"{arm}-{seed}"), [])
    return {(row["start"], row["conv"], row["from"]): row["nll"] for row in rows}


def wrong_table(results):
    """The cost of each initial state against zero, median over the seeds."""
    T = results.T()
    spans = ((0, 8), (8, 32), (32, T), (T, 2 * T), (2 * T, 4 * T))
    rows = []
    starts = ("noise", "foreign", "foreign+separator", "true")
    for arm, start, conv in itertools.product(("base", "zero", "cap", "prev", "tbtt"), starts, (False, True)):
        losses = [wrong_losses(results, arm, seed) for seed in SEEDS]
        cells = [LABELS[arm], start, "with" if conv else "without"]
        for begin, _ in spans:
            costs = [found[start, conv, begin] - found["zero", conv, begin] for found in losses if found]
            cells.append(f"{statistics.median(costs):+.3f}")
        rows.append(cells)
    return table(["", "ssm", "conv inputs", *(f"{begin + 1}-{end}" for begin, end in spans)], rows)


def trust_table(results):
    """Does unrelated text teach distrust? The loss after the true text, less that of the capped control."""
    T = results.T()
    rows = []
    for arm in ("prev", "tbtt"):
        cells = [LABELS[arm]]
        for begin in (0, 8, 32, T, 2 * T):
            key = ("true", True, begin)
            pairs = [(wrong_losses(results, arm, seed), wrong_losses(results, "cap", seed)) for seed in SEEDS]
            cells.append(spread([ours[key] - control[key] for ours, control in pairs if ours], "+.3f"))
        rows.append(cells)
    return table(["", "1-8", "9-32", f"33-{T}", f"{T + 1}-{2 * T}", f"{2 * T + 1}-{4 * T}"], rows)


def corpora_table(results):
    runs = [f"prose-{arm}-{seed}" for seed in (0, 1) for arm in ("base", "zero", "prev")]
    runs += [f"mid-{arm}" for arm in ("base", "zero", "prev", "tbtt", "cap")]
    rows = [[run, *results.numbers(run)] for run in runs if run in results.curves]
    return table(["run", f"excess at {FAR:,}", "NLL there", "window loss"], rows)


def past_table(results):
    """Against the capped control of as many steps, on the same texts; a number a seed."""
    T = results.T()
    places = (2 * T, 4 * T, 16 * T, FAR)
    seeds = SEEDS[:2]

    def cells(run, base=None):
        found = []
        for name, t in (("window_loss", FAR), *(("nll", t) for t in places)):
            values = [results.at(f"past-{run}-{seed}", name, t) for seed in seeds]
            if base:
                theirs = [results.at(f"past-{base}-{seed}", name, t) for seed in seeds]
                values = [value - other for value, other in zip(values, theirs)]
            found.append(" ".join(f"{value:+.3f}" if base else f"{value:.3f}" for value in values))
        return found

    rows = []
    for steps in ("500", "2000", "8000"):
        rows.append(["**control, capped**", "", steps, *cells(f"cap-1-{steps}")])
        for arm, prob in itertools.product(("prev", "tbtt"), ("0.1", "0.5", "1")):
            if f"past-{arm}-{prob}-{steps}-{seeds[-1]}" in results.curves:
                rows.append([arm, prob, steps, *cells(f"{arm}-{prob}-{steps}", f"cap-1-{steps}")])
    return table(["", "init_prob", "steps", "window loss", *(f"NLL at {t:,}" for t in places)], rows)


DOSES = (0, 125, 250, 500, 1000, 2000, 8000)


def dose_points(results, arm, seed, name):
    """{post-training steps: number} of zero or prev; 0 steps: the base, on the same texts as the others"""
    prob = {"zero": "1", "prev": "0.1"}[arm]
    runs = {0: f"cap100000-{seed}"}
    runs |= {steps: f"dose-{arm}-{steps}-{seed}" for steps in (125, 250, 1000)}
    runs |= {steps: f"past-{arm}-{prob}-{steps}-{seed}" for steps in (500, 2000, 8000)}
    return {steps: results.at(runs[steps], name) for steps in DOSES if runs[steps] in results.curves}


def dose_table(results):
    rows = []
    for arm, seed in itertools.product(("zero", "prev"), SEEDS[:2]):
        points = dose_points(results, arm, seed, "excess")
        cells = [f"{points[steps]:+.2f}" if steps in points else "" for steps in DOSES]
        rows.append([LABELS[arm].split(":")[0], str(seed), *cells])
    return table(["", "seed", *(f"{steps:,} steps" for steps in DOSES)], rows)


def setting_table():
    """The trials with the chosen setting, on seeds 0 and 1."""
    cells = {}
    for row in read_jsonl(RESULTS / "setting.jsonl"):
        if row["T"] == 64 and (row["arm"] == "base" or (row["lr"], row.get("init_prob", 0.1)) == (3e-3, 0.1)):
            numbers = [f"{row['excess']:+.2f}", f"{row['window_loss']:.3f}"]
            cells.setdefault(row["arm"], []).extend(numbers)
    rows = [[LABELS[arm], *cells[arm]] for arm in LABELS if arm in cells]
    return table(["", *(f"{name}, seed {s}" for s in (0, 1) for name in ("excess", "window loss"))], rows)


def speed_table():
    """Times of a training step over that of its matrix products alone, of speed.txt"""
    rows = []
    for line in (RESULTS / "speed.txt").read_text().splitlines():
        if line.startswith('{"'):
            report = json.loads(line)
            cells = [
                f"{report[name][2]:.1f}" for name in ("eager", "compiled", "transformer", "transformers")
            ]
            rows.append([report["preset"], report["dtype"], *cells])
    head = ["preset", "products in", "eager", "compiled", "a causal transformer", "`transformers`' Mamba-2"]
    return table(head, rows)


def kernel_table():
    """The rows of kernel_compile.txt for the preset small in bfloat16."""
    lines = (RESULTS / "kernel_compile.txt").read_text().splitlines()
    rows = json.loads(lines[-1])["kernels"]
    cells = []
    for row in rows:
        here = (row["shape"], row["dtype"], row["l"]) == ("small", "bf16", 2048)
        if here and row["target"] in ("sm_80", "sm_90"):
            numbers = [str(row[name]) for name in ("registers", "spilled")]
            numbers += [f"{row['shared']:,}", f"{row['tensor_ops']} for {row['products']}"]
            cells.append([row["kernel"], row["target"], *numbers])
    return table(
        ["kernel", "GPU", "registers", "spilled", "shared memory, bytes", "tensor instructions"], cells
    )


def quickstart_block():
    """What eval_long.py prints at the end of the README's quick start."""
    rows = read_jsonl(RESULTS / "quickstart/results.jsonl")
    runs = {run: [row for row in rows if row["run"] == run] for run in ("out/zero", "out/prev")}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        eval_long.print_table(runs)
    lines = [line.rstrip() for line in printed.getvalue().splitlines()[1:-2]]  # without the footnote
    return textwrap.indent("\n".join(lines), "    ")


NEEDS = {  # of each table and figure: the run, or the measure and run, without which there is nothing to show
    readme_table: "prev-7",
    headline_table: "cap-7",
    cost_table: "cap-7",
    seeds_table: "cap-7",
    frozen_table: "frozen-prev-5",
    surgery_table: "bases_rates-7",
    late_table: ("late_state", "prev-7"),
    memory_table: ("memory", "prev-7"),
    remembrance_table: ("remembrance", "prev-7"),
    origin_table: "official-0",
    wrong_table: ("wrong_state", "prev-7"),
    trust_table: ("wrong_state", "prev-7"),
    corpora_table: "prose-prev-1",
    past_table: "past-cap-1-8000-3",
    dose_table: "dose-prev-1000-3",
}


def there(results, need):
    return need in results.curves or need in results.measures


def tables(results):
    """{name: Markdown} of all that was measured."""
    found = {"kernel": kernel_table(), "speed": speed_table(), "setting": setting_table()}
    found["quickstart"] = quickstart_block()
    for make, need in NEEDS.items():
        if there(results, need):
            found[make.__name__.removesuffix("_table")] = make(results)
    return found


def fill(text, found):
    """Puts each table between its marks, <!-- name --> and <!-- end -->."""
    for name, content in found.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, content=content: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)
    return text


# ------------------------------------------------------------------------------------------------------------
# Figures


def curve(results, run, name="excess"):
    rows = results.curves[run]
    return [row["to"] for row in rows], [row[name] for row in rows]


def logarithmic(axis, T):
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda t, _: f"{t:,.0f}")
    axis.axvline(T, color="gray", linestyle=":", linewidth=1)
    axis.grid(alpha=0.25)
    axis.set_xlabel("t, tokens before the predicted one")


def headline_figure(results):
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 4.2), width_ratios=(3, 1.5), layout="constrained"
    )
    names = {
        "base": "base",
        "zero": "500 more steps\nfrom zero",
        "prev": "500 more steps\nwith State Passing",
    }
    ends = {}
    for arm in names:
        curves = [curve(results, f"{arm}-{seed}") for seed in SEEDS if f"{arm}-{seed}" in results.curves]
        for t, excess in curves:
            left.plot(t, excess, color=COLORS[arm], linewidth=0.7, alpha=0.5)
        t = curves[0][0]
        median = [statistics.median(values) for values in zip(*(excess for _, excess in curves))]
        left.plot(t, median, color=COLORS[arm], linewidth=2.6)
        ends[arm] = median[-1]
    # labels at the ends of the lines, moved apart where they would overlap
    low, high = left.get_ylim()
    place = None
    for arm in sorted(ends, key=ends.get):
        place = ends[arm] if place is None else max(ends[arm], place + 0.14 * (high - low))
        at_the_end = {"xycoords": left.get_yaxis_transform(), "annotation_clip": False, "va": "center"}
        left.annotate(names[arm], (1.01, place), color=COLORS[arm], **at_the_end)
    logarithmic(left, results.T())
    left.set_xlim(0.8 * results.T(), curves[0][0][-1])
    left.annotate(f"T = {results.T()}", (results.T(), 1), (3, -12), xycoords=("data", "axes fraction"),
                  textcoords="offset points", color="gray")  # fmt: skip
    left.axhline(0, color="gray", linewidth=0.8)
    left.set_ylabel("excess (nats/token): what reading\nthe whole past costs")
    strip(right, results, ["base", "zero", "noise", "fitted", "prev", "tbtt", "cap"])
    return figure


def strip(axis, results, arms):
    """The excess at FAR: a dot a seed."""
    for i, arm in enumerate(arms):
        values = results.per_seed(arm, "excess")
        offsets = [0.28 * (j / max(1, len(values) - 1) - 0.5) for j in range(len(values))]
        axis.plot([i + offset for offset in offsets], values, "o", color=COLORS[arm], markersize=5, alpha=0.8)
    axis.axhline(0, color="gray", linewidth=0.8)
    axis.set_xticks(range(len(arms)), ["control" if arm == "zero" else arm for arm in arms], rotation=45)
    axis.set_title(f"at {FAR:,} tokens, a dot a seed", fontsize=9)
    axis.grid(axis="y", alpha=0.25)


def dose_figure(results):
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, name, label in (
        (axes[0], "excess", f"excess at {FAR:,}"),
        (axes[1], "window_loss", "window loss"),
    ):
        for arm, seed in itertools.product(("zero", "prev"), SEEDS[:2]):
            points = dose_points(results, arm, seed, name)
            label_once = {"zero": "from zero", "prev": "State Passing"}[arm] if seed == SEEDS[0] else None
            axis.plot(points.keys(), points.values(), marker="o", color=COLORS[arm], label=label_once)
        axis.set_xscale("symlog", base=2, linthresh=125, linscale=0.7)
        axis.set_xticks(DOSES, [f"{steps:,}" for steps in DOSES], fontsize=8)
        axis.set(xlabel="post-training steps", ylabel=f"{label} (nats/token)", xlim=(-15, 10000))
        axis.grid(alpha=0.25)
    axes[1].legend()
    return figure


def origin_figure(results):
    figure, axis = pyplot.subplots(figsize=(6, 3.8), layout="constrained")
    shades = ("#440154", "#31688E", "#35B779", "#B5A000")
    for (arm, label), shade in zip(ORIGINS.items(), shades):
        for seed in (0, 1):
            if f"{arm}-{seed}" not in results.curves:
                continue
            t, excess = curve(results, f"{arm}-{seed}")
            axis.plot(t, excess, color=shade, label=label if seed == 0 else None)
    logarithmic(axis, results.T())
    axis.set_ylabel("excess (nats/token)")
    axis.legend(title="-A at the start", loc="upper left", bbox_to_anchor=(0.04, 1))
    return figure


def past_figure(results):
    """Gain far away against price within T; the capped control of as many steps is the origin."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained", sharex=True, sharey=True)
    for axis, steps in zip(axes, ("500", "2000")):
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.plot(0, 0, "s", color=COLORS["cap"], label="control, capped")
        for arm, seed in itertools.product(("prev", "tbtt"), SEEDS[:2]):
            points = []
            for prob in ("0.1", "0.5", "1"):
                run, control = f"past-{arm}-{prob}-{steps}-{seed}", f"past-cap-1-{steps}-{seed}"
                point = [results.at(run, name) - results.at(control, name) for name in ("window_loss", "nll")]
                points.append(point)
                axis.annotate(prob, point, (4, 4), textcoords="offset points", fontsize=7, color=COLORS[arm])
            style = {"marker": "o", "color": COLORS[arm], "linewidth": 1, "markersize": 5}
            axis.plot(*zip(*points), **style, label=LABELS[arm] if seed == SEEDS[0] else None)
        axis.fill_between([-0.02, 0.03], -0.2, -0.1, color="#009E73", alpha=0.2, linewidth=0)
        axis.set(title=f"{int(steps):,} steps", xlabel="window loss - that of the capped control")
        axis.grid(alpha=0.25)
    axes[0].set(xlim=(-0.02, 0.28), ylim=(-0.16, 0.25))
    axes[0].set_ylabel(f"NLL at {FAR:,} tokens\n- that of the capped control")
    axes[0].annotate("aim", (0.005, -0.14), color="#009E73", va="center", ha="center", fontsize=8)
    axes[1].legend(fontsize=8)
    return figure


def wrong_figure(results):
    arms = ("base", "zero", "prev", "tbtt")
    figure, axes = pyplot.subplots(1, 4, figsize=(12, 3.8), layout="constrained", sharey=True)
    colors = {"noise": "#E69F00", "foreign": "#D55E00", "foreign+separator": "#7A4B9A", "true": "#009E73"}
    for axis, arm in zip(axes, arms):
        for start, color in colors.items():
            for seed in SEEDS:
                found = {}
                for row in results.measures.get(("wrong_state", f"{arm}-{seed}"), []):
                    found[row["start"], row["conv"], row["to"]] = row["nll"]
                ends = sorted({end for _, _, end in found})
                costs = [found[start, True, end] - found["zero", True, end] for end in ends]
                axis.plot(
                    ends, costs, color=color, alpha=0.6, linewidth=1, label=start if seed == 2 else None
                )
        logarithmic(axis, results.T())
        axis.axhline(0, color="gray", linewidth=0.8)
        axis.set(title=LABELS[arm], xlabel="token after the initial state")
    axes[0].set_ylabel("cost against a zero state (nats/token)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    return figure


FIGURES = {  # name: (function, what it needs)
    "headline": (headline_figure, "cap-7"),
    "dose": (dose_figure, "dose-prev-1000-3"),
    "origin": (origin_figure, "official-0"),
    "past": (past_figure, "past-cap-1-8000-3"),
    "wrong_state": (wrong_figure, ("wrong_state", "prev-7")),
}


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--collect", type=Path, help="folder of the runs of results/reproduce.sh")
    args = parser.parse_args(argv)
    if args.collect:
        collect(args.collect)
    results = Results(read_jsonl(RESULTS / "results.jsonl"))
    found = tables(results)
    for name, content in found.items():
        print(f"\n{name}\n{content}")
    for path in (ROOT / "README.md", RESULTS / "README.md"):
        write_whole(path, fill(path.read_text(encoding="utf-8"), found))
    for name, (make, need) in FIGURES.items():
        if there(results, need):
            figure = make(results)
            write_whole(RESULTS / f"{name}.png", partial(figure.savefig, format="png", dpi=150))
            pyplot.close(figure)


if __name__ == "__main__":
    run_script(main)
