"""How well does a model predict the t-th token of a text, for t far past its training length T?

    python eval_long.py out/zero out/prev                     a table, out/eval/results.jsonl and out/eval/perplexity.png
    python eval_long.py out/prev --max_len=131072             further: 4,096 T for the default model
    python eval_long.py out/prev --dataset=novel.txt          on (the held-out fifth of) another text

Some positions happen to hold harder text than others, so each token is predicted twice by the same model:

    full        after all the t tokens before it. One pass over the text, in segments that carry the state.
    restarted   after only the last T/2 to T of them: windows of T tokens that overlap by half, each from a zero state,
                of which the second half counts. That is within what the model was trained on.

The excess is the mean of full - restarted, in nats/token, over the same tokens. Above 0, the longer past does harm: the
model does not generalize in length. Below 0, it helps. Tokens are counted in buckets of t: (T/2, T], (T, 2T], (2T, 4T]...;
in the first one the two predictions are the same, and the excess is 0.

Dimensions, the same letters in every file:
    b batch · l length · c chunk · q, s place in a chunk (row, column) · h head · p head dim
    g group of B, C · r head within its group (h = g r) · n state dim · d model width
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import load_corpus, load_tokenizer, tokenizer_json, write_whole
from model import choose_device, load_run

# Tokens of a forward pass, over all sequences: what fits a cache is faster, and memory does not grow with length.
TOKENS_AT_ONCE = 1024
COLORS = {"zero": "#000000", "noise": "#E69F00", "fitted": "#009E73", "prev": "#0072B2", "tbtt": "#CC79A7"}


def choose_starts(tokens, length, sequences, seed):
    """Where to begin `sequences` texts of length + 1 tokens that do not overlap, spread over all of `tokens`.
    sequences None: as many as fit, at most 16. ValueError says what would fit."""
    fit = len(tokens) // (length + 1)
    if fit < (sequences or 1):
        raise ValueError(f"the held-out text has {len(tokens):,} tokens: {sequences or 1} x {length:,} do not fit. "
                         f"--max_len={(len(tokens) // (sequences or 1)) - 1} would, or fewer --sequences")  # fmt: skip
    sequences = sequences or min(fit, 16)
    slot = len(tokens) // sequences
    return np.arange(sequences) * slot + np.random.default_rng(seed).integers(slot - length, size=sequences)


@torch.inference_mode()
def evaluate(model, tokens, starts, length, T, progress=None):
    """Predicts tokens[start + 1 : start + 1 + length] for each start, as the docstring above says. -> a list of rows, one
    for each bucket (from, to], with its number of tokens, means in nats/token and standard errors over the sequences."""
    half, b, device = T // 2, len(starts), model.lm_head.weight.device
    blocks = length // half  # all is counted in blocks of T/2 tokens; bucket i holds the blocks 2^i ... 2^(i+1) - 1
    at_once = max(2, TOKENS_AT_ONCE // (b * half))
    full = torch.zeros(b, (blocks - 1).bit_length(), dtype=torch.float64)  # sums of nats in each bucket
    restarted, window_nats, window_tokens, state = torch.zeros_like(full), 0.0, 0, None

    def read(first_block, l):  # (b, l + 1) ids
        places = starts[:, None] + first_block * half + np.arange(l + 1)
        return torch.from_numpy(tokens[places].astype(np.int64)).to(device)

    for i in range(0, blocks, at_once):
        n_blocks = min(at_once, blocks - i)
        idx = read(i, n_blocks * half)
        nll, state = model.per_token_nll(idx[:, :-1], idx[:, 1:], state)
        nll = nll.cpu().double().unflatten(1, (-1, half)).sum(-1)  # (b, n_blocks)
        before = min(i, 1)  # the windows that end in this segment; the first of them begins one block before it
        idx = read(i - before, (n_blocks + before) * half).unfold(1, T + 1, half)  # (b, windows, T + 1)
        window_nll = model.per_token_nll(idx[..., :-1].flatten(0, 1), idx[..., 1:].flatten(0, 1))[0].cpu().double()
        window_nats += window_nll.sum().item()
        window_tokens += window_nll.numel()
        window_nll = window_nll.view(b, -1, T)[..., half:].sum(-1)  # (b, windows)
        counted = torch.arange(max(i, 1), i + n_blocks)  # block 0 is in no bucket
        bucket = counted.double().frexp().exponent - 1
        full.index_add_(1, bucket, nll[:, -len(counted) :])
        restarted.index_add_(1, bucket, window_nll)
        if progress:
            progress.update(b * n_blocks * half)
    rows = []
    for i in range(full.shape[1]):
        begin, end = T << i >> 1, min(T << i, blocks * half)
        means, restarts = (sums[:, i] / (end - begin) for sums in (full, restarted))
        excess = means - restarts
        rows.append({"from": begin, "to": end, "tokens": b * (end - begin), "nll": means.mean().item(),
                     "perplexity": math.exp(means.mean()), "excess": excess.mean().item(),
                     "excess_se": (excess.std() / b**0.5).item() if b > 1 else None,
                     "window_loss": window_nats / window_tokens})  # fmt: skip
    return rows


def print_table(results):
    """results {run: rows}: a line for each bucket, two columns for each run."""
    width = max(28, *(len(name) + 2 for name in results))
    print(f"\n{'':24}" + "".join(f"{name:>{width}}" for name in results))
    print(f"{'t':>13}{'tokens':>11}" + f"{'perplexity   excess   +-':>{width}}" * len(results))
    counts = {(row["from"], row["to"]): row["tokens"] for rows in results.values() for row in rows}
    for (begin, end), count in sorted(counts.items()):
        line = f"{f'{begin}-{end}':>13}{count:>11,}"
        for rows in results.values():
            row = next((row for row in rows if (row["from"], row["to"]) == (begin, end)), None)
            error = "" if row is None or row["excess_se"] is None else f"{row['excess_se']:.3f}"
            cell = "" if row is None else f"{row['perplexity']:10.2f} {row['excess']:+8.3f} {error:>5}"
            line += f"{cell:>{width}}"
        print(line)
    print(f"{'window loss':>24}" + "".join(f"{rows[0]['window_loss']:{width}.3f}" for rows in results.values()))
    print("excess: nats/token against a restart with T/2 to T tokens of context; +-: standard error over sequences")
    print("window loss: nats/token in windows of T tokens from a zero state\n")


def draw(path, results):
    """The table as a picture: perplexity and excess over t."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for i, (name, rows) in enumerate(results.items()):
        t, color = [row["to"] for row in rows], COLORS.get(rows[0]["init_state"])
        same = sum(rows[0]["init_state"] == other[0]["init_state"] for other in list(results.values())[:i])
        style = {"color": color, "marker": "o", "markersize": 3, "label": name,
                 "linestyle": ["-", "--", ":", "-."][same % 4]}  # fmt: skip
        axes[0].plot(t, [row["perplexity"] for row in rows], **style)
        axes[1].plot(t, [row["excess"] for row in rows], **style)
        error = np.array([[row["excess"], row["excess_se"] or 0] for row in rows])
        axes[1].fill_between(
            t, error[:, 0] - error[:, 1], error[:, 0] + error[:, 1], color=color, alpha=0.2, linewidth=0
        )
    for axis, label in zip(axes, ("perplexity", "excess over a restart (nats/token)")):
        axis.set_xscale("log", base=2)
        for T in {rows[0]["seq_len"] for rows in results.values()}:
            axis.axvline(T, color="gray", linestyle=":", linewidth=1)
            axis.annotate(f"T = {T}", (T, 1), (2, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                          color="gray", fontsize=8)  # fmt: skip
        axis.set_xlabel("t (tokens before the predicted one, upper end of the bucket)")
        axis.set_ylabel(label)
        axis.xaxis.set_major_formatter(lambda t, _: f"{t:,.0f}")
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes[0].yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def main(argv=None):
    intro, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", help="run folders made by train.py, or their ckpt.pt")
    parser.add_argument("--max_len", type=int, default=65536, help="tokens of a sequence [65536]")
    parser.add_argument("--sequences", type=int, help="sequences [as many as the held-out text has, at most 16]")
    parser.add_argument("--seed", type=int, default=0, help="of where they begin [0]")
    parser.add_argument("--dataset", help="python, or a UTF-8 text file or a folder of them [the runs']")
    parser.add_argument("--out", default="out/eval", help="folder of results.jsonl and perplexity.png [out/eval]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"], help="of the scan [auto]")
    args = parser.parse_args(argv)
    try:
        device = choose_device(args.device)
        runs = {run: load_run(run, device) for run in args.runs}
        tokenizers = {run: load_tokenizer(run if Path(run).is_dir() else Path(run).parent) for run in runs}
        if len({tokenizer_json(tokenizer) for tokenizer in tokenizers.values()}) > 1:
            raise ValueError("these runs have different tokenizers, so their losses per token do not compare")
        datasets = {checkpoint["args"]["dataset"] for _, checkpoint in runs.values()}
        if len(datasets) > 1 and not args.dataset:
            raise ValueError(f"these runs were trained on {' and '.join(sorted(datasets))}: choose one with --dataset")
        longest = max(checkpoint["args"]["seq_len"] for _, checkpoint in runs.values())
        if args.max_len < longest:
            raise ValueError(f"--max_len={args.max_len} is less than T = {longest}, the training length")
        if args.sequences is not None and args.sequences < 1 or args.seed < 0:
            raise ValueError("--sequences should be at least 1, --seed at least 0")
        corpus = load_corpus(args.dataset or datasets.pop(), tokenizers[args.runs[0]])
        starts = choose_starts(corpus.val, args.max_len, args.sequences, args.seed)
        path = Path(args.out) / "results.jsonl"
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (ValueError, OSError) as error:
        parser.exit(2, f"eval_long.py: error: {' '.join(str(error).split())}\n")

    results = {}
    for run, (model, checkpoint) in runs.items():
        if checkpoint["corpus_hash"] != corpus.hash:
            print(f"note: {run} was trained on corpus {checkpoint['corpus_hash']}, this is {corpus.hash}")
        file = Path(run) / "ckpt.pt" if Path(run).is_dir() else Path(run)
        settings = {"checkpoint": hashlib.sha256(file.read_bytes()).hexdigest()[:12], "corpus_hash": corpus.hash,
                    "max_len": args.max_len, "sequences": len(starts), "seed": args.seed}  # fmt: skip
        rows = [row for row in known if settings.items() <= row.items()]
        if rows:
            print(f"{run} is in {path} already")
        else:
            model.config.backend = None if args.backend == "auto" else args.backend
            T = checkpoint["args"]["seq_len"]
            facts = {"run": run, "init_state": checkpoint["args"]["init_state"], "step": checkpoint["step"],
                     "seq_len": T}  # fmt: skip
            with tqdm(total=len(starts) * args.max_len, desc=run, unit=" tokens", unit_scale=True, disable=None) as bar:
                rows = evaluate(model, corpus.val, starts, args.max_len, T, bar)
            rows = [facts | settings | row for row in rows]
            known += rows
            text = "".join(json.dumps(row) + "\n" for row in known)
            write_whole(path, lambda file, text=text: file.write(text.encode()))
        results[run] = rows
    print_table(results)
    draw(path.with_name("perplexity.png"), results)
    print(f"{path}\n{path.with_name('perplexity.png')}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # what was finished is in results.jsonl
        sys.exit(130)
