"""What a CPU does in a second: training, evaluation of long texts and generation, beside what one would compare it with;
and what a training step consists of, for train.py --bench.

    python results/speed.py                                   everything, at the presets tiny and mid
    python results/speed.py --presets tiny --parts train      a part of it
    python results/speed.py --rounds=2 --long=65536           a quick look

    train      tokens/s of whole optimizer steps, against transformers' Mamba2ForCausalLM (float32, on its torch path; left
               out if it is not installed) and against a transformer of the same width, depth and vocabulary
    eval       tokens/s of the pass over a long text, and of all of eval_long.perplexity, which predicts each token twice,
               against training; time per token and peak memory for a text of 8,192 tokens and for one of --long
    generate   tokens/s of one text, against the general path: the model called on one token after the other

Whatever else a machine does slows down what runs just then. So all sides of a comparison run in turn, A B C A B C ...,
half a second each. Every round gives a ratio; what counts is their median, with their range. Tokens are random ones.
The ratio short text / long text is also the time per token of the long one over that of the short one.
The last line is one JSON object. The peak memory (part eval) needs Linux or macOS.
"""

import argparse
import importlib.util
import json
import multiprocessing
import platform
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import train
from eval_long import TOKENS_AT_ONCE, perplexity
from model import Mamba2Config, Mamba2LM
from scan_kernel import ssd

VOCAB, SHORT, TEXTS = 1024, 8192, 16  # ids; tokens of a short text; texts that eval_long.py takes at once
DTYPE = train.choose_dtype(torch.device("cpu"))


class Transformer(nn.Module):
    """The plain opponent: causal attention, then an MLP 4 times as wide, each after a norm; learned positions."""

    def __init__(self, d, n_layer, headdim, seq_len):
        super().__init__()
        self.headdim, self.positions = headdim, nn.Parameter(0.02 * torch.randn(seq_len, d))
        self.embedding, self.norm, self.layers = nn.Embedding(VOCAB, d), nn.LayerNorm(d), nn.ModuleList()
        nn.init.normal_(self.embedding.weight, std=0.02)  # which is the head's, too
        for _ in range(n_layer):
            mlp = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d))
            self.layers.append(nn.ModuleList([nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d), mlp]))

    def forward(self, idx):  # (b, l) -> (b, l, vocab)
        x = self.embedding(idx) + self.positions
        for norm, qkv, out, mlp in self.layers:
            heads = qkv(norm(x)).unflatten(-1, (3, -1, self.headdim)).permute(2, 0, 3, 1, 4)  # (3, b, h, l, headdim)
            x = x + out(F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2))
            x = x + mlp(x)
        return F.linear(self.norm(x), self.embedding.weight)


def make_ours(preset):
    return Mamba2LM(Mamba2Config(vocab_size=VOCAB, **{name: preset[name] for name in train.MODEL_FLAGS}))


def make_theirs(preset):
    """transformers' model, after a check: from the weights of ours, it has to compute the same."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    ours, idx = make_ours(preset), torch.randint(VOCAB, (2, preset["seq_len"]))
    sizes = {"hidden_size": preset["d_model"], "num_hidden_layers": preset["n_layer"], "state_size": preset["d_state"],
             "num_heads": ours.config.nheads, "head_dim": preset["headdim"], "chunk_size": preset["chunk"], "n_groups": 1}  # fmt: skip
    theirs = Mamba2ForCausalLM(Mamba2Config(vocab_size=VOCAB, tie_word_embeddings=True, use_cache=False, **sizes))
    theirs.load_state_dict({name.replace(".embedding.", ".embeddings."): w for name, w in ours.state_dict().items()})
    torch.testing.assert_close(theirs(idx).logits, ours(idx)[0], atol=1e-3, rtol=1e-3)
    return theirs


def trainer(model, preset, dtype):
    """-> a function that makes an optimizer step as train.py does, and returns how many tokens it took."""
    parameters, shape = list(model.train().parameters()), (preset["batch_size"], preset["seq_len"])
    optimizer = torch.optim.AdamW(parameters, 1e-4, train.BETAS, weight_decay=train.WEIGHT_DECAY, fused=True)

    def step():
        idx, targets = torch.randint(VOCAB, (2, *shape))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            if isinstance(model, Mamba2LM):
                loss = model(idx, targets)[1]
            else:
                logits = model(idx)
                loss = F.cross_entropy(getattr(logits, "logits", logits).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        if torch.isfinite(nn.utils.clip_grad_norm_(parameters, train.CLIP)):
            optimizer.step()
        return idx.numel()

    return step


def our_trainers(preset):
    """{name: step} of ours: eager and, where a C++ compiler is found, with compiled blocks."""
    models = {"ours, eager": make_ours(preset), "ours, compiled": make_ours(preset)}
    steps = {name: trainer(model, preset, DTYPE) for name, model in models.items()}
    for block in models["ours, compiled"].backbone.layers:
        block.compile(**train.compile_options(torch.device("cpu")))
    try:
        steps["ours, compiled"]()
    except Exception as error:  # noqa: BLE001 (whatever the compiler raises)
        print(f"not compiled: that needs a C++ compiler ({type(error).__name__})")
        del steps["ours, compiled"]
    return steps


def in_turn(sides, rounds, warmup=2, seconds=0.5):
    """sides {name: function that returns its number of tokens} -> {name: tokens/s of each round}"""
    calls, speeds = dict.fromkeys(sides, 1), {name: [] for name in sides}
    for i in tqdm(range(warmup + rounds), "timing", disable=None):
        for name, run in sides.items():
            start = time.perf_counter()
            tokens = sum(run() for _ in range(calls[name]))
            speeds[name].append(tokens / (time.perf_counter() - start))
            if i < warmup:
                calls[name] = max(1, round(seconds * speeds[name].pop() * calls[name] / tokens))
    return speeds


def report(speeds, overs, unders):
    """Prints tokens/s of all, and the ratios of `overs` to `unders` -> {name: (median, least, most)}"""
    ratios = {f"{a} / {b}": [x / y for x, y in zip(speeds[a], speeds[b])] for a in overs for b in unders}
    found = {}
    print(f"\n{'':46}    median         range")
    for name, values in (speeds | ratios).items():
        found[name] = [round(f(values), 2) for f in (statistics.median, min, max)]
        print("{:46}{:10,g}  {:,g} - {:,g}".format(name, *(round(x) if name in speeds else x for x in found[name])))
    return found


def bench(model, args, train_step, optimizer, autocast):
    """train.py --bench: times its training step, the parts of one (forward and backward, not compiled), and its floor: the
    matrix products alone, in the dtype of the run: bfloat16 where that is fast."""
    config, b, T, device = model.config, args["batch_size"], args["seq_len"], model.lm_head.weight.device
    block, d, inner, L = model.backbone.layers[0], config.d_model, config.d_inner, config.n_layer
    h, p, g, n, c = config.nheads, config.headdim, config.ngroups, config.d_state, min(config.chunk, T)
    dtype = getattr(torch, args["dtype"])
    A = -torch.exp(block.mixer.A_log.detach())

    def part(times, function, *shapes):
        inputs = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        with autocast:
            gradients = [torch.randn_like(out) for out in function(*inputs)]

        def run():
            for _ in range(times):
                with autocast:
                    outs = function(*inputs)
                torch.autograd.grad(outs, [*inputs, *model.parameters()], gradients, allow_unused=True)

        return run

    def scan(x, dt, B, C, S):
        return ssd(x.to(dtype), dt.abs(), A, B.to(dtype), C.to(dtype), S, c, config.backend)

    products = [
        (1, b * T, d, inner + config.conv_dim + h),  # in_proj
        (1, b * T, inner, d),  # out_proj
        (b * g * T // c, c, n, c),  # C B^T
        (b * h * T // c, c, c, p),  # its product by x
        (b * g * T // c, h // g * p, c, n),  # B^T x
        (b * g * T // c, c, n, h // g * p),  # C S
    ] * L
    products.append((1, b * T, d, config.vocab_size))  # lm_head
    floor = [part(1, lambda x, y: [x @ y], (k, i, j), (k, j, l)) for k, i, j, l in products]
    runs = {
        "step": lambda: train_step(0),
        "floor": lambda: [run() for run in floor],
        "projections": part(L, lambda u, y: (block.mixer.in_proj(u), block.mixer.out_proj(y)), (b, T, d), (b, T, inner)),
        "convolution": part(L, lambda xBC: block.mixer.convolve(xBC, None)[:1], (b, T, config.conv_dim)),
        "scan": part(L, scan, (b, T, h, p), (b, T, h), (b, T, g, n), (b, T, g, n), (b, h, p, n)),
        "norms": part(L, lambda u, y, z: (block.norm(u), block.mixer.norm(y, z)), (b, T, d), *[(b, T, inner)] * 2),
        "head": part(1, lambda x: [F.cross_entropy(model.lm_head(x).float(), x.argmax(1))], (b * T, d)),
        "optimizer": optimizer.step,
    }  # fmt: skip
    speeds = in_turn(
        {name: lambda run=run: (run(), train.synchronize(device), b * T)[2] for name, run in runs.items()},
        rounds=9,
        seconds=0,
    )
    median = {name: b * T / statistics.median(values) for name, values in speeds.items()}  # seconds
    ratios = sorted(floor / step for step, floor in zip(speeds["step"], speeds["floor"]))
    for name, seconds in median.items():
        print(f"{name:12}{1000 * seconds:9.1f} ms {seconds / median['step']:7.0%} of the step")
    print(json.dumps({"preset": args["preset"], "compile": args["compile"], "dtype": args["dtype"], "device": str(device),
                      "threads": torch.get_num_threads(), "tokens_per_s": round(b * T / median["step"]),
                      "floor_ratio": round(statistics.median(ratios), 2),
                      "floor_ratio_range": [round(ratios[0], 2), round(ratios[-1], 2)],
                      "ms": {name: round(1000 * seconds, 2) for name, seconds in median.items()}}))  # fmt: skip


def train_part(preset, args, ours):
    sizes = [preset[name] for name in ("d_model", "n_layer", "headdim", "seq_len")]
    others = {
        f"transformer, {dtype}": trainer(Transformer(*sizes), preset, dtype) for dtype in sorted({"float32", DTYPE})
    }
    plain = list(others)
    if importlib.util.find_spec("transformers"):
        others["transformers"] = trainer(make_theirs(preset), preset, "float32")
    else:
        print("transformers is not installed: left out (pip install transformers)")
    speeds = in_turn(ours | others, args.rounds)
    slower = sorted(plain, key=lambda name: statistics.median(speeds[name]))[:-1]
    return report(speeds, ours, [name for name in others if name not in slower])


def evaluate_texts(model, preset, b, length, progress=None):
    """All of eval_long.perplexity, on b texts that are the same 8,192 tokens over and over -> the number of tokens."""
    tokens = np.random.default_rng(0).integers(VOCAB, size=SHORT).astype(np.uint16)
    places = (np.resize(tokens, b * length + 1), np.arange(b) * length, length, preset["seq_len"])
    perplexity(model, *places, progress or SimpleNamespace(update=lambda n: None))
    return b * length


def eval_part(preset, args, ours):
    model, state = make_ours(preset).eval(), None
    idx, targets = torch.randint(VOCAB, (2, TEXTS, TOKENS_AT_ONCE // TEXTS))

    @torch.inference_mode()
    def full_pass():  # a segment, from where the last one ended
        nonlocal state
        state = model.per_token_nll(idx, targets, state)[1]
        return idx.numel()

    sides = {"full pass": full_pass, "evaluate": lambda: evaluate_texts(model, preset, TEXTS, SHORT // TEXTS)}
    found = report(in_turn(ours | sides, args.rounds), sides, ours)
    speeds, tokens, start = {"short text": [], "long text": []}, 0, time.perf_counter()

    def update(n):  # called while the long text goes on: after each of --rounds parts, short texts of an eighth as many
        nonlocal tokens, start
        tokens += n
        if tokens > args.long // args.rounds - TOKENS_AT_ONCE:
            speeds["long text"].append(tokens / (time.perf_counter() - start))
            run = lambda: sum(evaluate_texts(model, preset, 1, SHORT) for _ in range(1 + tokens // SHORT // 8))
            speeds["short text"] += in_turn({"": run}, 1, warmup=0)[""]
            tokens, start = 0, time.perf_counter()

    evaluate_texts(model, preset, 1, args.long, SimpleNamespace(update=update))
    return found | report(speeds, ["short text"], ["long text"])


def generate_part(preset, args, _):
    model, prompt = make_ours(preset).eval(), torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def general():
        logits, _, state = model(prompt)
        for _ in range(64):
            logits, _, state = model(torch.multinomial(logits[:, -1].softmax(-1), 1), state=state)
        return 64

    compiled = make_ours(preset).eval()
    compiled.step = torch.compile(compiled.step)
    ours = {"generate": model, "generate, compiled step": compiled}
    sides = {name: lambda model=model: model.generate(prompt, 64).numel() for name, model in ours.items()}
    return report(in_turn(sides | {"general path": general}, args.rounds), ours, ["general path"])


def peak_mb(preset, length):
    """Peak memory of a process of its own that evaluates one text."""
    import resource  # not on Windows

    evaluate_texts(make_ours(preset).eval(), preset, 1, length)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)


def main():
    parts = {"train": train_part, "eval": eval_part, "generate": generate_part}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure [all]")
    parser.add_argument("--presets", nargs="+", choices=["tiny", "mid"], default=["tiny", "mid"], help="sizes [both]")
    parser.add_argument("--rounds", type=int, default=7, help="how often each side runs, after the warm-up [7]")
    parser.add_argument("--long", type=int, default=2**20, help="length of the long text, in tokens [1048576]")
    args = parser.parse_args()
    torch.manual_seed(0)
    info = (
        Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else f"model name: {platform.processor()}"
    )
    found = {"cpu": re.search("model name\\s*: (.*)|$", info)[1], "threads": torch.get_num_threads(),
             "torch": torch.__version__, "dtype": DTYPE, "rounds": args.rounds, "long": args.long}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    presets = {name: train.DEFAULTS | train.PRESETS[name] for name in args.presets}
    peaks = {}  # first of all: on Linux the peak of a process begins at what the one that started it held
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in presets if "eval" in args.parts else ():
            peaks[name] = {"peak MB": [pool.apply(peak_mb, (presets[name], length)) for length in (SHORT, args.long)]}
    for name, preset in presets.items():
        how = "compiled" if preset["steps"] >= train.COMPILE_FROM else "eager"
        print(f"\n{name}, tokens/s and their ratios. train.py runs this preset {how} by default", flush=True)
        ours = our_trainers(preset)
        found[name] = {part: parts[part](preset, args, ours) for part in args.parts} | peaks.get(name, {})
        if name in peaks:
            print("\npeak memory: {:,} MB for the short text, {:,} MB for the long one".format(*peaks[name]["peak MB"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
