"""Trains a small Mamba-2 whose initial state is up to you, and saves, validates and samples it.

    python train.py --init_state=prev           from scratch, in a few minutes on two CPU cores -> out/prev
    python train.py --init_state=zero           the usual way, for comparison -> out/zero
    python train.py --init_state=prev --init_from=out/zero --out=out/post      post-training of a trained model
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
import json
import math
import platform
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import load_corpus, load_tokenizer, next_windows, random_windows, tokenizer_json, write_whole
from model import Mamba2Config, Mamba2LM, load_run

INIT_STATES = ("zero", "noise", "fitted", "prev", "tbtt")

# tiny fails within minutes on a CPU, and can be repaired: a short T, a large state, some heads that forget slowly.
PRESETS = {
    "tiny": {"d_model": 128, "n_layer": 2, "d_state": 128, "headdim": 32, "chunk": 32, "tokenizer": "bpe1024",
             "seq_len": 32, "batch_size": 128, "steps": 500, "lr": 3e-3},
    "small": {"d_model": 512, "n_layer": 10, "d_state": 128, "headdim": 64, "chunk": 64, "tokenizer": "bpe4096",
              "seq_len": 512, "batch_size": 32, "steps": 5000, "lr": 1e-3},
}  # fmt: skip
DEFAULTS = {"init_state": "zero", "init_from": None, "preset": "tiny", "seed": 0, "device": "auto", "dtype": "auto",
            "backend": "auto", "dataset": "python", "A_init": "log", "A_init_range": [0.01, 16.0], "noise_std": 0.1,
            "init_prob": 1.0, "log_every": 25, "val_every": 100, "save_every": 100}  # fmt: skip
POST_TRAINING = {"steps": 300, "lr": 1e-3, "init_prob": 0.9}  # with --init_from
MODEL_FLAGS = ("d_model", "n_layer", "d_state", "headdim", "chunk", "A_init", "A_init_range")

WARMUP, FINAL_LR = 0.1, 0.1  # shares: of the steps, of the peak; in between a cosine
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0
CALIBRATE_STEPS, REFIT_EVERY, REFIT_RATE = 50, 10, 0.1  # of "fitted"


class InitialState:
    """The state before the first token of each training sequence. It is the idea of this project, so it is spelt out.

    `draw` makes it, as the model takes it: a pair (conv, ssm) for each layer, or None for zeros. The conv part, the last
    3 tokens' inputs, is zero except in tbtt, where those tokens really come before (the paper does not say; our choice).
    `observe` sees the state at the end of each step. What is remembered in between is in `memory`, for the checkpoint."""

    def __init__(self, args, memory=None):
        self.mode, self.seed, self.noise_std, self.init_prob = (
            args[name] for name in ("init_state", "seed", "noise_std", "init_prob")
        )
        self.memory = memory if memory is not None else {}

    def draw(self, model, b, step):
        config, device = model.config, model.lm_head.weight.device
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + step)  # a resumed run draws the same
        shape = (config.n_layer, b, config.nheads, config.headdim, config.d_state)
        if self.mode == "noise":
            ssm = self.noise_std * torch.randn(shape, generator=generator, device=device)
            state = [(None, layer) for layer in ssm]
        elif self.mode == "fitted":
            mean, square = (
                self.memory[name][:, None, :, None, None] for name in ("mean", "square")
            )  # (layer, 1, h, 1, 1)
            std = (square - mean**2).clamp(min=0).sqrt()
            state = [(None, layer) for layer in mean + std * torch.randn(shape, generator=generator, device=device)]
        elif "carried" in self.memory:
            state = self.memory["carried"]
        else:  # zero; prev and tbtt in their first step
            return None
        kept = torch.rand(b, generator=generator, device=device) < self.init_prob  # the other sequences start from zero
        return [tuple(part if part is None else part * kept.view(b, *[1] * (part.dim() - 1)) for part in layer)
                for layer in state]  # fmt: skip

    def observe(self, state):
        """state: the list of (conv, ssm) at the end of a step. Detached: no gradient reaches the previous step."""
        if self.mode == "prev":
            self.memory["carried"] = [(None, ssm.detach()) for _, ssm in state]
        elif self.mode == "tbtt":
            self.memory["carried"] = [(conv.detach(), ssm.detach()) for conv, ssm in state]

    def fit(self, state, rate):
        """For `fitted`: moves the mean and the mean square of each layer and head towards those of these final states.

        They must come from zero states. States that started from fitted noise still hold what the slow heads have not
        forgotten of it: fitted to them, the noise would feed on itself and grow."""
        ssm = torch.stack([ssm for _, ssm in state])  # (layer, b, h, p, n)
        for name, value in (("mean", ssm.mean((1, 3, 4))), ("square", ssm.square().mean((1, 3, 4)))):  # (layer, h)
            self.memory[name] = torch.lerp(self.memory.get(name, value), value, rate)


# ----------------------------------------------------------------------------------------------------------------------
# Flags. Each has one default, in the tables above; only those given on the command line are in what argparse returns.


def at_least(low, kind=int, high=math.inf):
    def number(text):
        if not (low <= kind(text) <= high and kind(text) < math.inf):
            raise argparse.ArgumentTypeError(f"should be a number from {low} to {high}, not {text}")
        return kind(text)

    return number


def make_parser():
    intro, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=intro, epilog=rest, allow_abbrev=False,
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip

    def flag(group, name, text, **kwargs):
        default = DEFAULTS.get(name, ", ".join(f"{preset} {values.get(name)}" for preset, values in PRESETS.items()))
        after = f"; with --init_from {POST_TRAINING[name]}" if name in POST_TRAINING else ""
        group.add_argument(f"--{name}", help=f"{text} [{default}{after}]", **kwargs)

    group = parser.add_argument_group("the initial state")
    flag(group, "init_state", "what training sequences start from", choices=INIT_STATES)
    flag(group, "init_prob", "share of the sequences that do; the others start from zero", type=at_least(0, float, 1))
    flag(group, "noise_std", "standard deviation, for noise", type=at_least(0, float))
    group = parser.add_argument_group("the run")
    group.add_argument("--out", help="folder of the run [out/<init_state>]")
    group.add_argument("--resume", action="store_true", help="go on with the run in --out from its last checkpoint")
    flag(group, "init_from", "start from the weights of this run, with its architecture, T and tokenizer", metavar="RUN")
    flag(group, "preset", "defaults of size and training: tiny for a CPU, small for a GPU", choices=PRESETS)
    flag(group, "steps", "optimizer steps", type=at_least(1))
    flag(group, "batch_size", "sequences a step", type=at_least(1))
    flag(group, "seq_len", "T, the tokens of a training sequence, an even number", type=at_least(2))
    flag(group, "lr", "peak learning rate", type=at_least(0, float))
    flag(group, "seed", "of the weights, the batches and the noise", type=at_least(0))
    flag(group, "dataset", "python (the standard library's sources), or a UTF-8 text file, or a folder of them")
    flag(group, "tokenizer", "byte, bpeN (N ids, learnt from the text), or gpt2 (downloaded once)")
    flag(group, "device", "auto, cpu, cuda, cuda:1, mps")
    flag(group, "dtype", "of the matrix products; auto: bfloat16 where it is fast", choices=["auto", "float32", "bfloat16"])
    flag(group, "backend", "of the scan; auto: triton on a GPU", choices=["auto", "triton", "torch"])
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


def resolve(given):
    """The flags given -> (all flags, the folder, what to start from: the model and the checkpoint of a run, or None).
    ValueError says which flag is wrong. Nothing is written."""
    out = Path(given.get("out", f"out/{given.get('init_state', DEFAULTS['init_state'])}"))
    if given.pop("resume", False):
        model, checkpoint = load_run(out)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{out} holds weights only, nothing to resume: start a new run with --init_from={out}")
        args, fixed, why = checkpoint["args"], set(checkpoint["args"]) - {"out", "device", "backend"}, "--resume"
    else:
        model, checkpoint = None, None
        if out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir())):
            raise ValueError(f"{out} is not empty: go on with its run by --resume, or name another folder with --out")
        args, fixed, why = DEFAULTS | PRESETS[given.get("preset", DEFAULTS["preset"])], set(), ""
        if "init_from" in given:
            model, checkpoint = load_run(given["init_from"])
            fixed, why = {*MODEL_FLAGS, "seq_len", "tokenizer", "preset"}, f"--init_from={given['init_from']}"
            args |= {name: checkpoint["args"][name] for name in fixed | {"batch_size", "dataset"}} | POST_TRAINING
    for name in fixed & set(given):
        if given[name] != args[name]:
            raise ValueError(f"--{name}={given[name]} contradicts {why}, where it is {args[name]}: leave it out")
    args = args | given | {"out": str(out)}
    if args["seq_len"] % 2:
        raise ValueError(f"--seq_len={args['seq_len']} should be even: evaluation works with halves of it")
    return args, out, model, checkpoint


def choose_device(args):
    """-> device, whether its matrix products are in bfloat16. Says why."""
    device, why = args["device"], "as asked"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        why = "the best there is"
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device} does not work here: {str(error).splitlines()[0]}") from None
    bf16, fast = args["dtype"] == "bfloat16", "as asked"
    if args["dtype"] == "auto":
        cuda = device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = cuda or (device == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)())
        fast = "fast here" if bf16 else "bfloat16 is not faster here"
    print(f"device    {device} ({why}), products in {'bfloat16' if bf16 else 'float32'} ({fast})")
    return torch.device(device), bf16


# ----------------------------------------------------------------------------------------------------------------------


def learning_rate(step, args):
    warmup = max(1, round(WARMUP * args["steps"]))
    if step < warmup:
        return args["lr"] * (step + 1) / warmup
    progress = (step - warmup) / max(1, args["steps"] - warmup)
    return args["lr"] * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validate(model, tokens, T, device):
    """Mean losses (nats/token) on the same held-out tokens at every call: over windows of T from a zero state, and over
    the second half of texts of 64 T through which the state is carried."""
    model.eval()
    windows = random_windows(tokens, max(16, 32768 // T), T, 0, 0).to(device)
    val = model.per_token_nll(windows[:, :-1], windows[:, 1:])[0].mean()
    segments, state, carried = min(64, len(tokens) // T), None, []
    for i in range(segments):
        windows = next_windows(tokens, 16, T, 0, i).to(device)
        nll, state = model.per_token_nll(windows[:, :-1], windows[:, 1:], state)
        carried.append(nll.mean())
    model.train()
    return val.item(), torch.stack(carried[segments // 2 :]).mean().item()


def main():
    parser = make_parser()
    try:
        args, out, model, checkpoint = resolve(vars(parser.parse_args()))
        device, bf16 = choose_device(args)
        resumed = checkpoint is not None and checkpoint["args"]["out"] == args["out"]
