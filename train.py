"""Trains a small Mamba-2 whose initial state is up to you, and saves, validates and samples it.

    python train.py --init_state=prev           from scratch, in a few minutes on two CPU cores -> out/prev
    python train.py --init_state=zero           the usual way, for comparison -> out/zero
    python train.py --init_state=prev --init_from=out/zero --out=out/post      post-training of a trained model
    torchrun --nproc_per_node=2 train.py --init_state=prev        by several processes, or GPUs
    python train.py --out=out/prev --resume     goes on after Ctrl-C, a crash or a power cut
    python eval_long.py out/zero out/prev       what it is all for

A recurrent model is usually trained from the state 0, for T tokens: it never meets the states that a longer text leads
to, and may fail on them. The remedy of "Understanding and Improving Length Generalization in Recurrent Models"
(arXiv 2507.02782) is to start training sequences from other states:

    zero      0, as usual
    noise     Gaussian noise with one standard deviation for all layers and heads
    fitted    Gaussian noise with the mean and standard deviation that final states have, in each layer and head
    prev      the final state of the previous batch, which is other text                       ("State Passing")
    tbtt      the same, but the batch goes on with the text of the previous one         ("truncated backprop through time")

Everything else stays as it is: the model, the loss, T, and, but for tbtt, the batches.

Dimensions, the same letters in every file:
    b batch · l length · c chunk · q, s place in a chunk (row, column) · h head · p head dim
    g group of B, C · r head within its group (h = g r) · n state dim · d model width
"""

import argparse
import contextlib
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from data import (SEPARATOR, Corpus, check_can_write, hash_of, load_corpus, next_windows, random_windows,
                  tokenizer_json, tokenizer_of, write_whole)  # fmt: skip
from model import (LOGITS_AT_ONCE, RANK, WORLD, Mamba2Config, Mamba2LM, State, all_rows, choose_device, load_run,
                   mean_over_processes, own)  # fmt: skip

INIT_STATES = ("zero", "noise", "fitted", "prev", "tbtt")

# tiny fails within minutes on a CPU, and can be repaired: a short T, a large state, some heads that forget slowly.
PRESETS = {
    "tiny": {"d_model": 128, "n_layer": 2, "d_state": 128, "headdim": 32, "chunk": 32, "tokenizer": "bpe1024",
             "seq_len": 32, "batch_size": 128, "steps": 500, "lr": 3e-3},
    "mid": {"d_model": 256, "n_layer": 4, "d_state": 128, "headdim": 64, "chunk": 64, "tokenizer": "bpe1024",
            "seq_len": 256, "batch_size": 8, "steps": 2000, "lr": 2e-3},
    "small": {"d_model": 512, "n_layer": 10, "d_state": 128, "headdim": 64, "chunk": 64, "tokenizer": "bpe4096",
              "seq_len": 512, "batch_size": 32, "steps": 5000, "lr": 1e-3},
}  # fmt: skip
OFFICIAL = {"130m": (768, 24, 6e-4), "370m": (1024, 48, 3e-4), "780m": (1536, 48, 2.5e-4), "1.3b": (2048, 48, 2e-4)}
PRESETS |= {f"mamba2-{size}": PRESETS["small"] | {"d_model": d, "n_layer": layers, "lr": lr, "A_init": "uniform",
            "A_init_range": [1.0, 16.0], "tokenizer": "gpt2", "seq_len": 2048}
            for size, (d, layers, lr) in OFFICIAL.items()}  # fmt: skip
DEFAULTS = {"init_state": "zero", "init_from": None, "preset": "tiny", "seed": 0, "device": "auto", "dtype": "auto",
            "backend": "auto", "compile": "auto", "dataset": "python", "A_init": "log", "A_init_range": [0.01, 16.0],
            "noise_std": 0.1, "init_prob": 1.0, "rates_lr": 1.0, "grad_accum": 1, "log_every": 25, "val_every": 100,
            "save_every": 100}  # fmt: skip
POST_TRAINING = {"steps": 500, "lr": 1e-3, "init_prob": 0.2, "rates_lr": 20.0}  # with --init_from
MODEL_FLAGS = ("d_model", "n_layer", "d_state", "headdim", "chunk", "A_init", "A_init_range")

WARMUP, FINAL_LR = 0.1, 0.1  # shares: of the steps, of the peak; in between a cosine
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
SKIPS = 10  # steps in a row whose gradients are not finite: they change nothing, and with one more, training stops
COMPILE_FROM = 2000  # steps: compiling takes as long as some hundred of them on a CPU
CALIBRATE_STEPS, REFIT_EVERY, REFIT_RATE = 50, 10, 0.1  # of "fitted"


class InitialState:
    """The state before the first token of each training sequence. It is the idea of this project, so it is spelt out.

    `draw` makes it, as the model takes it: a pair (conv, ssm) for each layer, or None for zeros. The conv part, the last
    3 tokens' inputs, is zero except in tbtt, where those tokens really come before (the paper does not say; our choice).
    `observe` sees the state at the end of each step. What is remembered in between, for the checkpoint, is in `memory`:
    lists with a tensor for each layer."""

    def __init__(self, args, device, memory=None):
        self.mode, self.seed, self.device = args["init_state"], args["seed"], device
        self.noise_std, self.init_prob = args["noise_std"], args["init_prob"]
        self.memory = {}
        for name, tensors in (memory or {}).items():
            self.memory[name] = [t.to(device) if name in ("mean", "square") else own(t).to(device) for t in tensors]

    def zeros(self, b: int) -> int:
        """How many of b sequences start from zero: always the first ones, so that the chains of the others grow long."""
        zeros = WORLD * b - round(self.init_prob * WORLD * b)
        return min(max(zeros - RANK * b, 0), b)

    def draw(self, model: Mamba2LM, b: int, step: int) -> State | None:
        if self.mode == "zero":
            return None
        generator = torch.Generator(self.device).manual_seed(self.seed * 1_000_003 + step)  # the same after a resume
        conv, ssm = (list(parts) for parts in zip(*model.zero_state(b)))  # ssm: each (b, h, p, n)
        if self.mode in ("noise", "fitted"):
            shape = (WORLD * b, *ssm[0].shape[1:])
            ssm = [own(torch.randn(shape, generator=generator, device=self.device)) for _ in ssm]
        if self.mode == "noise":
            ssm = [self.noise_std * t for t in ssm]
        elif self.mode == "fitted":
            for i, (mean, square) in enumerate(zip(self.memory["mean"], self.memory["square"])):  # each (h)
                std = (square - mean**2).clamp(min=0).sqrt()
                ssm[i] = mean[:, None, None] + std[:, None, None] * ssm[i]
        else:  # zero before the first step
            ssm = self.memory.get("ssm", ssm)
        conv = self.memory.get("conv", conv) if self.mode == "tbtt" else [None] * len(ssm)
        for t in (*ssm, *conv):
            if t is not None:
                t[: self.zeros(b)] = 0  # in place, in memory too: these rows are never carried over
        return list(zip(conv, ssm))

    def observe(self, state: State) -> int:
        """state: the list of (conv, ssm) at the end of a step. Detached: no gradient reaches the previous step. Rows that
        are not finite anywhere start again from zero, lest one bad batch poison their chains; -> how many"""
        if self.mode not in ("prev", "tbtt"):
            return 0
        conv, ssm = ([t.detach() for t in tensors] for tensors in zip(*state))
        bad = torch.zeros(len(ssm[0]), dtype=torch.bool)
        if not torch.stack([t.sum() for t in (*conv, *ssm)]).isfinite().all():  # cheaper than looking at each row
            bad = ~torch.stack([torch.isfinite(t).flatten(1).all(1) for t in (*conv, *ssm)]).all(0)
            conv, ssm = ([t.masked_fill(bad.view(-1, *[1] * (t.dim() - 1)), 0) for t in ts] for ts in (conv, ssm))
        self.memory["ssm"] = ssm
        if self.mode == "tbtt":
            self.memory["conv"] = conv
        return bad.sum().item()

    def fit(self, state: State, rate: float) -> None:
        """For `fitted`: moves the mean and the mean square of each layer and head towards those of these final states.

        They must come from zero states. States that started from fitted noise still hold what the slow heads have not
        forgotten of it: fitted to them, the noise would feed on itself and grow."""
        ssm = [ssm for _, ssm in state]  # each (b, h, p, n)
        for name, tensors in (("mean", ssm), ("square", [t.square() for t in ssm])):
            values = [mean_over_processes(t.mean((0, 2, 3))) for t in tensors]  # each (h)
            old = self.memory.get(name, values)
            self.memory[name] = [torch.lerp(*pair, rate) for pair in zip(old, values)]


# ----------------------------------------------------------------------------------------------------------------------
# Flags. Each has one default, in the tables above; only those given on the command line are in what argparse returns.


def at_least(low, kind=int, high=10**9):
    def number(text):
        if not low <= kind(text) <= high:
            raise argparse.ArgumentTypeError(f"should be a number from {low} to {high}, not {text}")
        return kind(text)

    return number


def make_parser() -> argparse.ArgumentParser:
    intro, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    def flag(group, name, text, **kwargs):
        by_preset = " · ".join(f"{preset} {PRESETS[preset].get(name)}" for preset in ("tiny", "mid", "small"))
        default = DEFAULTS.get(name, by_preset)
        after = f"; with --init_from {POST_TRAINING[name]}" if name in POST_TRAINING else ""
        group.add_argument(f"--{name}", help=f"{text} [{default}{after}]", **kwargs)

    group = parser.add_argument_group("the initial state")
    flag(group, "init_state", "what training sequences start from", choices=INIT_STATES)
    flag(group, "init_prob", "share of the sequences that do; the others start from zero", type=at_least(0, float, 1))
    flag(group, "noise_std", "standard deviation, for noise", type=at_least(0, float))
    group = parser.add_argument_group("the run")
    group.add_argument("--out", help="folder of the run [out/<init_state>]")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out from its last checkpoint")
    flag(group, "init_from", "start from this run's weights, with its architecture, T and tokenizer, or from a folder "
         "with an official Mamba-2 checkpoint", metavar="RUN")  # fmt: skip
    flag(group, "preset", "sizes and training: tiny, mid (CPU), small (GPU), or the official mamba2-130m, ...",
         choices=PRESETS)  # fmt: skip
    flag(group, "steps", "optimizer steps", type=at_least(1))
    flag(group, "batch_size", "sequences a step", type=at_least(1))
    flag(group, "grad_accum", "equal parts that a step's batch is taken in, to need less memory", type=at_least(1))
    flag(group, "seq_len", "T, the tokens of a training sequence, an even number", type=at_least(2))
    flag(group, "lr", "peak learning rate", type=at_least(0, float))
    flag(group, "rates_lr", "A and dt_bias, which decide on forgetting, learn so much faster", type=at_least(0, float))
    flag(group, "seed", "of the weights, the batches and the noise", type=at_least(0))
    flag(group, "dataset", "python (its standard library), a UTF-8 text file, a folder, an address, copy, passkey")
    flag(group, "tokenizer", "byte, bpeN (N ids, learnt from the text), or gpt2 (downloaded once)")
    flag(group, "device", "auto, cpu, cuda, cuda:1, mps")
    flag(group, "dtype", "of matrix products; auto: bfloat16 if it is fast", choices=["auto", "float32", "bfloat16"])
    flag(group, "backend", "of the scan; auto: triton on a GPU", choices=["auto", "triton", "torch"])
    flag(group, "compile", f"fuse each layer by torch.compile; auto: on a GPU, or where {COMPILE_FROM} steps or more pay",
         choices=["auto", "on", "off"])  # fmt: skip
    group.add_argument("--bench", action="store_true", help="no training: time a step and its parts, then stop")
    flag(group, "log_every", "steps between two lines of the log", type=at_least(1))
    flag(group, "val_every", "steps between two validations", type=at_least(1))
    flag(group, "save_every", "steps between two checkpoints", type=at_least(1))
    group = parser.add_argument_group("the model")
    flag(group, "d_model", "d, width of the residual stream", type=at_least(1))
    flag(group, "n_layer", "layers", type=at_least(1))
    flag(group, "d_state", "n, state numbers per channel", type=at_least(1))
    flag(group, "headdim", "p, channels per head", type=at_least(1))
    flag(group, "chunk", "tokens the scan takes at once, a power of two", type=at_least(1))
    flag(group, "A_init", "how A, the rates of forgetting, start", choices=["uniform", "log"])
    flag(group, "A_init_range", "their range", type=at_least(1e-9, float), nargs=2, metavar=("LO", "HI"))
    return parser


def resolve(given: dict, resuming: bool, benching: bool) -> tuple[dict, Path, Mamba2LM | None, dict | None]:
    """The flags given -> (all flags, the folder, what to start from: the model and the checkpoint of a run, or None).
    ValueError says which flag is wrong. Nothing is written."""
    out = Path(given.get("out", f"out/{(DEFAULTS | given)['init_state']}"))
    if resuming:
        check_can_write(out)
        model, checkpoint = load_run(out)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{out} holds weights only, nothing to resume: start a new run with --init_from={out}")
        args = DEFAULTS | checkpoint["args"]  # (a run from before some flag existed goes on with its default)
        fixed, why = set(args) - {"out", "device", "backend"}, "--resume"
    else:
        model, checkpoint = None, None
        if not benching:
            check_can_write(out.parent)
        if (not out.name or out.is_file() or out.is_dir() and any(out.iterdir())) and not benching:
            raise ValueError(f"{out} is not empty: go on with its run by --resume, or name another folder with --out")
        args, fixed, why = DEFAULTS | PRESETS[(DEFAULTS | given)["preset"]], set(), ""
        if "init_from" in given:
            model, checkpoint = load_run(given["init_from"])
            fixed, why = {*MODEL_FLAGS, "seq_len", "tokenizer", "preset"}, f"--init_from={given['init_from']}"
            args |= {name: checkpoint["args"][name] for name in fixed | {"batch_size", "dataset"}} | POST_TRAINING
            if checkpoint["corpus_hash"] is None:  # an official checkpoint: its T is not in its files
                fixed.remove("seq_len")
    for name in fixed & set(given):
        if given[name] != args[name] and not given[name] == DEFAULTS.get(name) == "auto":
            raise ValueError(f"--{name}={given[name]} contradicts {why}, where it is {args[name]}: leave it out")
    args = args | {name: value for name, value in given.items() if name not in fixed} | {"out": str(out)}
    if args["batch_size"] % args["grad_accum"]:
        raise ValueError(f"--grad_accum={args['grad_accum']} does not divide --batch_size={args['batch_size']}")
    if args["seq_len"] % 2:
        raise ValueError(f"--seq_len={args['seq_len']} should be even: evaluation works with halves of it")
    return args, out, model, checkpoint


def choose_dtype(device: torch.device) -> str:
    """bfloat16 for the matrix products where it is fast, float32 elsewhere (many CPUs only emulate bfloat16)."""
    cuda = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    amx = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    return "bfloat16" if cuda or amx else "float32"


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate(step: int, args: dict) -> float:
    """Linear up to the peak, then a cosine down to a tenth of it."""
    warmup = max(1, round(WARMUP * args["steps"]))
    if step < warmup:
        return args["lr"] * (step + 1) / warmup
    progress = (step - warmup) / max(1, args["steps"] - warmup)
    return args["lr"] * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def estimate_memory(config: Mamba2Config, b: int, T: int, parts: int, dtype: str) -> tuple[int, int]:
    """-> bytes that stay (float32 weights, gradients, two moments, states), bytes that the forward keeps for the backward.
    The numbers per channel were counted once, at several sizes: within a quarter of what is really kept."""
    layer = config.d_model * (2 * config.d_inner + config.conv_dim + config.nheads)  # in_proj, out_proj
    lasting = 16 * (config.d_model * config.vocab_size * (2 - config.tie_embeddings) + config.n_layer * layer)
    lasting += 4 * b * config.n_layer * config.d_inner * config.d_state
    layers = config.n_layer * (18 if dtype == "bfloat16" else 25) * (config.conv_dim + config.d_inner)
    return lasting, b // parts * T * layers + 8 * min(b // parts * T * config.vocab_size, LOGITS_AT_ONCE)


def memory_of(device: torch.device) -> float:
    """Bytes that the device has; infinity where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


@torch.no_grad()
def validate(model: Mamba2LM, tokens, T: int, device: torch.device) -> tuple[float, float]:
    """Mean losses (nats/token), on the same held-out tokens at every call: over windows of T tokens from a zero state,
    and over the second half of texts of 64 T tokens through which the state is carried."""
    windows = random_windows(tokens, max(16, 32768 // T), T, 0, 0).to(device)
    val = model.per_token_nll(windows[:, :-1], windows[:, 1:])[0].mean()
    segments, state, carried = min(64, len(tokens) // T), None, []
    for i in range(segments):
        windows = next_windows(tokens, 16, T, 0, i).to(device)
        nll, state = model.per_token_nll(windows[:, :-1], windows[:, 1:], state)
        carried.append(nll.mean())
    return val.item(), torch.stack(carried[segments // 2 :]).mean().item()


def provenance(corpus: Corpus) -> dict:
    """What one needs to know later to make the same run again. Plain values."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no repository
        commit = None
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "platform": platform.platform()}
    return {"corpus_hash": corpus.hash, "tokenizer_hash": hash_of(tokenizer_json(corpus.tokenizer)), "versions": versions,
            "git": commit}  # fmt: skip


COLUMNS = {"step": "7,d", "loss": "8.4f", "bits_per_byte": "7.3f", "lr": "9.1e", "grad_norm": "7.2f", "state_std": "7.3f",
           "ms_per_step": "8.1f", "tokens_per_s": "10,.0f", "val_loss": "8.4f", "carried_loss": "8.4f"}  # fmt: skip
HEADER = "   step    loss  b/byte       lr   grad  state  ms/step     tok/s     val  val 64T"


def main(argv: list[str] | None = None) -> int | None:
    parser = make_parser()
    try:
        given = vars(parser.parse_args(argv))
        resuming, benching = given.pop("resume", False), given.pop("bench", False)
        args, out, model, checkpoint = resolve(given, resuming, benching)
        if resuming and not benching and checkpoint["step"] >= args["steps"]:
            return print(f"{out} is finished, {args['steps']} steps. How it fares: python eval_long.py {out}")
        processes = checkpoint.get("processes", 1) if resuming else WORLD
        if processes != WORLD:
            raise ValueError(f"{out} was trained by {processes} processes, not {WORLD}: take as many")
        device = choose_device(args["device"])
        if args["dtype"] == "auto":
            args["dtype"] = choose_dtype(device)
        if args["compile"] == "auto":
            args["compile"] = "on" if device.type == "cuda" or args["steps"] >= COMPILE_FROM else "off"
        corpus = load_corpus(args["dataset"], tokenizer_of(checkpoint) if checkpoint else args["tokenizer"])
        if resuming and corpus.hash != checkpoint["corpus_hash"]:
            raise ValueError(f"{out} was trained on corpus {checkpoint['corpus_hash']}, which is not here any more")
        b, T = args["batch_size"], args["seq_len"]
        if len(corpus.train) < 2 * T or len(corpus.val) < 2 * T:
            raise ValueError(f"--dataset={args['dataset']} holds less than two windows of {T} tokens in a part of it")
        shape = {name: args[name] for name in MODEL_FLAGS}
        config = model.config if model else Mamba2Config(vocab_size=corpus.tokenizer.n_vocab, **shape)
        lasting, backward = estimate_memory(config, b, T, args["grad_accum"], args["dtype"])
        if lasting + backward > 1.5 * memory_of(device):
            raise ValueError(f"this would take about {(lasting + backward) / 2**30:,.0f} GB of memory, {device} has "
                             f"{memory_of(device) / 2**30:,.0f}: take a smaller batch or model, or --grad_accum")  # fmt: skip
        torch.manual_seed(args["seed"])
        model = model or Mamba2LM(config)
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: error: {error}\n")

    # From here on nothing is wrong with the flags. First the optimizer, in three groups.
    model.to(device).train()
    config.backend = None if args["backend"] == "auto" else args["backend"]
    rates = [p for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    others = [p for name, p in model.named_parameters() if not name.endswith(("A_log", "dt_bias"))]
    groups = [{"params": [p for p in others if p.dim() > 1], "weight_decay": WEIGHT_DECAY, "scale": 1.0},
              {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0, "scale": 1.0},
              {"params": rates, "weight_decay": 0.0, "scale": args["rates_lr"]}]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=args["lr"], betas=BETAS, fused=device.type != "mps")
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args["dtype"] == "bfloat16")
    init = InitialState(args, device, checkpoint["init_state"] if resuming else None)
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters, {config.n_layer} layers of "
          f"{config.nheads} heads, a state of {config.n_layer * config.d_inner * config.d_state:,} numbers")  # fmt: skip
    print(f"device    {device}, matrix products in {args['dtype']}")
    print("flags    ", *(f"{name}={args[name]}" for name in ("lr", "rates_lr", "init_prob", "seed", "compile")))
    print(f"memory    about {(lasting + backward) / 2**20:,.0f} MB, {backward / 2**20:,.0f} of them for the backward")
    tokens = WORLD * b * T
    print(f"training  {args['init_state']}, {WORLD * b} x {T} tokens/step, {args['steps'] * tokens:,} tokens -> {out}")
    net = model if WORLD == 1 else torch.nn.parallel.DistributedDataParallel(model)

    # A step, all that depends on it, and what is saved.
    step, log, origin, size = 0, out / "log.jsonl", provenance(corpus), b // args["grad_accum"]
    parts = [slice(first, first + size) for first in range(0, b, size)]  # of the rows of a batch

    def batch_of(step):  # (b, T + 1)
        place = corpus.train, WORLD * b, T, args["seed"], step
        batch = own(random_windows(*place))
        if args["init_state"] == "tbtt":
            batch[init.zeros(b) :] = own(next_windows(*place))[init.zeros(b) :]
        return batch.to(device)

    def forward_backward(net, batch, start, rows):  # of one of the parts that a batch is taken in
        with autocast:
            start = start and [[t if t is None else t[rows] for t in layer] for layer in start]
            _, loss, state = net(batch[rows, :-1], batch[rows, 1:], start)
        loss = loss / args["grad_accum"]
        loss.backward()
        return loss.detach(), [[t.detach() for t in layer] for layer in state]

    def train_step(step):
        batch, start = batch_of(step), init.draw(model, b, step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args) * group["scale"]
        optimizer.zero_grad()
        results = []
        for rows in parts:  # processes exchange their gradients once, after the last one
            with net.no_sync() if WORLD > 1 and rows is not parts[-1] else contextlib.nullcontext():
                results.append(forward_backward(net, batch, start, rows))
        losses, states = zip(*results)
        state = states[0] if len(states) == 1 else [[torch.cat(t) for t in zip(*layers)] for layers in zip(*states)]
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if torch.isfinite(grad_norm):
            optimizer.step()
        return mean_over_processes(sum(losses)).item(), grad_norm.item(), state, init.observe(state)

    def fit(step, rate):
        with torch.no_grad(), autocast, eager():
            init.fit(model.hidden(batch_of(step)[:, :-1])[1], rate)

    def save(folder):
        memory = init.memory
        if "ssm" in memory:  # all rows, as a single process would have them
            memory = {name: [all_rows(t) for t in tensors] for name, tensors in memory.items()}
        if RANK:
            return
        content = {"config": asdict(config) | {"backend": None, "A_init_range": list(config.A_init_range)}, "args": args,
                   "step": step, "tokens": step * tokens, "processes": WORLD, **origin, "model": model.state_dict(),
                   "optimizer": optimizer.state_dict(), "init_state": memory}  # fmt: skip
        write_whole(folder / "ckpt.pt", lambda file: torch.save(content, file))

    # Where to begin: at the checkpoint's step, or at 0, with statistics for `fitted`.
    if resuming:
        step = checkpoint["step"]
        optimizer.load_state_dict(checkpoint["optimizer"])
    elif args["init_state"] == "fitted":
        for i in tqdm(range(CALIBRATE_STEPS), "states from zero", disable=None):
            fit(args["steps"] + i, 1 / (i + 1))  # batches that training will not use; the plain mean of all
    if args["compile"] == "on":  # before the first checkpoint, whose args say whether it worked
        start = time.perf_counter()
        for block in model.backbone.layers:  # the blocks only: with the embedding, two threads gave two results
            block.compile(**compile_options(device))
        try:
            forward_backward(model, batch_of(step), init.draw(model, b, step), parts[0])
            print(f"compiled  in {time.perf_counter() - start:.0f} s")
        except Exception as error:  # noqa: BLE001 (whatever the compiler raises)
            eager()  # no "with": from here on nothing is compiled
            args["compile"] = "off"
            print(f"compiled  not: on a CPU that needs a C++ compiler ({type(error).__name__}). Going on without")
    if benching:
        from results.speed import bench

        return bench(model, args, train_step, optimizer, autocast)
    if resuming and RANK == 0:
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        write_whole(log, "".join(lines).encode())
    elif RANK == 0:
        made = out.with_name(f".{out.name}.{os.getpid()}")  # renamed when whole: a run folder can always be resumed
        save(made)
        write_whole(made / "args.json", json.dumps({"argv": sys.argv, "args": args, **origin}, indent=2).encode())
        write_whole(made / "tokenizer.json", tokenizer_json(corpus.tokenizer).encode())
        if out.exists():
            out.rmdir()  # it is empty
        made.rename(out)

    # The loop.
    stopped_by = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one saves and stops, the next one just stops
        signal.signal(number, lambda number, _: (stopped_by.append(number), signal.signal(number, signal.SIG_DFL)))
    losses, times, skipped_in_a_row, counts = [], [], 0, {"skipped": 0, "bad_rows": 0}
    bar = tqdm(total=args["steps"], initial=step, unit=" steps", disable=RANK > 0 or None, dynamic_ncols=True)
    bar.write(HEADER)
    while step < args["steps"]:
        if mean_over_processes(torch.tensor(float(len(stopped_by)), device=device)) > 0:
            break  # all processes, after the same step
        synchronize(device)
        start = time.perf_counter()
        loss, grad_norm, state, bad_rows = train_step(step)
        counts["bad_rows"] += bad_rows
        skipped_in_a_row = 0 if math.isfinite(grad_norm) else skipped_in_a_row + 1
        counts["skipped"] += skipped_in_a_row > 0
        if skipped_in_a_row > SKIPS:
            bar.close()
            print(f"stopped: loss {loss}, gradient norm {grad_norm} in step {step}. {out}/ckpt.pt is the last checkpoint "
                  "before it; a lower --lr may help", file=sys.stderr)  # fmt: skip
            return 1
        if args["init_state"] == "fitted" and step % REFIT_EVERY == 0:
            fit(step, REFIT_RATE)
        step += 1
        losses += [] if skipped_in_a_row else [loss]
        synchronize(device)
        times.append(time.perf_counter() - start)
        bar.update()
        validated = step % args["val_every"] == 0 or step == args["steps"]
        if step % args["log_every"] == 0 or validated:
            mean_loss, seconds = sum(losses) / max(1, len(losses)), statistics.median(times)
            row = {"step": step, "tokens": step * tokens, "loss": mean_loss,
                   "bits_per_byte": mean_loss / math.log(2) / corpus.bytes_per_token,
                   "lr": optimizer.param_groups[0]["lr"], "grad_norm": grad_norm,
                   "state_std": torch.stack([ssm.std() for _, ssm in state]).mean().item(),
                   "ms_per_step": 1000 * seconds, "tokens_per_s": tokens / seconds} | counts  # fmt: skip
            if validated:
                with autocast, eager():
                    row["val_loss"], row["carried_loss"] = validate(model, corpus.val, T, device)
            bar.write("".join(f"{row[name]:{width}}" for name, width in COLUMNS.items() if name in row))
            if RANK == 0:
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            losses, times = [], []
        if step % args["save_every"] == 0 and step < args["steps"] and not skipped_in_a_row:
            save(out)  # the last one comes after the loop
    bar.close()
    save(out)
    if step < args["steps"]:
        print(f"stopped after step {step}, saved. Go on with: python train.py --out={out} --resume")
        return 128 + (stopped_by or [signal.SIGTERM])[0]
    separator = torch.tensor([[corpus.tokenizer.encode_single_token(SEPARATOR)]], device=device)
    with eager():
        sample = model.eval().generate(separator, 256, generator=torch.Generator(device).manual_seed(args["seed"]))
    print(f"\na sample of 256 tokens:\n\n{corpus.tokenizer.decode(sample[0].tolist())}\n")
    print(f"held-out perplexity {math.exp(row['val_loss']):.2f} in windows of {T} tokens, "
          f"{math.exp(row['carried_loss']):.2f} with the state carried on, up to {64 * T} tokens")  # fmt: skip
    print(f"how it fares further on: python eval_long.py {out}")


def compile_options(device: torch.device) -> dict:
    """On a CPU, what several taps of the convolution read is kept instead of computed again for each: 5 to 15 % less time."""
    return {"dynamic": False, "options": {"realize_reads_threshold": 2} if device.type == "cpu" else None}


def eager():
    """A context in which nothing runs compiled: for other shapes than training's, which would be compiled anew."""
    return torch.compiler.set_stance("force_eager")


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before there is anything to save
        sys.exit(130)
    except OSError as error:  # a full disk, above all
        sys.exit(f"train.py: error: {error}")
