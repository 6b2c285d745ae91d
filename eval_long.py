"""How well does a model predict the t-th token of a text, for t far past its training length T?

    python eval_long.py out/zero out/prev      a table, out/eval/results.jsonl, out/eval/excess.png

Some positions happen to hold harder text than others. So each token is predicted twice, by the same model:

    full        after all the t tokens before it: one pass, in segments that carry the state over
    restarted   after only the last T/2 to T of them, from a zero state, as in training: in windows of T
                tokens that overlap by half, of which the second half counts

The *excess* is the mean loss (full) minus the mean loss (restarted), in nats/token, over the same tokens:
those with t in (T/2, T], (T, 2T], (2T, 4T], ... Above 0, the longer past does harm: the model does not
generalize in length. The *window loss* is the mean loss
over all restarted windows: what training from other states costs within T. All is in float32."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import choose_device, load_run

TOKENS_AT_ONCE = 1024  # of a forward pass: what fits a CPU's cache is faster


def choose_starts(tokens, length, sequences=None):
    """Where to begin `sequences` texts of length + 1 tokens that do not overlap, spread over all of `tokens`.
    None: as many as fit, at most 8."""
    fit = len(tokens) // (length + 1)
    sequences = sequences or max(1, min(fit, 8))
    if fit < sequences:
        longest = max(0, len(tokens) // sequences - 1)
        raise ValueError(f"{sequences} x {length:,} tokens do not fit in the text: --max_len={longest} would")
    slot = len(tokens) // sequences
    return np.arange(sequences) * slot + np.random.default_rng(0).integers(slot - length, size=sequences)


def make_buckets(length, T):
    """(0, T), (T, 2T), (2T, 4T), ... up to length; of the first, `evaluate` leaves out the first half"""
    edges = [0, T]
    while edges[-1] < length:
        edges.append(min(2 * edges[-1], length))
    return list(pairwise(edges))


@torch.inference_mode()
def evaluate(model, tokens, starts, length, T, bar):
    """Predicts tokens[start + 1 : start + 1 + length] for each start. length: a multiple of T/2, at least T.
    -> a dict for each bucket: from, to, tokens, means in nats/token, the excess's standard error (_se)."""
    half = T // 2
    b = len(starts)
    device = model.lm_head.weight.device
    segment = max(T, (TOKENS_AT_ONCE // b // half) * half)  # tokens of each text at once, a multiple of T/2

    def read(begin, end):  # (b, end - begin + 1) ids
        places = starts[:, None] + np.arange(begin, end + 1)
        return torch.from_numpy(tokens[places].astype(np.int64)).to(device)

    rows = []
    state = None
    window_sum, windows_seen = 0.0, 0
    for bucket_begin, bucket_end in make_buckets(length, T):
        full = torch.zeros(b, dtype=torch.float64)  # sums of nats over the bucket
        restarted = torch.zeros(b, dtype=torch.float64)
        for begin in range(bucket_begin, bucket_end, segment):
            end = min(begin + segment, bucket_end)
            first = max(begin, half)  # the first T/2 tokens of a text do not count

            # Full: go on from where the last segment stopped.
            idx = read(begin, end)
            nll, state = model.per_token_nll(idx[:, :-1], idx[:, 1:], state)  # (b, end - begin)
            full += nll[:, first - begin :].cpu().double().sum(1)

            # Restarted: windows that begin T/2 apart. Their second halves, side by side, are the segment.
            windows = read(first - half, end).unfold(1, T + 1, half)  # (b, windows, T + 1)
            flat = windows.flatten(0, 1)
            nll, _ = model.per_token_nll(flat[:, :-1], flat[:, 1:])
            nll = nll.view(*windows.shape[:2], T).cpu().double()
            restarted += nll[..., half:].sum((1, 2))
            window_sum += nll.mean(2).sum().item()
            windows_seen += len(flat)
            bar.update(b * (end - begin))

        count = bucket_end - max(bucket_begin, half)
        excess = (full - restarted) / count  # (b)
        row = {"from": bucket_end - count, "to": bucket_end, "tokens": b * count}
        row |= dict(nll=(full / count).mean().item(), excess=excess.mean().item())
        row["excess_se"] = (excess.std() / b**0.5).item() if b > 1 else None
        rows.append(row)
    return [row | {"window_loss": window_sum / windows_seen} for row in rows]


# ---- A table and a picture of {run: rows}


def print_table(results):
    width = max(28, *(len(run) + 2 for run in results))
    print(f"\n{'':24}" + "".join(f"{run:>{width}}" for run in results))
    print(f"{'t':>13}{'tokens':>11}" + f"{'perplexity   excess   +-':>{width}}" * len(results))
    for rows in zip(*results.values()):  # one bucket, of all runs
        line = f"{rows[0]['from']}-{rows[0]['to']}".rjust(13) + f"{rows[0]['tokens']:>11,}"
        for row in rows:
            error = "" if row["excess_se"] is None else f"{row['excess_se']:.3f}"
            line += f"{math.exp(row['nll']):10.2f} {row['excess']:+8.3f} {error:>5}".rjust(width)
        print(line)
    losses = "".join(f"{rows[0]['window_loss']:{width}.3f}" for rows in results.values())
    print(f"{'window loss':>24}{losses}")
    print("\nexcess: nats/token lost by reading all t tokens, not only the last T/2 to T; +-: standard error")


def draw(path, results):
    """Perplexity and excess over t, a line for each run; dotted: T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    curves = {
        "perplexity": lambda row: math.exp(row["nll"]),
        "excess (nats/token)": lambda row: row["excess"],
    }
    for axis, (name, value) in zip(axes, curves.items()):
        for run, rows in results.items():
            t = [row["to"] for row in rows]
            axis.plot(t, [value(row) for row in rows], "o-", markersize=3, label=run)
        axis.axvline(rows[0]["seq_len"], color="gray", linestyle=":")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.set(xlabel="t, tokens before the predicted one", ylabel=name)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_minor_formatter("{x:g}")
    axes[0].legend()
    axes[1].axhline(0, color="gray", linewidth=0.8)
    data.write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))


def make_parser():
    parser, add = data.make_parser(__doc__)
    positive = data.within(int, 1)
    parser.add_argument("runs", nargs="+", help="run folders made by train.py, or official checkpoints")
    add("--max_len", 65536, "tokens of a sequence", type=positive)
    add("--sequences", None, "how many; None: as many as the text has, at most 8", type=positive)
    add("--dataset", None, "python, or a UTF-8 text file or folder; None: that of the runs")
    add("--out", "out/eval", "folder of results.jsonl and excess.png")
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--backend", None, "of the scan; None: triton on a GPU", choices=["triton", "torch"])
    return parser


def main(argv=None):
    # Everything that can be wrong, before the long part.
    torch.set_flush_denormal(True)  # as in train.py
    args = make_parser().parse_args(argv)
    device = choose_device(args.device)
    runs = {run: load_run(run, device) for run in args.runs}
    kinds = set()
    for run, (model, checkpoint) in runs.items():
        model.config.backend = args.backend
        tokenizer = data.load_tokenizer(run, model.config.vocab_size)
        dataset = args.dataset or checkpoint["args"]["dataset"]
        T = checkpoint["args"]["seq_len"]
        kinds.add((tokenizer.text, dataset, T))
    if len(kinds) > 1:
        raise ValueError("these runs have different tokenizers, datasets or T: evaluate them one by one")
    # tokenizer, dataset and T are those of all runs.
    if args.max_len < T:
        raise ValueError(f"--max_len={args.max_len} is less than T = {T}, the training length")
    corpus = data.load_corpus(dataset, tokenizer)
    length = args.max_len - args.max_len % (T // 2)
    starts = choose_starts(corpus.val, length, args.sequences)
    path = Path(args.out) / "results.jsonl"
    known = path.read_text() if path.exists() else ""
    data.write_whole(path, known)  # can it be written?

    # Run by run. What is finished is written at once, after what stands there already.
    results = {}
    for run, (model, checkpoint) in runs.items():
        total = len(starts) * length
        with tqdm(total=total, desc=run, unit=" tokens", unit_scale=True, disable=None) as bar:
            rows = evaluate(model, corpus.val, starts, length, T, bar)
        about = dict(run=run, init_state=checkpoint["args"].get("init_state", "zero"), seq_len=T)
        about |= dict(step=checkpoint["step"], corpus_hash=corpus.hash, max_len=length)
        results[run] = [about | row for row in rows]
        known += "".join(json.dumps(row) + "\n" for row in results[run])
        data.write_whole(path, known)
    print_table(results)
    draw(path.with_name("excess.png"), results)
    print(path, path.with_name("excess.png"))


if __name__ == "__main__":
    data.run_script(main)
