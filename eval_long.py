"""How well does a model predict the t-th token of a text, for t far past its training length T?

    python eval_long.py out/zero out/prev                     a table, out/eval/results.jsonl and out/eval/perplexity.png
    python eval_long.py out/prev --max_len=131072             further: 4,096 T for the default model
    python eval_long.py out/prev --dataset=novel.txt          on (the held-out fifth of) another text
    python eval_long.py out/zero out/prev --measure=remembrance       and why: how much of the past weighs on it,
    python eval_long.py out/zero out/prev --measure=init_state        what a wrong state at the start costs
    torchrun --nproc_per_node=2 eval_long.py out/prev         the first of these by several processes, or GPUs
    python eval_long.py out/copy --measure=recall             for models of --dataset=copy or passkey: right answers

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

from data import (TASKS, Corpus, check_can_write, load_corpus, make_sample, passkey_text, tokenizer_json,
                  tokenizer_of, write_whole)  # fmt: skip
from model import RANK, WORLD, Mamba2LM, all_rows, choose_device, load_run, mean_over_processes

# Tokens of a forward pass, over all sequences: what fits a cache is faster, and memory does not grow with length.
TOKENS_AT_ONCE = 1024
COLORS = {"zero": "#000000", "noise": "#E69F00", "fitted": "#009E73", "prev": "#0072B2", "tbtt": "#CC79A7",
          "foreign": "#0072B2", "true": "#CC79A7"}  # fmt: skip


def choose_starts(tokens, length: int, sequences: int | None, seed: int, most: int = 8, past: int = 0) -> np.ndarray:
    """Where to begin `sequences` texts of length + 1 tokens that do not overlap, spread over all of `tokens`.
    sequences None: as many as fit, at most `most`. Each has `past` more tokens before it, counted neither in length nor
    in what ValueError says would fit."""
    length += past
    fit = len(tokens) // (length + 1)
    if fit < (sequences or 1):
        longest = len(tokens) // (sequences or 1) - 1 - past
        advice = f"--max_len={longest} would, or fewer --sequences" if longest > 0 else "Choose a longer --dataset"
        raise ValueError(f"{sequences or 1} x {length:,} tokens do not fit into the text's {len(tokens):,}. {advice}")
    sequences = sequences or min(fit, most)
    slot = len(tokens) // sequences
    return np.arange(sequences) * slot + np.random.default_rng(seed).integers(slot - length, size=sequences)


def read(tokens, places, device):
    """tokens (a memory map) at `places` (...) -> ids (...), int64"""
    return torch.from_numpy(tokens[places].astype(np.int64)).to(device)


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """values (b), one for each sequence -> mean, standard error (None if there is only one)"""
    return values.mean().item(), (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


# ----------------------------------------------------------------------------------------------------------------------
# Four measures. Each takes the model, the tokens (recall: the corpus), where the sequences begin, their length, T, and a
# bar to update, and returns rows: dicts of plain values.


@torch.inference_mode()
def perplexity(model: Mamba2LM, tokens: np.ndarray, starts: np.ndarray, length: int, T: int, progress) -> list[dict]:
    """Predicts tokens[start + 1 : start + 1 + length] for each start, as the docstring above says. -> a row for each
    bucket (from, to], with its number of tokens, means in nats/token and standard errors over the sequences, and the
    standard deviations of the state after `to` tokens: of the whole, and of each head, layer by layer."""
    starts = np.array_split(starts, WORLD)[RANK]  # under torchrun, each process takes a part of the sequences
    half, b, device = T // 2, len(starts), model.lm_head.weight.device
    blocks = length // half  # all is counted in blocks of T/2 tokens; bucket i holds the blocks 2^i ... 2^(i+1) - 1
    at_once = max(2, TOKENS_AT_ONCE // (b * half))
    full = torch.zeros(b, (blocks - 1).bit_length(), dtype=torch.float64)  # sums of nats in each bucket
    restarted, window_nats, window_tokens, state, stds = torch.zeros_like(full), 0.0, 0, None, {}

    def read_blocks(begin, end):  # (b, l + 1) ids
        return read(tokens, starts[:, None] + np.arange(begin * half, end * half + 1), device)

    begin = 0
    while begin < blocks:
        bucket = max(0, begin.bit_length() - 1)
        end = min(begin + at_once, 2 << bucket, blocks)  # a segment lies in one bucket; block 0 is in none
        idx = read_blocks(begin, end)
        nll, state = model.per_token_nll(idx[:, :-1], idx[:, 1:], state)
        before = min(begin, 1)  # the windows that end in this segment; the first of them begins one block before it
        idx = read_blocks(begin - before, end).unfold(1, T + 1, half)  # (b, windows, T + 1)
        window_nll = model.per_token_nll(idx[..., :-1].flatten(0, 1), idx[..., 1:].flatten(0, 1))[0].cpu().double()
        window_nats += window_nll.sum().item()
        window_tokens += window_nll.numel()
        full[:, bucket] += nll[:, 0 if begin else half :].cpu().double().sum(1)
        restarted[:, bucket] += window_nll.view(b, -1, T)[..., half:].sum((1, 2))
        # the last segment of a bucket stays
        stds[bucket] = {"state_std": torch.cat([ssm.flatten() for _, ssm in state]).std().item(),
                        "head_std": [[round(std, 5) for std in ssm.std((0, 2, 3)).tolist()] for _, ssm in state]}  # fmt: skip
        progress.update(WORLD * b * (end - begin) * half)
        begin = end
    if WORLD > 1:  # (of the state's standard deviation, process 0 gives that over its own sequences)
        full, restarted = (all_rows(sums.to(device)).cpu() for sums in (full, restarted))
        window_nats = mean_over_processes(torch.tensor(window_nats, dtype=torch.float64, device=device)).item()
        b = len(full)
    rows = []
    for i in range(full.shape[1]):
        begin, end = T << i >> 1, min(T << i, blocks * half)
        nll, difference = full[:, i] / (end - begin), (full - restarted)[:, i] / (end - begin)
        mean, error = mean_and_error(difference)
        rows.append({"from": begin, "to": end, "tokens": b * (end - begin), "nll": nll.mean().item(),
                     "perplexity": math.exp(nll.mean()), "excess": mean, "excess_se": error,
                     "window_loss": window_nats / window_tokens} | stds[i])  # fmt: skip
    return rows


def run_through(model, idx, progress):
    """idx (b, l), from a zero state -> logits after the last token (b, vocab), state. In segments: constant memory."""
    state = None
    for segment in idx.split(max(1, TOKENS_AT_ONCE // len(idx)), dim=1):
        hidden, state = model.hidden(segment, state)
        progress.update(segment.numel())
    return model.lm_head(hidden[:, -1]), state


@torch.inference_mode()
def remembrance(model: Mamba2LM, tokens: np.ndarray, starts: np.ndarray, length: int, T: int, progress) -> list[dict]:
    """Effective Remembrance: how far the prediction q after N = `length` tokens moves when it is made after the last
    1, 2, 4, ... of them only: 1/2 sum |q - q'|, mean over the sequences. Near 0: what came before does not matter."""
    idx, context, rows = read(tokens, starts[:, None] + np.arange(length), model.lm_head.weight.device), 1, []
    q = run_through(model, idx, progress)[0].softmax(-1)  # (b, vocab)
    while context < length:
        restarted = run_through(model, idx[:, -context:], progress)[0].softmax(-1)
        mean, error = mean_and_error((q - restarted).abs().sum(1) / 2)
        rows.append({"N": length, "context": context, "remembrance": mean, "remembrance_se": error})
        context *= 2
    return rows


@torch.inference_mode()
def init_state(model: Mamba2LM, tokens: np.ndarray, starts: np.ndarray, length: int, T: int, progress) -> list[dict]:
    """What each state before a text costs over its next tokens, against a zero state. Means over buckets (from, to] of
    the position, in nats/token. With `past` the 128 T tokens that come before the text, the states are

        noise      Gaussian, with one standard deviation: that of all states after the pasts
        fitted     the same, mean and standard deviation for each layer and head
        foreign    the state after the past of another sequence: unrelated text
        true       the state after its own past, with its convolution inputs (the others have zeros there, as zero has)"""
    past, device = 128 * T, model.lm_head.weight.device
    idx = read(tokens, starts[:, None] + np.arange(past + length + 1), device)
    true = run_through(model, idx[:, :past], progress)[1]
    generator = torch.Generator(device).manual_seed(0)
    noise = [torch.randn(ssm.shape, generator=generator, device=device) for _, ssm in true]
    std = torch.cat([ssm.flatten() for _, ssm in true]).std()
    moments = [(ssm.mean((0, 2, 3), True), ssm.std((0, 2, 3), keepdim=True)) for _, ssm in true]  # each (1, h, 1, 1)
    states = {"zero": None, "noise": [(None, std * z) for z in noise],
              "fitted": [(None, mean + std * z) for z, (mean, std) in zip(noise, moments)],
              "foreign": [(None, ssm.roll(1, 0)) for _, ssm in true], "true": true}  # fmt: skip
    nlls = {}
    for name, state in states.items():
        nlls[name] = model.per_token_nll(idx[:, past:-1], idx[:, past + 1 :], state)[0].cpu().double()  # (b, length)
        progress.update(nlls[name].numel())
    rows, begin = [], 0
    while begin < length:
        end = min(2 * begin or 1, length)
        for name, nll in nlls.items():
            mean, error = mean_and_error((nll - nlls["zero"])[:, begin:end].mean(1))
            rows.append({"from": begin, "to": end, "start": name, "nll": nll[:, begin:end].mean().item(),
                         "cost": mean, "cost_se": error})  # fmt: skip
        begin = end
    return rows


@torch.inference_mode()
def recall(model: Mamba2LM, corpus: Corpus, starts: np.ndarray, length: int, T: int, progress) -> list[dict]:
    """Share of the answers' tokens that a model gets right, the earlier ones given, in the task that it was trained on:
    samples of each size, as many as there are starts, from the trained one up as far as they fit `length`. Passkeys at
    three depths."""
    task, rows, text = corpus.name, [], passkey_text(1) if corpus.name == "passkey" else ""
    size = TASKS[task][1]
    while True:
        for depth in (0.1, 0.5, 0.9) if task == "passkey" else (None,):
            random, right, tokens = np.random.default_rng(0), [], []
            for _ in starts:
                prompt, answer = map(corpus.tokenizer.encode_ordinary, make_sample(task, size, random, text, depth))
                idx = torch.tensor([prompt + answer], device=model.lm_head.weight.device)  # (1, l)
                if idx.numel() > length:
                    return rows
                guess = model.lm_head(model.hidden(idx[:, :-1])[0][0, -len(answer) :]).argmax(-1)
                right.append((guess == idx[0, -len(answer) :]).double().mean())
                tokens.append(idx.numel())
                progress.update(idx.numel())
            mean, error = mean_and_error(torch.stack(right))
            rows.append({"size": size, "to": round(np.mean(tokens)), "depth": depth, "accuracy": mean,
                         "accuracy_se": error})  # fmt: skip
        size *= 2


# name: the function, the default --max_len, the most sequences by default, what the bar counts for each of their tokens,
# and what is on the x axis
MEASURES = {"perplexity": (perplexity, 65536, 8, 1, "t (tokens before the predicted one, at most)"),
            "remembrance": (remembrance, 4096, 128, 2, "tokens of context kept"),
            "init_state": (init_state, 512, 256, 13, "tokens after the initial state"),
            "recall": (recall, 2048, 64, 1, "tokens of prompt and answer")}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Tables and pictures


def print_perplexity(results: dict[str, list[dict]]) -> None:
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


def panels(measure: str, results: dict[str, list[dict]]) -> list[tuple]:
    """results {run: rows} -> [(title, label of y, {label: (key of COLORS, or a colour, [(x, y, error)])})], one a picture"""

    def points(rows, x, y, **where):  # of those rows where, for example, N=4096
        error = "nll_se" if y == "perplexity" else f"{y}_se"  # in nats: a perplexity has a factor as its error
        return [(row[x], row[y], row.get(error)) for row in rows if where.items() <= row.items()]

    def lines(x, y, **where):
        return {run: (rows[0]["init_state"], points(rows, x, y, **where)) for run, rows in results.items()}

    if measure == "perplexity":
        labels = {"perplexity": "perplexity", "excess": "excess over a restart (nats/token)",
                  "state_std": "standard deviation of the state"}  # fmt: skip
        return [("", label, lines("to", name)) for name, label in labels.items()]
    if measure == "remembrance":
        label = "Effective Remembrance (total variation)"
        lengths = sorted({row["N"] for rows in results.values() for row in rows})
        return [(f"after {N:,} tokens", label, lines("context", "remembrance", N=N)) for N in lengths]
    if measure == "recall":
        depths = {row["depth"]: f"depth {row['depth']}" for rows in results.values() for row in rows}
        return [("" if depth is None else title, "share of the answers' tokens that are right",
                 lines("to", "accuracy", depth=depth)) for depth, title in depths.items()]  # fmt: skip
    starts = ("noise", "fitted", "foreign", "true")
    return [(run, "cost of the initial state (nats/token)",
             {start: (start, points(rows, "to", "cost", start=start)) for start in starts})
            for run, rows in results.items()]  # fmt: skip


def print_panels(pictures: list[tuple]) -> None:
    for title, label, lines in pictures:
        width = max(14, *(len(name) + 2 for name in lines))
        print(f"\n{', '.join(filter(None, (label, title)))}; in brackets: standard error over sequences")
        print(f"{'tokens':>10}" + "".join(f"{name:>{width}}" for name in lines))
        for i, (x, _, _) in enumerate(next(iter(lines.values()))[1]):
            cells = [points[i][1:] for _, points in lines.values()]
            print(f"{x:>10,}" + "".join(f"{f'{y:.3f} ({error or 0:.3f})':>{width}}" for y, error in cells))
    print()


def draw(path: Path, pictures: list[tuple], x_label: str, lengths) -> None:
    """The pictures that `panels` returns, side by side, with the training lengths marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    columns = 2 if len(pictures) == 4 else min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(max(5, 4.2 * columns), 3.6 * rows), layout="constrained",
                                   squeeze=False, sharey=len({label for _, label, _ in pictures}) == 1)  # fmt: skip
    for axis in axes.flat[len(pictures) :]:
        axis.axis("off")
    for axis, (title, label, lines) in zip(axes.flat, pictures):
        for i, (name, (color, points)) in enumerate(lines.items()):
            x, y, error = np.array([[x, y, error or 0] for x, y, error in points]).T
            # a name that begins with "_" is not in the legend
            same = 0 if name.startswith("_") else sum(color == other for other, _ in list(lines.values())[:i])
            axis.plot(x, y, color=COLORS.get(color, color), marker="o", markersize=3, label=name,
                      linestyle=["-", "--", ":", "-."][same % 4])  # fmt: skip
            low, high = (y * np.exp(-error), y * np.exp(error)) if label == "perplexity" else (y - error, y + error)
            axis.fill_between(x, low, high, color=COLORS.get(color, color), alpha=0.2, linewidth=0)
        axis.set_xscale("log", base=2)
        for T in lengths:
            axis.axvline(T, color="gray", linestyle=":", linewidth=1)
            axis.annotate(f"T = {T}", (T, 1), (2, -10), xycoords=("data", "axes fraction"), textcoords="offset points",
                          color="gray", fontsize=8)  # fmt: skip
        if label == "perplexity" or label.startswith("standard deviation"):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter(NullFormatter())
        axis.set(title=title, xlabel=x_label, ylabel=label)
        axis.xaxis.set_major_formatter(lambda t, _: f"{t:,.0f}")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if set(lines) != set(pictures[0][2]) or axis is axes[0, 0]:
            axis.legend(fontsize=8)
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=150))
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    intro, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("runs", nargs="+", help="run folders made by train.py, or their ckpt.pt")
    parser.add_argument("--measure", default="perplexity", choices=MEASURES, help="what to measure [perplexity]")
    lengths = ", ".join(f"{name} {length}" for name, (_, length, *_) in MEASURES.items())
    parser.add_argument("--max_len", type=int, help=f"tokens of a sequence [{lengths}]")
    most = ", ".join(f"{name} {most}" for name, (_, _, most, *_) in MEASURES.items())
    parser.add_argument("--sequences", type=int, help=f"sequences [as many as the text has, at most {most}]")
    parser.add_argument("--seed", type=int, default=0, help="of where they begin [0]")
    parser.add_argument("--dataset", help="python, a UTF-8 text file, a folder, an address, copy, passkey [the runs']")
    parser.add_argument("--part", default="val", choices=["val", "train"], help="held-out or training text [val]")
    parser.add_argument("--dt_scale", type=float, default=1.0, help="multiplies dt: below 1, the model's time goes "
                        "slower, a remedy without training [1]")  # fmt: skip
    parser.add_argument("--out", default="out/eval", help="folder of results.jsonl and <measure>.png [out/eval]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps [auto]")
    parser.add_argument("--backend", default="auto", choices=["auto", "triton", "torch"], help="of the scan [auto]")
    args = parser.parse_args(argv)
    measure, default_length, most, passes, x_label = MEASURES[args.measure]
    try:
        check_can_write(args.out)
        device = choose_device(args.device)
        runs = {run: load_run(run, device) for run in args.runs}
        tokenizers = [tokenizer_of(checkpoint) for _, checkpoint in runs.values()]
        if len(set(map(tokenizer_json, tokenizers))) > 1:
            raise ValueError("these runs have different tokenizers, so their losses per token do not compare")
        datasets = {checkpoint["args"]["dataset"] for _, checkpoint in runs.values()}
        if len(datasets) > 1 and not args.dataset:
            raise ValueError(f"these runs were trained on {' and '.join(sorted(datasets))}: choose one with --dataset")
        longest = max(checkpoint["args"]["seq_len"] for _, checkpoint in runs.values())
        length = max(default_length, longest) if args.max_len is None else args.max_len
        if length < longest:
            raise ValueError(f"--max_len={length} is less than T = {longest}, the training length")
        if args.sequences is not None and args.sequences < 1 or args.seed < 0 or not 0 < args.dt_scale <= 1e3:
            raise ValueError("--sequences should be at least 1, --seed at least 0, --dt_scale above 0, up to 1000")
        corpus = load_corpus(args.dataset or datasets.pop(), tokenizers[0])
        tokens = getattr(corpus, args.part)
        past = 128 * longest * (args.measure == "init_state")
        starts = choose_starts(tokens, length, args.sequences, args.seed, most, past)
        if past and len(starts) < 2:
            raise ValueError("--measure=init_state needs two --sequences: a foreign state comes from another one")
        if args.measure == "recall" and corpus.name not in TASKS:
            raise ValueError(f"--measure=recall needs a task, {' or '.join(TASKS)}: --dataset={corpus.name} is a text")
        if args.measure == "recall" and (args.seed or args.part != "val"):
            raise ValueError("--measure=recall draws samples of its own: leave out --seed and --part")
        if args.measure == "perplexity" and len(starts) % WORLD:
            raise ValueError(f"{len(starts)} sequences are not a multiple of the {WORLD} processes: choose --sequences")
        path = Path(args.out) / "results.jsonl"
        known = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (ValueError, OSError) as error:
        parser.exit(2, f"eval_long.py: error: {' '.join(str(error).split())}\n")

    results = {}
    for run, (model, checkpoint) in runs.items():
        if checkpoint["corpus_hash"] not in (None, corpus.hash):
            print(f"note: {run} was trained on corpus {checkpoint['corpus_hash']}, this is {corpus.hash}")
        digest = hashlib.sha256(Path(checkpoint["file"]).read_bytes()).hexdigest()[:12]
        settings = {"measure": args.measure, "checkpoint": digest, "corpus_hash": corpus.hash, "part": args.part,
                    "dt_scale": args.dt_scale, "max_len": length, "sequences": len(starts), "seed": args.seed}  # fmt: skip
        rows = [row for row in known if settings.items() <= row.items()]
        if rows:
            print(f"{run} is in {path} already")
        else:
            model.config.backend = None if args.backend == "auto" else args.backend
            for block in model.backbone.layers:
                block.mixer.dt_scale = args.dt_scale
            T, mode = (checkpoint["args"][name] for name in ("seq_len", "init_state"))
            facts = {"run": run, "init_state": mode, "step": checkpoint["step"], "seq_len": T}
            total = len(starts) * length * passes
            with tqdm(total=total, desc=run, unit=" tokens", unit_scale=True, disable=RANK > 0 or None) as bar:
                rows = measure(model, corpus if measure is recall else tokens, starts, length, T, bar)
            if not rows:
                parser.exit(2, f"eval_long.py: error: --max_len={length} is too short for this task\n")
            rows = [facts | settings | row for row in rows]
            known += rows
            if RANK == 0:
                write_whole(path, "".join(json.dumps(row) + "\n" for row in known).encode())
        results[run] = rows
    if RANK:
        return
    pictures, figure = panels(args.measure, results), path.with_name(f"{args.measure}.png")
    print_perplexity(results) if args.measure == "perplexity" else print_panels(pictures)
    draw(figure, pictures, x_label, {rows[0]["seq_len"] for rows in results.values()})
    print(f"{path}\n{figure}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # what was finished is in results.jsonl
        sys.exit(130)
    except OSError as error:  # a full disk, above all
        sys.exit(f"eval_long.py: error: {error}")
