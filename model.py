"""Mamba-2 as a language model, with its state in the open (arXiv 2405.21060).

    model = Mamba2LM(Mamba2Config(vocab_size=1024, d_model=128, n_layer=2, headdim=32))
    logits, _, state = model(idx)                   # idx (b, l) token ids -> logits (b, l, vocab)
    _, loss, state = model(idx, targets, state)     # goes on from where the last call stopped

A layer looks at the past in two ways: by a convolution over the last few tokens, and by the scan of
scan_kernel.py. So its state has two parts: *conv*, the last d_conv - 1 inputs of the convolution, and *ssm*
(a recurrence like the scan is a state space model), the matrices S of the scan. Carry both over, and a text
cut into segments gives the same numbers as in one piece.

Parameters are those of the official MambaLMHeadModel (mamba_ssm) in name, shape and meaning.
Dimensions: b batch · l length · h head · p head dim · n state dim · d model width"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from scan_kernel import ssd


@dataclass
class Mamba2Config:
    # The defaults are mamba_ssm's; train.py's flags have their own. A and dt: see Mamba2.
    vocab_size: int
    d_model: int
    n_layer: int
    d_state: int = 128  # n
    headdim: int = 64  # p
    expand: int = 2  # all heads together have h p = expand d channels
    d_conv: int = 4  # tokens that the convolution sees
    A_init: str = "uniform"  # or "log": log-uniform, one head in each of h equal parts
    A_init_range: tuple = (1, 16)  # of -A at the start
    dt_min: float = 1e-3  # of dt at the start
    dt_max: float = 0.1
    tie_embeddings: bool = True  # lm_head's weight is the embedding's
    chunk: int = 64  # of the scan, in tokens
    backend: str | None = None  # of the scan, see ssd

    def __post_init__(self):
        self.A_init_range = list(self.A_init_range)
        self.d_inner = self.expand * self.d_model
        self.nheads = self.d_inner // self.headdim
        self.conv_dim = self.d_inner + 2 * self.d_state  # x, B and C go through the convolution
        low, high = self.A_init_range
        if self.d_inner % self.headdim:
            raise ValueError(f"headdim {self.headdim} should divide expand * d_model = {self.d_inner}")
        if not 0 < low <= high < math.inf:
            raise ValueError(f"A_init_range {low} {high} should be 0 < low <= high")


class GatedRMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, y, z):
        y = y * F.silu(z)
        return F.rms_norm(y, y.shape[-1:], eps=1e-5) * self.weight


class Mamba2(nn.Module):
    """A layer. From each token it projects z (a gate), x (what is written, times dt), B and C (where it is
    written and read) and, for each head, a time step dt > 0. A head with the rate A < 0 keeps exp(dt A) of
    its state at each token: it remembers about 1 / (dt |A|) tokens. D lets some of x pass by the scan."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        h = config.nheads
        self.in_proj = nn.Linear(config.d_model, config.d_inner + config.conv_dim + h, bias=False)
        self.conv1d = nn.Conv1d(config.conv_dim, config.conv_dim, config.d_conv, groups=config.conv_dim)
        self.dt_bias = nn.Parameter(torch.empty(h))  # Mamba2LM.init_weights fills these
        self.A_log = nn.Parameter(torch.empty(h))
        self.D = nn.Parameter(torch.empty(h))
        self.norm = GatedRMSNorm(config.d_inner)
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    def convolve(self, xBC, conv):
        """xBC (b, l, conv_dim), the d_conv - 1 inputs before or None -> convolved xBC, its last inputs"""
        b, l, width = xBC.shape
        if conv is None:
            conv = xBC.new_zeros(b, self.config.d_conv - 1, width)
        padded = torch.cat([conv.to(xBC.dtype), xBC], dim=1)  # (b, d_conv - 1 + l, conv_dim)
        out = self.conv1d.bias  # float32, so the sum is, too
        for i in range(self.config.d_conv):  # shifted products: faster than nn.Conv1d on a CPU
            out = torch.addcmul(out, padded[:, i : i + l], self.conv1d.weight[:, 0, i])
        last = padded[:, l:].to(out.dtype, copy=True)  # a view would keep all of `padded`
        return F.silu(out).to(xBC.dtype), last

    def forward(self, inputs, state):
        """inputs (b, l, d), state (conv, ssm), each may be None -> (b, l, d), state after the last token"""
        config = self.config
        l = inputs.shape[1]
        conv, ssm = state

        # What each token says.
        z, xBC, dt = self.in_proj(inputs).split((config.d_inner, config.conv_dim, config.nheads), dim=-1)
        xBC, conv = self.convolve(xBC, conv)
        # B and C, (b, l, n), are shared by the heads.
        x, B, C = xBC.split((config.d_inner, config.d_state, config.d_state), dim=-1)
        x = x.unflatten(-1, (config.nheads, config.headdim))  # (b, l, h, p)
        dt = F.softplus(dt + self.dt_bias)  # (b, l, h), float32

        # What is remembered of it.
        a = -torch.exp(self.A_log) * dt  # (b, l, h); a larger step forgets more
        u = (x * dt[..., None]).to(x.dtype)  # (b, l, h, p); and writes more
        chunk = min(config.chunk, 1 << (l - 1).bit_length())  # at most the least power of two >= l
        y, ssm = ssd(u, a, B, C, ssm, chunk, config.backend)

        y = y + self.D[:, None].to(x.dtype) * x  # (b, l, h, p)
        return self.out_proj(self.norm(y.flatten(-2), z)), (conv, ssm)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm = nn.RMSNorm(config.d_model, eps=1e-5)
        self.mixer = Mamba2(config)

    def forward(self, residual, state):
        y, state = self.mixer(self.norm(residual), state)
        return residual + y, state


class Mamba2LM(nn.Module):
    """Its state: for each layer a pair of conv (b, d_conv - 1, conv_dim) and ssm (b, h, p, n), float32. Where
    a state is optional, None stands for zeros."""

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
        embedding                normal, std 0.02; lm_head the same, or torch's default if it is not tied
        in_proj, conv1d          uniform in +- 1 / sqrt(fan in), torch's default
        out_proj                 that / sqrt(n_layer): each layer adds to the residual stream
        norms, D                 1
        dt_bias                  softplus(dt_bias) log-uniform in [dt_min, dt_max]
        A_log                    log of -A, which is uniform or log-uniform in A_init_range"""
        config = self.config
        h = config.nheads
        nn.init.normal_(self.backbone.embedding.weight, std=0.02)
        for block in self.backbone.layers:
            mixer = block.mixer
            mixer.out_proj.weight /= math.sqrt(config.n_layer)
            mixer.norm.weight.fill_(1)
            mixer.D.fill_(1)
            dt = config.dt_min * (config.dt_max / config.dt_min) ** torch.rand(h)
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            low, high = config.A_init_range
            if config.A_init == "uniform":
                mixer.A_log.copy_(torch.log(low + (high - low) * torch.rand(h)))
            else:  # head i in the i-th part: some forget slowly, whatever the seed
                place = (torch.arange(h) + torch.rand(h)) / h  # in [0, 1)
                mixer.A_log.copy_(math.log(low) + math.log(high / low) * place)

    def zero_state(self, b):
        """The state before any token. All layers share the same two tensors."""
        config, device = self.config, self.lm_head.weight.device
        conv = torch.zeros(b, config.d_conv - 1, config.conv_dim, device=device)
        ssm = torch.zeros(b, config.nheads, config.headdim, config.d_state, device=device)
        return [(conv, ssm)] * config.n_layer

    def hidden(self, idx, state=None):
        """idx (b, l) -> (b, l, d) before lm_head, state after the last token"""
        state = state or [(None, None)] * self.config.n_layer
        residual = self.backbone.embedding(idx)  # (b, l, d), float32
        new_state = []
        for block, layer_state in zip(self.backbone.layers, state, strict=True):
            residual, layer_state = block(residual, layer_state)
            new_state.append(layer_state)
        return self.backbone.norm_f(residual), new_state

    def forward(self, idx, targets=None, state=None):
        """idx (b, l) -> (logits (b, l, vocab), None, state); with targets (b, l): (None, mean loss, state)"""
        if targets is not None:
            nll, state = self.per_token_nll(idx, targets, state)
            return None, nll.mean(), state
        hidden, state = self.hidden(idx, state)
        return self.lm_head(hidden), None, state

    def per_token_nll(self, idx, targets, state=None):
        """idx, targets (b, l) -> negative log-likelihood of each target (b, l) in nats; state"""
        hidden, state = self.hidden(idx, state)
        logits = self.lm_head(hidden).float()  # (b, l, vocab)
        nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")  # (b * l)
        return nll.view(idx.shape), state

    @torch.no_grad()
    def generate(self, idx, length, generator=None):
        """Goes on from the prompt idx (b, l) -> (b, length), each token in the same time and memory"""
        out = []
        state = None
        for _ in range(length):
            hidden, state = self.hidden(idx, state)
            probabilities = self.lm_head(hidden[:, -1]).softmax(-1)  # (b, vocab)
            idx = torch.multinomial(probabilities, 1, generator=generator)  # (b, 1)
            out.append(idx)
        return torch.cat(out, dim=1)

    @classmethod
    def from_pretrained(cls, folder):
        """An official Mamba-2 checkpoint: a folder with config.json and pytorch_model.bin (mamba_ssm) or
        model.safetensors (transformers). ValueError names what differs from the architecture here."""
        text = (Path(folder) / "config.json").read_text()
        # (transformers may write infinity as {"__float__": "Infinity"}.)
        fields = json.loads(text, object_hook=lambda d: math.inf if "__float__" in d else d)
        if "hidden_size" in fields:  # by transformers: under the names of mamba_ssm
            names = dict(hidden_size="d_model", num_hidden_layers="n_layer", state_size="d_state")
            names |= dict(head_dim="headdim", conv_kernel="d_conv", tie_word_embeddings="tie_embeddings")
            names |= dict(n_groups="ngroups", use_bias="bias", use_conv_bias="conv_bias")
            names |= dict(time_step_limit="dt_limit")
            fields = {"tie_embeddings": False} | {names.get(k, k): value for k, value in fields.items()}
            fields["norm_before_gate"] = False  # whatever it says, transformers ignores it
        else:
            fields = {"layer": "Mamba1"} | fields | fields.get("ssm_cfg", {})  # mamba_ssm's default
        # The only values that are implemented here.
        only = dict(model_type="mamba2", layer="Mamba2", ngroups=1, bias=False, conv_bias=True)
        only |= dict(attn_layer_idx=[], d_intermediate=0, D_has_hdim=False, norm_before_gate=False)
        only |= dict(dt_limit=[0, math.inf], rms_norm=True, hidden_act="silu", layer_norm_epsilon=1e-5)
        for name, value in only.items():
            if fields.get(name, value) != value:
                raise ValueError(f"{name}={fields[name]} is not implemented here, only {value} is")
        file = Path(folder) / "model.safetensors"
        if file.exists():
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            file = Path(folder) / "pytorch_model.bin"
            weights = torch.load(file, map_location="cpu", weights_only=True)
        weights = {name.replace(".embeddings.", ".embedding."): weight for name, weight in weights.items()}
        embedding = weights["backbone.embedding.weight"]  # (vocab_size and some padding, d_model)
        if fields.get("tie_embeddings", True):
            weights["lm_head.weight"] = embedding
        sizes = {name: fields[name] for name in Mamba2Config.__dataclass_fields__ if name in fields}
        model = cls(Mamba2Config(**sizes | {"vocab_size": len(embedding)}))
        model.load_state_dict(weights)
        return model


def load_run(folder, device="cpu"):
    """-> (model in eval mode, checkpoint: a dict of tensors and plain values) of a run of train.py, or of an
    official checkpoint, of which we know that T was 2,048 and choose the rest. ValueError if it cannot be
    used."""
    try:
        if (Path(folder) / "config.json").exists():
            model = Mamba2LM.from_pretrained(folder)
            args = dict(seq_len=2048, batch_size=8, dataset="python", lr=3e-4, preset=None, tokenizer=None)
            checkpoint = {"args": args, "step": 0}
        else:
            checkpoint = torch.load(Path(folder) / "ckpt.pt", map_location="cpu", weights_only=True)
            model = Mamba2LM(Mamba2Config(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
    except Exception as error:  # noqa: BLE001 (a damaged file can raise anything)
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise ValueError(f"{folder} holds no checkpoint that can be used ({reason})") from None
    return model.to(device).eval(), checkpoint


def choose_device(name):
    """auto, cpu, cuda:1, ... -> torch.device. ValueError if it is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device={name} does not work here: {reason}") from None
