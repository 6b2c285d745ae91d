"""The laboratory: what eval_long.py does not measure. All of it without training, on held-out text.

    python results/measure.py memory RUN...             how many tokens each head remembers, on real text
    python results/measure.py late_state RUN... --of R  each run on its own late state, and on that of R
    python results/measure.py wrong_state RUN...        what a wrong initial state costs over the next tokens
    python results/measure.py remembrance RUN...        how far predictions move when the past is cut off

Each appends a JSON line a run and place to --out [out/measure.jsonl], and prints it.
"""

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import model as model_file
from data import SEPARATOR, load_corpus, load_tokenizer, run_script, write_whole
from eval_long import choose_starts
from model import load_run

SEGMENT = 64  # tokens of each sequence at once


def read_forward(model, idx, state=None):
    """Reads idx (b, l) in segments -> the state after it"""
    for segment in idx.split(SEGMENT, dim=1):
        _, state = model.hidden(segment, state)
    return state


def memory(model, idx, T, args):
    """A head keeps exp(a_t) of its state at token t, so after 1 / mean(-a_t) tokens 1/e of it is left: that
    is what it remembers, in tokens. -> a row with the numbers of all heads, layer by layer, and their time
    steps"""
    decays = []  # of each call, each layer: the mean of -a (h)
    scan = model_file.ssd

    def recorded(u, a, *rest):
        decays.append(-a.mean((0, 1)))
        return scan(u, a, *rest)

    model_file.ssd = recorded
    read_forward(model, idx[:, :2048])
    model_file.ssd = scan
    layers = len(model.backbone.layers)
    means = torch.stack(decays).view(-1, layers, decays[0].numel()).mean(0)  # (layers, h)
    tokens = sorted((1 / means).flatten().tolist(), reverse=True)
    return [{"T": T, "tokens": [round(t, 1) for t in tokens]}]


def late_state(model, idx, T, args):
    """Loss (nats/token) over the next T tokens after `past` tokens: from a zero state, from the model's own
    state after them, and from the state in which the run --of reads them."""
    other, _ = load_run(args.of)
    past, text = idx[:, : args.past], idx[:, args.past : args.past + T + 1]
    rows = []
    for whose, state in (
        ("zero", None),
        ("own", read_forward(model, past)),
        (Path(args.of).name, read_forward(other, past)),
    ):
        nll, _ = model.per_token_nll(text[:, :-1], text[:, 1:], state)
        rows.append({"T": T, "state_of": whose, "past": args.past, "nll": nll.double().mean().item()})
    return rows


def wrong_state(model, idx, T, args):
    """Loss from a wrong initial state, in buckets of the position (8, 32, T, 2 T, 4 T).

    ssm: zero; noise with the standard deviation of true states; foreign, the state after another text;
    true, that after the text that does come before. conv: zero, or the inputs that belong to it (for zero
    and noise: the true ones). foreign+separator: the foreign text, then the separator that ends a
    document."""
    past, text = idx[:, : args.past], idx[:, args.past : args.past + 4 * T + 1]
    true = read_forward(model, past)
    foreign = [(conv.roll(1, 0), ssm.roll(1, 0)) for conv, ssm in true]
    separated = read_forward(model, torch.full((len(idx), 1), args.separator), foreign)
    generator = torch.Generator().manual_seed(0)
    noise, zero = [], []
    for conv, ssm in true:
        noise.append((conv, ssm.std() * torch.randn(ssm.shape, generator=generator)))
        zero.append((conv, torch.zeros_like(ssm)))
    rows = []
    starts = {"zero": zero, "noise": noise, "foreign": foreign, "true": true, "foreign+separator": separated}
    edges = [0, 8, 32, T, 2 * T, 4 * T]
    for name, state in starts.items():
        for with_conv in (False, True):
            used = state if with_conv else [(torch.zeros_like(conv), ssm) for conv, ssm in state]
            nll, _ = model.per_token_nll(text[:, :-1], text[:, 1:], used)
            for begin, end in pairwise(edges):
                mean = nll[:, begin:end].double().mean().item()
                rows.append({"T": T, "start": name, "conv": with_conv, "from": begin, "to": end, "nll": mean})
    return rows


def remembrance(model, idx, T, args):
    """Effective Remembrance (arXiv 2507.02782): the distance 1/2 sum |q - q'| between the prediction after
    N tokens and that after only the last `context` of them; mean over the sequences. 0: what came before
    does not matter."""

    def predict(idx):
        return model.lm_head(model.hidden(idx[:, -1:], read_forward(model, idx[:, :-1]))[0])[:, -1].softmax(
            -1
        )

    N = 4 * T
    q = predict(idx[:, :N])
    rows = []
    for context in (T // 2, T, 2 * T):
        distance = (q - predict(idx[:, N - context : N])).abs().sum(1) / 2
        rows.append({"T": T, "N": N, "context": context, "remembrance": distance.mean().item()})
    return rows


MEASURES = {f.__name__: f for f in (memory, late_state, wrong_state, remembrance)}


@torch.inference_mode()
def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--of", help="for late_state: the run whose late state the others are put into")
    parser.add_argument("--past", type=int, default=4096, help="tokens before the text, for states [4096]")
    parser.add_argument("--sequences", type=int, default=64, help="texts [64]")
    parser.add_argument("--out", default="out/measure.jsonl", help="file to append to [out/measure.jsonl]")
    args = parser.parse_args(argv)
    if (args.measure == "late_state") != bool(args.of):
        raise ValueError("late_state needs --of, the others do not take it")
    path = Path(args.out)
    for run in tqdm(args.runs, args.measure, disable=None):
        model, checkpoint = load_run(run)
        T = checkpoint["args"]["seq_len"]
        tokenizer = load_tokenizer(run, model.config.vocab_size)
        corpus = load_corpus(checkpoint["args"]["dataset"], tokenizer)
        args.separator = tokenizer.encode_single_token(SEPARATOR)
        length = args.past + 4 * T
        starts = choose_starts(corpus.val, length, args.sequences)
        places = starts[:, None] + np.arange(length + 1)
        idx = torch.from_numpy(corpus.val[places].astype(np.int64))  # (b, length + 1)
        rows = [
            {"measure": args.measure, "run": Path(run).name} | row
            for row in MEASURES[args.measure](model, idx, T, args)
        ]
        known = path.read_text() if path.exists() else ""
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_whole(path, known + lines)
        print(lines, end="")


if __name__ == "__main__":
    run_script(main)
