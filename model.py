"""Mamba-2 as a language model, with its state in the open (arXiv 2405.21060).

    model = Mamba2LM(Mamba2Config(vocab_size=1024, d_model=128, n_layer=2, headdim=32))
    logits, _, state = model(idx)                          # idx (b, l) token ids, logits (b, l, vocab)
    _, loss, state = model(idx, targets, state)            # goes on from where the last call stopped
    logits, state = model.step(token, state)               # one token, in constant time and memory

Each layer looks at the past in two ways: a causal convolution over the last 4 inputs, and the scan of scan_kernel.py.
So the state of a layer is a pair (conv, ssm): the convolution's last d_conv - 1 inputs, and the scan's matrices.
Given the state, a text cut into segments is the same as the text in one piece, at every position, gradients included.

Parameters have the names, shapes and meaning of the official implementation (mamba_ssm, MambaLMHeadModel). After the model
come the reading of checkpoints, ours and official ones, and the few lines that share work among processes.

Dimensions, the same letters in every file:
    b batch · l length · c chunk · q, s place in a chunk (row, column) · h head · p head dim
    g group of B, C · r head within its group (h = g r) · n state dim · d model width
"""

import atexit
import json
import math
import os
import pickle
import re
import sys
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scan_kernel import ssd

LOGITS_AT_ONCE = 2**26  # 256 MB in float32: logits of long texts are made and used up in slices of this many numbers

# For a CPU. Products of decays get below 1e-38, where arithmetic takes many times longer; they are 0 from there on. And
# memory comes in huge pages, because temporaries are large and short-lived: 15 % less time for a training step.
torch.set_flush_denormal(True)
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


State = list[tuple[Tensor, Tensor]]  # for each layer: conv (b, d_conv - 1, conv_dim), ssm (b, h, p, n), float32


@dataclass
class Mamba2Config:
    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 128  # n
    headdim: int = 64  # p
    expand: int = 2  # the heads together are this much wider than the model: h p = expand d
    d_conv: int = 4  # the convolution's window, in tokens
    ngroups: int = 1  # g
    A_init: str = "uniform"  # or "log": log-uniform, one head in each of h equal parts
    A_init_range: tuple = (1, 16)  # -A, the rates of forgetting; a head remembers about 1 / (dt |A|) tokens
    dt_min: float = 1e-3
    dt_max: float = 0.1
    tie_embeddings: bool = True  # lm_head's weight is the embedding's
    chunk: int = 64  # of the scan, in tokens; changes speed, not results
    backend: str | None = None  # of the scan: "triton", "torch", or None for the best there is

    def __post_init__(self):
        self.A_init_range = tuple(self.A_init_range)
        for name, value in vars(self).items():
            if type(value) is int and value < 1:
                raise ValueError(f"{name} should be at least 1, not {value}")
        self.d_inner = self.expand * self.d_model
        self.nheads = self.d_inner // self.headdim
        self.conv_dim = self.d_inner + 2 * self.ngroups * self.d_state  # x, B and C go through the convolution
        lo, hi = self.A_init_range
        for holds, rule in (
            (self.d_inner % self.headdim == 0, f"headdim {self.headdim} divides expand * d_model = {self.d_inner}"),
            (self.nheads % self.ngroups == 0, f"ngroups {self.ngroups} divides the {self.nheads} heads"),
            (self.chunk & (self.chunk - 1) == 0, f"chunk {self.chunk} is a power of two"),
            (self.A_init in ("uniform", "log"), f"A_init {self.A_init} is uniform or log"),
            (0 < lo <= hi < math.inf, f"A_init_range {lo} {hi} is 0 < LO <= HI"),
            (0 < self.dt_min <= self.dt_max < math.inf, f"0 < dt_min {self.dt_min} <= dt_max {self.dt_max}"),
        ):
            if not holds:
                raise ValueError(f"the model's sizes should be such that {rule}")


class GatedRMSNorm(nn.Module):
    """norm(y * silu(z)), its mean square taken over each of the groups."""

    def __init__(self, width, groups):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.groups = groups

    def forward(self, y, z):
        y = (y * F.silu(z)).unflatten(-1, (self.groups, -1))
        return F.rms_norm(y, y.shape[-1:], eps=1e-5).flatten(-2) * self.weight


class Mamba2(nn.Module):
    """A layer: project, convolve, scan, add what D lets pass, gate by z, project back."""

    dt_scale = 1.0  # below 1, time goes slower: the training-free remedy that eval_long.py --dt_scale tries

    def __init__(self, config):
        super().__init__()
        self.config = config
        h = config.nheads
        self.in_proj = nn.Linear(
            config.d_model, config.d_inner + config.conv_dim + h, bias=False
        )  # z, the gate; x, B, C; dt
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(h))
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.norm = GatedRMSNorm(config.d_inner, config.ngroups)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def project(self, inputs):
        """inputs (..., d) -> z (..., h p), xBC (..., conv_dim), dt (..., h), the last one after softplus, in float32."""
        sizes = (self.config.d_inner, self.config.conv_dim, self.config.nheads)
        z, xBC, dt = self.in_proj(inputs).split(sizes, dim=-1)
        return z, xBC, F.softplus(dt + self.dt_bias) * self.dt_scale

    def convolve(self, xBC, conv):
        """xBC (b, l, conv_dim), the d_conv - 1 inputs before it or None -> silu of the causal convolution, last inputs"""
        b, l, _ = xBC.shape
        shape = (b, self.config.d_conv - 1, self.config.conv_dim)
        conv = xBC.new_zeros(shape) if conv is None else conv
        if conv.shape != shape:
            raise ValueError(f"the conv part of a state should be of shape {shape}, not {tuple(conv.shape)}")
        padded = torch.cat([conv.to(xBC.dtype), xBC], dim=1)  # (b, d_conv - 1 + l, conv_dim)
        out = self.conv1d.bias
        for i in range(self.config.d_conv):  # shifted products: faster on a CPU than its depthwise convolution
            out = torch.addcmul(out, padded[:, i : i + l], self.conv1d.weight[:, 0, i])
        last = padded[:, l:].to(self.conv1d.weight.dtype, copy=True)  # a view would keep all of `padded` in memory
        return F.silu(out).to(xBC.dtype), last

    def split_heads(self, xBC):
        """(..., conv_dim) -> x (..., h, p), B (..., g, n), C (..., g, n)"""
        config = self.config
        groups = config.ngroups * config.d_state
        x, B, C = xBC.split((config.d_inner, groups, groups), dim=-1)
        x = x.unflatten(-1, (config.nheads, config.headdim))
        return x, *(t.unflatten(-1, (config.ngroups, config.d_state)) for t in (B, C))

    def forward(self, inputs, state):
        """inputs (b, l, d), state (conv, ssm) -> (b, l, d), (conv, ssm)"""
        l = inputs.shape[1]
        conv, ssm = state
        z, xBC, dt = self.project(inputs)
        xBC, conv = self.convolve(xBC, conv)
        x, B, C = self.split_heads(xBC)
        chunk = min(self.config.chunk, 1 << (l - 1).bit_length())  # no longer than needed: l, up to a power of two
        y, ssm = ssd(x, dt, -torch.exp(self.A_log), B, C, ssm, chunk, self.config.backend)
        y = y + self.D[:, None].to(x.dtype) * x  # (b, l, h, p)
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv, ssm)

    def step(self, inputs, state):
        """forward for one token: inputs (b, d), state (conv, ssm) -> (b, d), (conv, ssm)"""
        conv, ssm = state
        z, xBC, dt = self.project(inputs)
        window = torch.cat([conv, xBC[:, None]], dim=1)  # (b, d_conv, conv_dim)
        x, B, C = self.split_heads(F.silu((window * self.conv1d.weight[:, 0].T).sum(1) + self.conv1d.bias))
        if self.config.ngroups > 1:
            B, C = (t.repeat_interleave(self.config.nheads // self.config.ngroups, dim=1) for t in (B, C))  # (b, h, n)
        decay = torch.exp(dt * -torch.exp(self.A_log))[..., None, None]  # (b, h, 1, 1)
        ssm = (decay * ssm).addcmul_((dt[..., None] * x)[..., None], B[:, :, None])  # (b, h, p, n)
        y = torch.addcmul((ssm @ C[..., None])[..., 0], self.D[:, None], x)  # (b, h, p)
        return self.out_proj(self.norm(y.flatten(1), z)), (window[:, 1:], ssm)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = Mamba2(config)

    def forward(self, x, state):
        y, state = self.mixer(self.norm(x), state)
        return x + y, state


class Mamba2LM(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.backbone = nn.Module()
        self.backbone.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.backbone.norm_f = nn.RMSNorm(config.d_model, eps=1e-5)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """
        embedding (= lm_head)         normal, std 0.02
        in_proj, conv1d               uniform in +- 1 / sqrt(fan in)
        out_proj                      the same, divided by sqrt(n_layer): each layer adds to the residual stream
        norms, D                      1
        dt_bias                       softplus(dt_bias) log-uniform in [dt_min, dt_max]
        A_log                         log of -A, which is uniform or log-uniform in A_init_range
        No weight decay on dt_bias, A_log, D, norms and biases (train.py: on nothing with one dimension)."""
        config = self.config
        h = config.nheads
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        if not config.tie_embeddings:
            nn.init.normal_(self.lm_head.weight, std=0.02)
        for block in self.backbone.layers:
            mixer = block.mixer
            mixer.out_proj.weight /= math.sqrt(config.n_layer)  # torch's own initialisation is the uniform one above
            mixer.norm.weight.fill_(1)
            mixer.D.fill_(1)
            dt = config.dt_min * (config.dt_max / config.dt_min) ** torch.rand(h)
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            lo, hi = config.A_init_range
            if config.A_init == "uniform":
                mixer.A_log.copy_(torch.log(lo + (hi - lo) * torch.rand(h)))
            else:  # head i in the i-th part: some forget slowly for every seed
                mixer.A_log.copy_(math.log(lo) + math.log(hi / lo) * (torch.arange(h) + torch.rand(h)) / h)

    def hidden(self, idx: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """idx (b, l), state or None (= zeros) -> (b, l, d) before the head, state after the last token. Either part of a
        layer's state may be None too. ValueError names what does not fit."""
        if idx.dim() != 2 or idx.shape[1] < 1:
            raise ValueError(f"token ids should be of shape (b, l), l >= 1, not {tuple(idx.shape)}")
        state = [(None, None)] * self.config.n_layer if state is None else state
        if len(state) != self.config.n_layer:
            raise ValueError(f"state should hold {self.config.n_layer} layers, not {len(state)}")
        x = self.backbone.embedding(idx)  # (b, l, d), the residual stream, in float32
        new_state = []
        for block, layer_state in zip(self.backbone.layers, state):
            x, layer_state = block(x, layer_state)
            new_state.append(layer_state)
        return self.backbone.norm_f(x), new_state

    def zero_state(self, b: int) -> State:
        """The state before any token, written out: n_layer pairs of zeros."""
        config, device = self.config, self.lm_head.weight.device
        conv = torch.zeros(b, config.d_conv - 1, config.conv_dim, device=device)
        ssm = torch.zeros(b, config.nheads, config.headdim, config.d_state, device=device)
        return [(conv, ssm)] * config.n_layer

    def forward(self, idx: Tensor, targets: Tensor | None = None, state: State | None = None):
        """idx (b, l) -> (logits (b, l, vocab), None, state); with targets (b, l): (None, mean loss in nats, state)"""
        if targets is not None:
            nll, state = self.per_token_nll(idx, targets, state)
            return None, nll.mean(), state
        hidden, state = self.hidden(idx, state)
        return self.lm_head(hidden), None, state

    def per_token_nll(self, idx: Tensor, targets: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """idx, targets (b, l) -> negative log-likelihoods (b, l) in nats, float32; state. Only LOGITS_AT_ONCE logits exist
        at a time."""

        def nll(hidden, targets):
            return F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="none")

        hidden, state = self.hidden(idx, state)
        rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
        slices = list(zip(hidden.flatten(0, 1).split(rows), targets.flatten().split(rows)))
        if len(slices) == 1:
            nlls = [nll(*slices[0])]
        else:  # for the backward, each slice is computed again instead of kept
            nlls = [checkpoint(nll, *s, use_reentrant=False) for s in slices]
        return torch.cat(nlls).view(idx.shape), state

    @torch.no_grad()
    def step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """token (b,), state (with tensors in it) -> logits (b, vocab), state"""
        x = self.backbone.embedding(token)  # (b, d)
        new_state = []
        for block, layer_state in zip(self.backbone.layers, state):
            y, layer_state = block.mixer.step(block.norm(x), layer_state)
            x = x + y
            new_state.append(layer_state)
        return self.lm_head(self.backbone.norm_f(x)), new_state

    @torch.no_grad()
    def generate(self, idx: Tensor, tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 state: State | None = None, generator: torch.Generator | None = None) -> Tensor:  # fmt: skip
        """Goes on from the prompt idx (b, l) for `tokens` tokens -> (b, tokens). temperature 0: always the likeliest."""
        hidden, state = self.hidden(idx, state)
        logits = self.lm_head(hidden[:, -1])
        out = []
        for _ in range(tokens):
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                if top_k is not None:
                    kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                    logits = logits.masked_fill(logits < kth, -math.inf)
                token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)[:, 0]
            out.append(token)
            logits, state = self.step(token, state)
        return torch.stack(out, dim=1)


# Official checkpoints: a folder with config.json and pytorch_model.bin (mamba_ssm), or model.safetensors (transformers).
OFFICIAL_FILES = ("pytorch_model.bin", "model.safetensors")
# What transformers' configurations call our fields (mamba_ssm: as we do), the only value that we implement of other fields,
# and those of mamba_ssm that change nothing here.
TRANSFORMERS = {"hidden_size": "d_model", "num_hidden_layers": "n_layer", "state_size": "d_state", "head_dim": "headdim",
                "n_groups": "ngroups", "conv_kernel": "d_conv", "expand": "expand", "vocab_size": "vocab_size",
                "tie_word_embeddings": "tie_embeddings"}  # fmt: skip
ONLY = {"model_type": "mamba2", "layer": "Mamba2", "d_intermediate": 0, "attn_layer_idx": [], "attn_cfg": {}, "d_ssm": None,
        "rms_norm": True, "rmsnorm": True, "norm_before_gate": False, "D_has_hdim": False, "bias": False, "conv_bias": True,
        "dt_limit": [0.0, math.inf], "time_step_limit": [0.0, math.inf], "use_bias": False, "use_conv_bias": True,
        "hidden_act": "silu", "layer_norm_epsilon": 1e-5}  # fmt: skip
IGNORED = ("A_init_range", "dt_min", "dt_max", "dt_init_floor", "conv_init", "chunk_size", "use_mem_eff_path",
           "layer_idx")  # fmt: skip


def load_official(file: Path) -> tuple[Mamba2Config, dict]:
    """file: the weights, beside their config.json -> (Mamba2Config, weights by our names). ValueError names what differs
    from the architecture here."""
    infinity = lambda d: float(d["__float__"]) if "__float__" in d else d  # how transformers may write it
    fields, unknown = json.loads(file.with_name("config.json").read_text(), object_hook=infinity), set()
    if "hidden_size" in fields:
        fields = {"tie_embeddings": False} | {TRANSFORMERS.get(name, name): value for name, value in fields.items()}
    else:
        unknown = set(fields.get("ssm_cfg", {})) - {*TRANSFORMERS.values(), *ONLY, *IGNORED}
        fields = {"layer": "Mamba1"} | fields | fields.get("ssm_cfg", {})  # mamba_ssm's default
    ours = {name: fields[name] for name in TRANSFORMERS.values() if name in fields}
    wrong = unknown | {name for name, value in ONLY.items() if name in fields and fields[name] != value}
    if wrong:
        raise ValueError(", ".join(f"{name}={fields[name]} is not implemented" for name in sorted(wrong)))
    if file.suffix == ".bin":
        weights = torch.load(file, map_location="cpu", weights_only=True)
    else:
        try:
            from safetensors import SafetensorError
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError("model.safetensors needs another package: pip install safetensors") from None
        try:
            weights = load_file(file)
        except SafetensorError as error:
            raise ValueError(error) from None
    weights = {name.replace("backbone.embeddings.", "backbone.embedding."): weight for name, weight in weights.items()}
    rows, step = len(weights["backbone.embedding.weight"]), fields.get("pad_vocab_size_multiple", 1)
    if rows not in (ours["vocab_size"], -(-ours["vocab_size"] // step) * step):
        raise ValueError(f"an embedding of {rows} rows does not fit vocab_size={ours['vocab_size']}")
    config = Mamba2Config(**ours | {"vocab_size": rows})
    if config.tie_embeddings:
        weights.setdefault("lm_head.weight", weights["backbone.embedding.weight"])
    return config, weights


def load_run(path: str | Path, device: str | torch.device = "cpu") -> tuple[Mamba2LM, dict]:
    """-> (model in eval mode, checkpoint dict) of a run folder such as out/prev, or of its ckpt.pt, or of a folder in an
    official format, whose checkpoint is made up: it was trained on T = 2,048. ValueError or OSError, in one line, if it is
    not one. Loads tensors and plain values only: a file cannot run code."""
    file = Path(path)
    if file.is_dir():
        file = next((f for f in map(file.joinpath, OFFICIAL_FILES) if f.exists()), file / "ckpt.pt")
    try:
        if zipfile.is_zipfile(file):  # what torch.save writes; torch.load would not notice a flipped bit
            with zipfile.ZipFile(file) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"{damaged} is damaged")
        if file.name in OFFICIAL_FILES:
            config, weights = load_official(file)
            args = asdict(config) | {"seq_len": 2048, "batch_size": 8, "init_state": "zero", "dataset": "python",
                                     "preset": "small", "tokenizer": "its own"}  # fmt: skip
            checkpoint = {"config": asdict(config), "args": args, "step": 0, "tokens": 0, "corpus_hash": None}
        else:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            config, weights = Mamba2Config(**checkpoint["config"]), checkpoint["model"]
        checkpoint["file"] = str(file)
        model = Mamba2LM(config).to(device)
        model.load_state_dict(weights)
    except (pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, KeyError, TypeError, ValueError,
            AttributeError) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        if code := re.search(r"GLOBAL (\S+) was not", reason):  # where torch's advice begins with how to run it
            reason = f"it holds {code[1]}, not only tensors and plain values"
        raise ValueError(f"{file} is not a whole checkpoint ({type(error).__name__}: {reason[:300]})") from None
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise ValueError(f"{file}: weights that are not finite: {', '.join(broken)}")
    return model.eval(), checkpoint


# ----------------------------------------------------------------------------------------------------------------------
# Several processes: under torchrun, WORLD of them share the work, each on its part of what a single one would take. What is
# printed and written comes from process 0.

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own(rows):
    """This process's part of the rows of a whole batch."""
    return rows.chunk(WORLD)[RANK] if WORLD > 1 else rows


def all_rows(part):
    """The parts of all processes, one after the other."""
    parts = [torch.empty_like(part) for _ in range(WORLD)]
    if WORLD > 1:
        dist.all_gather(parts, part.contiguous())
    return torch.cat(parts) if WORLD > 1 else part


def mean_over_processes(tensor):
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor / WORLD


def choose_device(name: str) -> torch.device:
    """ "auto" (CUDA, Apple's MPS, or the CPU, in this order), "cpu", "cuda:1", ... -> the torch.device, if it works here.
    Under torchrun, the GPU of this process; all processes meet here, and from here on only process 0 prints."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda" and WORLD > 1:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={name} does not work here: {str(error).splitlines()[0]}") from None
    if WORLD > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        sys.stdout = sys.stdout if RANK == 0 else open(os.devnull, "w")  # noqa: SIM115 (open to the end)
    return device
