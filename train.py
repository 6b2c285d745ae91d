"""Trains a small Mamba-2 whose training windows start from a state of your choice.

    python train.py --init_state=prev                                        from scratch -> out/prev
    python train.py --init_state=prev --init_from=out/zero --out=out/post    post-training of a trained model
    python train.py --out=out/prev --resume                                  goes on from the last checkpoint

Trained on windows of T tokens from the state 0, a recurrent model never meets the states that a longer text
leads to, and may fail on them. arXiv 2507.02782 starts training windows from other states. What zero, noise,
fitted, prev and tbtt are, README.md says ("The five initial states")."""

import atexit
import json
import math
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: 5 % faster on a CPU

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
from model import Mamba2Config, Mamba2LM, choose_device, load_run

# This process is RANK of WORLD, 0 of 1 but for torchrun. Each draws the whole batch and takes its own_rows.
RANK = int(os.environ.get("RANK", "0"))
WORLD = int(os.environ.get("WORLD_SIZE", "1"))

# ---- The initial state: the idea of this project

# For fitted: batches measured before training, steps between later measurements, weight of a new one.
CALIBRATE_STEPS, REFIT_EVERY, REFIT_RATE = 50, 10, 0.1  # our choice


class InitialState:
    """The state before the first token of each training window: for each layer a pair of conv, the last
    inputs of its convolution, and ssm, the matrices of its scan. `kept` is what is kept from step to step:
    {name: a tensor for each layer}, named "ssm" (in tbtt "conv" too), or for fitted "mean" and "mean_square".

    The mode decides on ssm. conv is zero except in tbtt, where these tokens really come before (our choice:
    the paper does not say)."""

    def __init__(self, args, device, kept):
        self.mode = args.init_state  # the name of the mode, not a state
        self.args = args
        self.device = device
        self.kept = kept

    def draw(self, model, b, step):
        """-> the state that b windows start from; None: zeros"""
        if self.mode == "zero":
            return None
        zeros = model.zero_state(b)  # for each layer: conv, ssm
        conv = [conv for conv, _ in zeros]
        ssm = [ssm for _, ssm in zeros]  # each (b, h, p, n)
        if self.mode == "noise":
            ssm = [self.args.noise_std * z for z in self.noise(ssm, step)]
        elif self.mode == "fitted":
            for i, z in enumerate(self.noise(ssm, step)):
                mean = self.kept["mean"][i][:, None, None]  # (h, 1, 1)
                mean_square = self.kept["mean_square"][i][:, None, None]  # (h, 1, 1)
                ssm[i] = mean + (mean_square - mean**2).clamp(min=0).sqrt() * z
        else:  # prev and tbtt: where the same row of the last step ended; in the first step, zero
            ssm = self.kept.get("ssm", ssm)
            conv = self.kept.get("conv", conv)
        for t in (*conv, *ssm):
            t[: self.first_row(b)] = 0  # these rows start from zero
        return list(zip(conv, ssm))

    def observe(self, state):
        """state: after the last token. Detached: no gradient reaches the step before."""
        if self.mode in ("prev", "tbtt"):
            self.kept["ssm"] = [ssm.detach() for _, ssm in state]
        if self.mode == "tbtt":
            self.kept["conv"] = [conv.detach() for conv, _ in state]

    @torch.no_grad()
    def fit(self, model, inputs, rate):
        """For fitted: moves the mean and mean square of each layer and head towards those of the states after
        these windows, which start from 0: after fitted noise, the noise would be fitted to itself."""
        _, state = model.hidden(inputs)
        means = {"mean": [ssm.mean((0, 2, 3)) for _, ssm in state]}  # each (h)
        means["mean_square"] = [(ssm**2).mean((0, 2, 3)) for _, ssm in state]
        for name, tensors in means.items():
            new = [mean_over_processes(t) for t in tensors]
            old = self.kept.get(name, new)  # the first time: new itself
            self.kept[name] = [torch.lerp(*pair, rate) for pair in zip(old, new)]

    def noise(self, ssm, step):
        """Standard normal tensors like those in ssm, by seed and step alone"""
        generator = torch.Generator(self.device).manual_seed(self.args.seed * 1_000_003 + step)
        shape = (WORLD * len(ssm[0]), *ssm[0].shape[1:])
        return [own_rows(torch.randn(shape, generator=generator, device=self.device)) for _ in ssm]

    def first_row(self, b):
        """Of this process's b rows, the first that starts from a state. The last rows of the whole batch do,
        the same at every step: row i starts from what row i ended with."""
        from_zero = WORLD * b - round(self.args.init_prob * WORLD * b)
        return min(max(from_zero - RANK * b, 0), b)


# ---- The other parts of a step

WARMUP, FINAL_LR = 0.1, 0.1  # shares of the steps and of the peak; in between a cosine
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.95), 0.1, 1.0


def learning_rate(step, args):
    warmup = max(1, round(WARMUP * args.steps))
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.steps - warmup)
    return args.lr * (FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model, device):
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [dict(params=matrices, weight_decay=WEIGHT_DECAY), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=BETAS, fused=device.type != "mps")


def get_batch(tokens, args, init, step):
    """(b, T + 1) ids: random windows; in tbtt, rows that get a state go on with their text"""
    rows = WORLD * args.batch_size
    batch = own_rows(data.random_windows(tokens, rows, args.seq_len, args.seed, step))
    if args.init_state == "tbtt":
        first = init.first_row(args.batch_size)
        going_on = own_rows(data.next_windows(tokens, rows, args.seq_len, args.seed, step))
        batch[first:] = going_on[first:]
    return batch.to(init.device)


@torch.no_grad()
def validate(model, tokens, T, device):
    """The mean loss (nats/token) of 512 held-out windows from a zero state, always the same ones"""
    losses = []
    for i in range(32):
        batch = data.random_windows(tokens, 16, T, seed=0, step=i).to(device)
        _, loss, _ = model(batch[:, :-1], batch[:, 1:])
        losses.append(loss.item())
    return sum(losses) / len(losses)


def choose_dtype(name, device):
    """auto: bfloat16 where the hardware multiplies it, float32 elsewhere"""
    if name != "auto":
        return name
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


def compile_layers(model, device):
    # 4 to 8 % faster on a CPU: model.py's convolution computes its inputs once, not for each term.
    options = {"realize_reads_threshold": 2} if device.type == "cpu" else None
    for block in model.backbone.layers:
        block.compile(dynamic=False, options=options)


def eager():
    """A context where nothing runs compiled: other shapes would be compiled again."""
    return torch.compiler.set_stance("force_eager")


# ---- Flags. Some have other defaults in a preset, or in post-training.

MID = dict(d_model=256, n_layer=4, headdim=64, seq_len=256, batch_size=8, steps=2000, lr=2e-3)
SMALL = dict(d_model=512, n_layer=10, headdim=64, seq_len=512, batch_size=32, steps=5000, lr=1e-3)
# 0.4M parameters, for minutes on a CPU; 2.1M; 19M, for a GPU
PRESETS = {"tiny": {}, "mid": MID, "small": SMALL | {"tokenizer": "bpe4096"}}
POST_TRAINING = dict(steps=500, init_prob=0.1)  # with --init_from
# Flags of Mamba2Config; flags that may differ when a run is resumed.
MODEL = ("d_model", "n_layer", "d_state", "headdim", "A_init", "A_init_range")
MACHINE = ("out", "resume", "device", "backend", "compile")


def make_parser():
    presets = "".join(f"--preset={name}: {values}\n" for name, values in PRESETS.items())
    epilog = f"other defaults:\n{presets}--init_from: {POST_TRAINING}; sizes, corpus, lr as in that run"
    parser, add = data.make_parser(__doc__, epilog)  # add(flag, default, help)
    positive = data.within(int, 1)  # a type: an int from 1 on
    # fmt: off
    modes = ["zero", "noise", "fitted", "prev", "tbtt"]
    add("--init_state", "zero", "what training windows start from", choices=modes)
    add("--init_prob", 1.0, "share of the windows that start from it; the others start from zero",
        type=data.within(float, 0, 1))
    add("--noise_std", 0.1, "standard deviation, for noise (our choice)", type=data.within(float, 0))
    add("--out", None, "folder of the run; None: out/<init_state>")
    add("--resume", False, "go on with the run in --out from its last checkpoint", action="store_true")
    add("--init_from", None, "start from the weights of a run, or an official checkpoint", metavar="RUN")
    add("--preset", "tiny", "sizes of the model and of its training", choices=PRESETS)
    add("--steps", 500, "optimizer steps", type=positive)
    add("--batch_size", 64, "windows a step, in each process", type=positive)
    add("--seq_len", 64, "T, tokens of a training window, even", type=data.within(int, 2))
    add("--lr", 3e-3, "peak learning rate", type=data.within(float, 0))
    add("--seed", 0, "of the weights, the batches and the noise", type=data.within(int, 0))
    add("--dataset", "python", "python (its library's sources), or a UTF-8 text file or folder")
    add("--tokenizer", "bpe1024", "byte, or bpeN (N ids, learnt from the text)")
    add("--device", "auto", "auto, cpu, cuda, cuda:1, mps")
    add("--dtype", "auto", "of matrix products; auto: bfloat16 where it is fast",
        choices=["auto", "float32", "bfloat16"])
    add("--backend", None, "of the scan; None: triton on a GPU", choices=["triton", "torch"])
    add("--compile", "auto", "fuse each layer, for which a CPU needs a C++ compiler; auto: on a GPU",
        choices=["auto", "on", "off"])
    add("--log_every", 25, "steps between two lines of the log", type=positive)
    add("--save_every", 100, "steps between two checkpoints, with validation", type=positive)
    add("--d_model", 128, "d, width of the residual stream", type=positive)
    add("--n_layer", 2, "layers", type=positive)
    add("--d_state", 128, "n: the state of a head is a matrix of p x n numbers", type=positive)
    add("--headdim", 32, "p, numbers that a head reads and writes a token", type=positive)
    add("--A_init", "log", "distribution of the rates of forgetting at the start", choices=["log", "uniform"])
    add("--A_init_range", [0.01, 16.0], "their range, lowest and highest; ours (mamba_ssm: uniform, 1 16)",
        type=data.within(float, 1e-9), nargs=2, metavar="RATE")
    # fmt: on
    return parser


def parse(argv):
    """-> flags, model, checkpoint (of the run to resume or to start from, else None and None)"""
    parser = make_parser()
    args = parser.parse_args(argv)
    out = args.out or f"out/{args.init_state}"
    model, checkpoint = None, None
    defaults = PRESETS[args.preset]  # for flags that are not given
    fixed = {}  # for flags that may not differ from this
    if args.resume:
        model, checkpoint = load_run(out)
        if "optimizer" not in checkpoint:
            raise ValueError(f"{out} holds weights only: start a new run from it by --init_from")
        fixed = {name: value for name, value in checkpoint["args"].items() if name not in MACHINE}
    elif args.init_from:
        model, checkpoint = load_run(args.init_from)
        theirs = checkpoint["args"]
        fixed = {name: getattr(model.config, name) for name in MODEL}
        fixed |= {name: theirs[name] for name in ("preset", "tokenizer")}
        defaults = POST_TRAINING | {name: theirs[name] for name in ("seq_len", "batch_size", "dataset", "lr")}
    parser.set_defaults(**defaults | fixed)
    args = parser.parse_args(argv)  # again, with these defaults
    args.out = out
    for name, value in fixed.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name} should be as in that run, {value}: leave it out")
    taken = {path.name for path in Path(out).glob("*")} & {"ckpt.pt", "log.jsonl", "config.json"}
    if taken and not args.resume:
        raise ValueError(f"{out} holds a run or an official checkpoint: --resume, or choose another --out")
    if args.seq_len % 2:
        raise ValueError(f"--seq_len={args.seq_len} should be even: evaluation works with halves of it")
    return args, model, checkpoint


# ---- Several processes. For a single one all of this does nothing.


def join_processes():
    if WORLD == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def own_rows(rows):
    """This process's part of the rows of a whole batch"""
    return rows.chunk(WORLD)[RANK]


def all_rows(part):
    if WORLD == 1:
        return part
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def mean_over_processes(tensor):
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor / WORLD


# ---- A run on disk: ckpt.pt, tokenizer.json, log.jsonl


def save(args, step, model, optimizer, init, corpus, log):
    """Writes the tokenizer at step 0, the log later, and the checkpoint: all that it takes to go on."""
    kept = init.kept
    if "ssm" in kept:  # each process has its own rows; the means of fitted are the same in all
        kept = {name: [all_rows(t) for t in tensors] for name, tensors in kept.items()}
    if RANK > 0:
        return
    content = dict(
        config=asdict(model.config),
        args=vars(args),
        step=step,
        processes=WORLD,
        corpus_hash=corpus.hash,
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        kept=kept,
        log=log,
    )
    out = Path(args.out)
    if step == 0:
        data.write_whole(out / "tokenizer.json", corpus.tokenizer.text)
    else:  # before the checkpoint, which has these rows, too
        data.write_whole(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in log))
    data.write_whole(out / "ckpt.pt", lambda file: torch.save(content, file))


def restore(checkpoint, args, corpus, optimizer, device):
    """-> step, what InitialState has kept, log"""
    for name, value in {"processes": WORLD, "corpus_hash": corpus.hash}.items():
        if checkpoint[name] != value:
            raise ValueError(f"{args.out} was trained with {name} {checkpoint[name]}, not {value}")
    optimizer.load_state_dict(checkpoint["optimizer"])
    kept = checkpoint["kept"]
    if "ssm" in kept:
        kept = {name: [own_rows(t) for t in tensors] for name, tensors in kept.items()}
    kept = {name: [t.to(device) for t in tensors] for name, tensors in kept.items()}
    return checkpoint["step"], kept, checkpoint["log"]


def prepare_corpus(args, model, checkpoint):
    tokenizer = args.tokenizer
    if checkpoint:  # that of the run
        folder = args.out if args.resume else args.init_from
        tokenizer = data.load_tokenizer(folder, model.config.vocab_size)
    corpus = data.load_corpus(args.dataset, tokenizer)
    if min(len(corpus.train), len(corpus.val)) < 2 * args.seq_len:
        raise ValueError(f"--dataset={args.dataset} holds less than two windows of {args.seq_len} tokens")
    return corpus


def prepare_model(args, model, corpus, device, autocast):
    torch.manual_seed(args.seed)
    if model is None:
        sizes = {name: getattr(args, name) for name in MODEL}
        model = Mamba2LM(Mamba2Config(vocab_size=corpus.tokenizer.n_vocab, **sizes))
    model.config.backend = args.backend
    model.to(device).train()
    with autocast:
        model.hidden(torch.zeros(1, 2, dtype=torch.long, device=device))  # if the backend fails, then now
    if args.compile == "on" or (args.compile == "auto" and device.type == "cuda"):
        compile_layers(model, device)
    print(f"model      {sum(p.numel() for p in model.parameters()):,} parameters")
    print(f"device     {device}, matrix products in {args.dtype}")
    rows = WORLD * args.batch_size
    print(f"training   {args.init_state}, {args.steps:,} steps of {rows} windows of {args.seq_len} tokens")
    return model


def print_row(row, bar):
    line = "step {step:6,}  loss {loss:.4f}  lr {lr:.1e}  grad {grad_norm:.2f}  {tokens_per_s:8,.0f} tok/s"
    line += "  held-out {held_out_loss:.4f}" if "held_out_loss" in row else ""
    bar.write(line.format(**row))


def print_sample(model, tokenizer, seed, device):
    separator = torch.tensor([[tokenizer.encode_single_token(data.SEPARATOR)]], device=device)
    sample = model.eval().generate(separator, 256, torch.Generator(device).manual_seed(seed))
    print(f"\n256 tokens of its own:\n\n{tokenizer.decode(sample[0].tolist())}\n")


def main(argv=None):
    # What to train, and on what.
    torch.set_flush_denormal(True)  # products of many decays: below 1e-38 a CPU takes ten times as long
    args, model, checkpoint = parse(argv)
    join_processes()
    device = choose_device(args.device)
    args.dtype = choose_dtype(args.dtype, device)
    corpus = prepare_corpus(args, model, checkpoint)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    model = prepare_model(args, model, corpus, device, autocast)
    net = model if WORLD == 1 else DistributedDataParallel(model)  # which exchanges gradients
    optimizer = make_optimizer(model, device)

    # Where to begin.
    step, kept, log = 0, {}, []
    if args.resume:
        step, kept, log = restore(checkpoint, args, corpus, optimizer, device)
    init = InitialState(args, device, kept)
    if args.init_state == "fitted" and not kept:
        for i in range(CALIBRATE_STEPS):
            batch = get_batch(corpus.train, args, init, args.steps + i)  # batches that training does not use
            with autocast, eager():
                init.fit(model, batch[:, :-1], rate=1 / (i + 1))  # so: the plain mean of all
    if not args.resume:
        save(args, step, model, optimizer, init, corpus, log)
    print(f"after Ctrl-C or a power cut, go on with --out={args.out} --resume\n")

    # The loop. Three of its lines are what this project is about: draw, the pass that starts there, observe.
    losses, clock = [], time.perf_counter()
    bar = tqdm(total=args.steps, initial=step, unit=" steps", disable=RANK > 0 or None, dynamic_ncols=True)
    while step < args.steps:
        # A batch, and the state that its windows start from.
        batch = get_batch(corpus.train, args, init, step)
        inputs, targets = batch[:, :-1], batch[:, 1:]  # (b, T)
        initial_state = init.draw(model, args.batch_size, step)

        # Forward, backward, update.
        with autocast:
            _, loss, final_state = net(inputs, targets, initial_state)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
        if not math.isfinite(grad_norm):
            sys.exit(f"train.py: the gradient of step {step} is not finite; the last checkpoint is good")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        optimizer.step()
        optimizer.zero_grad()

        # What the next step may start from.
        init.observe(final_state)
        if args.init_state == "fitted" and step % REFIT_EVERY == 0:
            with autocast, eager():
                init.fit(model, inputs, REFIT_RATE)

        # A line of the log, a validation, a checkpoint.
        losses.append(mean_over_processes(loss.detach()).item())
        step += 1
        bar.update()
        saving = step % args.save_every == 0 or step == args.steps
        if step % args.log_every == 0 or saving:
            tokens_per_s = WORLD * inputs.numel() * len(losses) / (time.perf_counter() - clock)
            row = dict(step=step, loss=sum(losses) / len(losses), lr=learning_rate(step - 1, args))
            row |= dict(grad_norm=grad_norm, tokens_per_s=tokens_per_s)
            if saving:
                with autocast, eager():
                    row["held_out_loss"] = validate(model, corpus.val, args.seq_len, device)
            print_row(row, bar)
            log.append(row)
            if saving:
                save(args, step, model, optimizer, init, corpus, log)
            losses, clock = [], time.perf_counter()
    bar.close()

    # What it has learnt.
    with eager():
        print_sample(model, corpus.tokenizer, args.seed, device)
    print(f"how it does on longer texts: python eval_long.py {args.out}")


if __name__ == "__main__":
    data.run_script(main)
