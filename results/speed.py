"""Tokens per second on this machine: evaluation, generation, and training beside its floor and its peers.

    python results/speed.py --preset=mid           takes train.py's flags
    python results/speed.py --preset=mid --long    evaluates a text of 1,048,576 tokens, too

    evaluation   all of eval_long.py for one text, once, and the most memory that the process has had so far
    training     steps of train.py with --init_state=prev, eager and compiled; a transformer of the same
                 width, depth and vocabulary; transformers' Mamba-2, if it is installed; the floor, which is
                 the matrix products of a step alone; the parts of an eager step
    generation   one text, token after token

What else a machine does slows down what runs just then. So what is compared runs in turn, A B C A B C, and
each round gives ratios to the floor: their median counts; in brackets the least and the most. Tokens are
random. The last line is one JSON object.
"""

import json
import resource
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import eval_long
import train
from model import Mamba2Config, Mamba2LM, choose_device
from scan_kernel import ssd

VOCAB = 1024


def make_model(args):
    sizes = {name: getattr(args, name) for name in train.MODEL}
    return Mamba2LM(Mamba2Config(vocab_size=VOCAB, **sizes)).to(args.device)


def in_turn(sides, rounds):
    """sides {name: function} -> {name: seconds of a call in each round}"""
    times = {name: [] for name in sides}
    for i in range(rounds + 2):
        for name, function in sides.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= 2:  # after warming up
                times[name].append(time.perf_counter() - start)
    return times


def evaluate(args, length):
    """-> tokens/s, MB"""
    tokens = np.random.default_rng(0).integers(VOCAB, size=length + 1).astype(np.uint16)
    progress = SimpleNamespace(update=lambda tokens: None)
    start = time.perf_counter()
    eval_long.evaluate(make_model(args).eval(), tokens, np.array([0]), length, args.seq_len, progress)
    speed = length / (time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # of Linux, in KB
    return speed, torch.cuda.max_memory_allocated() / 2**20 if args.device.type == "cuda" else peak


class Transformer(nn.Module):  # without positions, which would cost nothing
    def __init__(self, args):
        super().__init__()
        d = args.d_model
        self.embedding = nn.Embedding(VOCAB, d)
        how = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layer = nn.TransformerEncoderLayer(d, d // args.headdim, 4 * d, **how)
        self.layers = nn.TransformerEncoder(layer, args.n_layer, nn.LayerNorm(d), enable_nested_tensor=False)

    def forward(self, idx, labels):
        mask = nn.Transformer.generate_square_subsequent_mask(idx.shape[1], device=idx.device)
        logits = F.linear(self.layers(self.embedding(idx), mask, is_causal=True), self.embedding.weight)
        return {"loss": F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())}


def make_theirs(config):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = {"hidden_size": config.d_model, "num_hidden_layers": config.n_layer, "num_heads": config.nheads}
    sizes |= {"head_dim": config.headdim, "state_size": config.d_state, "chunk_size": config.chunk}
    sizes |= {"n_groups": 1, "vocab_size": VOCAB, "tie_word_embeddings": True, "use_cache": False}
    return Mamba2ForCausalLM(Mamba2Config(**sizes))


def make_step(model, args):
    """-> a function that makes an optimizer step, as train.py does"""
    optimizer = train.make_optimizer(model.to(args.device).train(), args.device)
    init = train.InitialState(args, args.device, {})

    def step():
        inputs, targets = torch.randint(VOCAB, (2, args.batch_size, args.seq_len), device=args.device)
        with args.autocast:
            if isinstance(model, Mamba2LM):
                state = init.draw(model, args.batch_size, step=0)
                _, loss, state = model(inputs, targets, state)
                init.observe(state)
            else:
                loss = model(inputs, labels=targets)["loss"]
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), train.CLIP).item()
        optimizer.step()
        optimizer.zero_grad()

    return step


def make_parts(args):
    """{name: function} of the floor, and of the parts of a step: forward and backward, in all layers"""
    model = make_model(args)
    config, block = model.config, model.backbone.layers[0]
    mixer = block.mixer
    b, T, L, d, inner = args.batch_size, args.seq_len, args.n_layer, args.d_model, config.d_inner
    h, p, n, c = config.nheads, config.headdim, config.d_state, min(config.chunk, args.seq_len)
    dtype = getattr(torch, args.dtype)

    def both_ways(times, function, *shapes, dtype=torch.float32):
        inputs = [torch.randn(shape, device=args.device, dtype=dtype, requires_grad=True) for shape in shapes]
        with args.autocast:
            gradients = [torch.randn_like(output) for output in function(*inputs)]

        def run():
            for _ in range(times):
                with args.autocast:
                    outputs = function(*inputs)
                torch.autograd.grad(outputs, [*inputs, *model.parameters()], gradients, allow_unused=True)

        return run

    products = [(1, b * T, d, mixer.in_proj.out_features), (1, b * T, inner, d)]  # in_proj, out_proj
    products += [(b * T // c, c, n, c), (b * T // c * h, c, c, p)]  # C B^T, W u
    products += [(b * T // c, n, c, h * p), (b * T // c, c, n, h * p)]  # B^T u, C S^T
    products = [*products * L, (1, b * T, d, VOCAB)]  # lm_head
    runs = [both_ways(1, lambda x, y: [x @ y], (k, i, j), (k, j, m), dtype=dtype) for k, i, j, m in products]

    def floor():
        for run in runs:
            run()

    def scan(u, a, B, C, S):
        return ssd(u.to(dtype), -a.abs(), B.to(dtype), C.to(dtype), S, c)[:1]

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # for the optimizer
    wide = (b, T, inner)
    return {
        "floor": floor,
        "projections": both_ways(L, lambda x, y: (mixer.in_proj(x), mixer.out_proj(y)), (b, T, d), wide),
        "convolution": both_ways(L, lambda x: mixer.convolve(x, None)[:1], (b, T, config.conv_dim)),
        "scan": both_ways(L, scan, (b, T, h, p), (b, T, h), (b, T, n), (b, T, n), (b, h, p, n)),
        "norms": both_ways(L, lambda x, y, z: (block.norm(x), mixer.norm(y, z)), (b, T, d), wide, wide),
        "head": both_ways(1, lambda x: [F.cross_entropy(model.lm_head(x).float(), x.argmax(1))], (b * T, d)),
        "optimizer": train.make_optimizer(model, args.device).step,
    }


def main():
    parser = train.make_parser()
    parser.description = __doc__
    parser.add_argument("--rounds", default=9, type=int, help="of which the median is taken")
    parser.add_argument("--long", action="store_true", help="evaluate 1,048,576 tokens, too")
    parser.set_defaults(init_state="prev", **train.PRESETS[parser.parse_args().preset])
    args = parser.parse_args()
    args.device = choose_device(args.device)
    args.dtype = train.choose_dtype(args.dtype, args.device)
    args.autocast = torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    about = {"preset": args.preset, "device": args.device, "dtype": args.dtype, "rounds": args.rounds}
    found = {name: str(value) for name, value in about.items()} | {"threads": torch.get_num_threads()}
    print(found)
    for length in (2**13, 2**20) if args.long else (2**13,):
        found[f"evaluation {length}"] = speed, mb = evaluate(args, length)
        print(f"evaluation of {length:,} tokens: {speed:,.0f} tokens/s, {mb:,.0f} MB", flush=True)
    models = {"eager": make_model(args), "compiled": make_model(args), "transformer": Transformer(args)}
    train.compile_layers(models["compiled"], args.device)
    try:
        models["transformers"] = make_theirs(models["eager"].config)
    except ImportError:
        print("transformers is not installed: left out")
    sides = {name: make_step(model, args) for name, model in models.items()} | make_parts(args)
    prompt = torch.zeros(1, 1, dtype=torch.long, device=args.device)
    sides["generation"] = lambda: models["eager"].generate(prompt, 64)
    times = in_turn(sides, args.rounds)
    for name, seconds in times.items():
        tokens = 64 if name == "generation" else args.batch_size * args.seq_len
        ms = 1000 * statistics.median(seconds)
        ratios = [a / b for a, b in zip(seconds, times["floor"])]
        found[name] = [ms, 1000 * tokens / ms, statistics.median(ratios), min(ratios), max(ratios)]
        print("{:12}{:9.1f} ms{:12,.0f} tokens/s{:8.2f} x floor [{:.2f} - {:.2f}]".format(name, *found[name]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
