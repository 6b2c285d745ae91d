"""What this project claims, as tests: python -m pytest test_all.py

Each compares with something computed in another way: the recurrence token by token in float64, a sum written out, one
pass over the whole text, an uninterrupted run. Where gradients are compared, the gradient that comes in is random.

Triton's kernels run on a GPU if there is one; elsewhere on CPU tensors in Triton's interpreter, and compiled for GPUs that
are not here. Passed with triton 3.5.0 (whose interpreter needs NumPy below 2.4), 3.7.0 and 3.9.0, without a GPU."""

import gzip
import http.server
import importlib
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import zipfile
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from tqdm import tqdm

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and only where there is no GPU

import data
import eval_long
import model as model_file
import scan_kernel
import train
from model import Mamba2Config, Mamba2LM, load_run
from scan_kernel import ssd, ssd_chunked, ssd_loop

ROOT = Path(__file__).parent
NO_BAR = tqdm(disable=True)
LONG = os.environ.get("LONG") is not None  # more of what is drawn at random


def relative_error(reference, result):
    """RMS(error) / RMS(reference), in float64; nan if there is any."""
    error, reference = result.double() - reference.double(), reference.double()
    return error.square().mean().sqrt().item() / (reference.square().mean().sqrt().item() or 1.0)


# ----------------------------------------------------------------------------------------------------------------------
# The scan

NAMES = ("y", "final_state", "dx", "ddt", "dA", "dB", "dC", "dinit_state")


def scan_inputs(l, dtype=torch.float64, b=2, h=4, p=8, g=2, n=16, init=True, device="cpu"):
    """x, dt, A, B, C and, with init, init_state; heads from A = -0.01, which forgets little, to -16."""
    torch.manual_seed(l)
    wide = torch.promote_types(dtype, torch.float32)
    x, B, C = (torch.randn(b, l, *shape).to(dtype) for shape in ((h, p), (g, n), (g, n)))
    dt, A, S = F.softplus(torch.randn(b, l, h) - 2), -torch.logspace(-2, 1.2, h), torch.randn(b, h, p, n)
    return [t.to(device) for t in (x, dt.to(wide), A.to(wide), B, C) + ((S.to(wide),) if init else ())]


def results(scan, inputs, loss="both"):
    """{name: y, final_state and all gradients of a random weighting of y, of final_state, or of both}"""
    inputs = [t.detach().requires_grad_() for t in inputs]
    torch.use_deterministic_algorithms(
        True, warn_only=True
    )  # fills torch.empty with NaN: what is not written shows
    y, S = scan(*inputs)
    torch.manual_seed(1)
    total = sum(
        (t * torch.randn(t.shape).to(t)).sum() for t in {"y": [y], "state": [S], "both": [y, S]}[loss]
    )
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    torch.use_deterministic_algorithms(False)
    return dict(zip(NAMES, (y, S, *grads)))


def check_scan(scan, inputs, limit, loss="both"):
    """All results and gradients against those of the recurrence in float64. dA, a sum over all tokens, gets twice as much."""
    reference, out = results(ssd_loop, [t.double() for t in inputs], loss), results(scan, inputs, loss)
    assert out["y"].dtype == inputs[0].dtype and out["final_state"].dtype == inputs[1].dtype
    for name, r in reference.items():
        if r is not None or out[name] is not None:
            error = relative_error(torch.zeros_like(out[name]) if r is None else r, out[name])
            assert error < limit * (2 if name == "dA" else 1), (name, error)


def test_loop_is_the_sum_written_out():
    """The reference itself: S_t = what is left of S + sum over s <= t of exp(A (dt_s+1 + ... + dt_t)) dt_s x_s B_s^T."""
    x, dt, A, B, C, S = inputs = scan_inputs(7, b=1, h=2, g=1)
    y, final = ssd_loop(*inputs)
    for head in range(2):
        for t in range(7):
            state = torch.exp(A[head] * dt[0, : t + 1, head].sum()) * S[0, head]
            for s in range(t + 1):
                decay = torch.exp(A[head] * dt[0, s + 1 : t + 1, head].sum())
                state = state + decay * dt[0, s, head] * torch.outer(x[0, s, head], B[0, s, 0])
            assert_close(y[0, t, head], state @ C[0, t, 0], rtol=1e-9, atol=1e-12)
        assert_close(final[0, head], state, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("l", [1, 3, 63, 64, 65, 200, 131])
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize("init", [True, False], ids=["init", "zero"])
@pytest.mark.parametrize("loss", ["y", "state", "both"])
def test_chunked_equals_loop(l, g, init, loss):
    """y, the final state and all six gradients of the chunked scan are those of the recurrence."""
    check_scan(ssd_chunked, scan_inputs(l, g=g, init=init), 1e-10, loss)


@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunked_is_accurate_in_low_precision(dtype, limit):
    """In float32 and bfloat16, over 16 chunks, against the recurrence in float64 on the same numbers."""
    check_scan(partial(ssd_chunked, chunk=32), scan_inputs(500, dtype), limit)


@pytest.mark.parametrize("argument, value, message", [
    (1, torch.zeros(2, 5, 3), "dt"), (2, torch.zeros(3), "A"), (3, torch.zeros(2, 5, 3, 16), "B"),
    (4, torch.zeros(2, 5, 2, 8), "C"), (5, torch.zeros(2, 4, 16, 8), r"init_state.*\(2, 4, 8, 16\)"),
    (5, torch.zeros(2, 4, 8, 16, dtype=torch.float16), "init_state"), (6, 48, "chunk"), (7, "cuda", "backend"),
    (0, torch.zeros(2, 0, 4, 8), "x"), (0, torch.zeros(2, 5, 4, 8, dtype=torch.int64), "x"),
])  # fmt: skip
def test_scan_names_the_argument_that_does_not_fit(argument, value, message):
    """Nothing is ignored or guessed: a wrong shape, dtype or setting is a ValueError that names it."""
    arguments = [*scan_inputs(5, torch.float32), 64, None]
    arguments[argument] = value
    with pytest.raises(ValueError, match=f"ssd: .*{message}"):
        ssd(*arguments)


# ----------------------------------------------------------------------------------------------------------------------
# The scan in Triton, and both together

needs_triton = pytest.mark.skipif(scan_kernel.triton is None, reason="triton is not installed")
# The interpreter (3.5 to 3.9) computes with the raw 16 bits of bfloat16. So bfloat16 is tested on a GPU only; its evidence
# elsewhere is float16, the same code with another type, and the compile test.
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3} | ({torch.bfloat16: 1e-2} if GPU else {})
triton16 = partial(ssd, chunk=16, backend="triton")


def triton_inputs(l, dtype=torch.float32, p=16, n=16, g=1, b=2, h=2, init=True):
    x, dt, A, *rest = scan_inputs(l, dtype, b, h, p, g, n, init, "cuda" if GPU else "cpu")
    return [x, dt, A.clamp(max=-1), *rest]


@needs_triton
@pytest.mark.parametrize("dtype, l, sizes, loss, chunk", [
    *((dtype, l, {"g": 2}, "both", 16) for l in (1, 15, 16, 17, 63, 65, 100, 131) for dtype in LIMITS),
    *((torch.float32, 37, {"h": 3, "init": i}, loss, 16) for i in (True, False) for loss in ("y", "state", "both")),
    *((dtype, chunk + 9, {"p": p, "n": n, "b": 1}, "both", chunk) for dtype in LIMITS for p, n, chunk in
      ((64, 128, 64), (64, 128, 128), (128, 256, 32), (32, 64, 16), (16, 32, 1))),
    *((torch.bfloat16, 1000, {"p": p, "n": n, "g": g, "h": 8}, "both", chunk) for p, n, g, chunk in
      ((64, 128, 1, 64), (128, 256, 2, 64), (32, 128, 1, 32)) if GPU),
])  # fmt: skip
def test_triton_matches_loop(dtype, l, sizes, loss, chunk):
    """y, final_state and every gradient are the recurrence's: at any length, also no multiple of the chunk, in two groups;
    from a loss on y, on final_state or both, with and without an initial state, heads sharing B and C; in each row of the
    table of settings, at every chunk size, with tiles smaller than p and n; on a GPU, at the sizes of real models."""
    check_scan(partial(triton16, chunk=chunk), triton_inputs(l, dtype, **sizes), LIMITS[dtype], loss)


@needs_triton
def test_triton_takes_views_into_one_projection_and_other_strides():
    """x, B and C as slices of one tensor, as the model passes them, and as transposed tensors."""
    x, dt, A, B, C, S = triton_inputs(40)
    packed = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
    x, B, C = (t.unflatten(2, (-1, 16)) for t in packed.split((32, 16, 16), dim=2))
    check_scan(triton16, (x, dt, A, B, C, S), 1e-5)
    check_scan(triton16, [t.mT.contiguous().mT if t.dim() > 1 else t for t in (x, dt, A, B, C, S)], 1e-5)


@needs_triton
def test_triton_gives_equal_bits_and_compiles_into_one_graph():
    """Twice the same bits; torch.compile(fullgraph=True) sees one operator: same results and gradients, final_state's too."""
    compiled = torch.compile(triton16, fullgraph=True, backend="inductor" if GPU else "aot_eager")
    for loss in ("both", "state"):
        once, again, out = (results(scan, triton_inputs(33), loss) for scan in (triton16, triton16, compiled))
        same = [name for name in NAMES if once[name] is not None]
        assert len(same) > 4 and all(torch.equal(once[name], again[name]) for name in same)
        assert all(relative_error(once[name], out[name]) < 1e-6 for name in same)


def run_python(*command, folder=ROOT):
    """Standard output of a process without the interpreter and without a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=env, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_triton
def test_triton_refuses_by_name():
    """What the kernels cannot take is a ValueError that names the argument; left to choose, ssd takes torch for it."""
    for inputs, message in (
        (triton_inputs(4, p=8), "p of x should be 16, "),
        (triton_inputs(4, n=8), "n of B should be 16, "),
        (triton_inputs(4, torch.float64), "x should be 32 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            triton16(*inputs)
        ssd(*inputs)
    code = "import torch, scan_kernel as s; print(s.why_not_triton(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 16)))"
    assert "backend" in run_python("-c", code), "without the interpreter a CPU cannot run the kernels"


@needs_triton
def test_triton_offsets_past_2_31_elements():
    """Rows of x further than 2^31 elements from the first. On its own: a wrong offset would end the process."""
    run_python("-c", "import test_all; test_all.far_rows()")


def far_rows():
    row = 2**27 + 16  # elements; the last row lies past 2^31, and memory that is never touched takes no room
    x, *rest = triton_inputs(17, torch.float16, b=1)
    far = torch.empty(17 * row, dtype=torch.float16).as_strided(x.shape, (17 * row, row, 16, 1))
    check_scan(triton16, (far.copy_(x), *rest), LIMITS[torch.float16])


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here():
    """bf16, p 64, n 128, chunk 64: no spills on sm_80 and sm_90, a tensor-core instruction for every product, shared
    memory that consumer GPUs have; fp32: no product rounded to tf32."""
    command = "results/kernel_report.py --compile --shapes small --targets sm_80 sm_90 gfx942"
    rows = json.loads(run_python(*command.split()).splitlines()[-1])["kernels"]
    assert len(rows) == 2 * 3 * 5
    for row in rows:
        assert row["shared"] <= (65536 if row["target"] == "gfx942" else 101376), row
        assert row["tf32"] == 0, row
        if row["dtype"] == "bf16":
            assert row["tensor_ops"] >= row["products"], row
            assert row["spilled"] == 0 or row["target"] == "gfx942", row


@pytest.mark.parametrize("dtA", [-1e6, -50.0, -5.0, -1e-6, -0.0])
@pytest.mark.parametrize("scan", [ssd_chunked, pytest.param(partial(triton16, chunk=64), marks=needs_triton)])
def test_extreme_decays_stay_finite(scan, dtA):
    """Heads that forget within a token, or never, make neither NaN nor infinity, forward or backward."""
    x, dt, A, B, C, S = triton_inputs(130, g=2)
    inputs = x, torch.ones_like(dt), torch.full_like(A, dtA), B, C, S
    reference, out = results(ssd_loop, inputs), results(scan, inputs)
    for name, r in reference.items():
        assert torch.isfinite(out[name]).all(), name
        if name not in ("ddt", "dA") or dtA > -1:  # these two are then small differences of large sums
            assert relative_error(r, out[name]) < 1e-4, name


def in_segments(scan, x, dt, A, B, C, state, cuts):
    """The scan of what lies between the cuts, one part after the other, with the state carried."""
    ys = []
    for x_part, dt_part, B_part, C_part in zip(*(t.tensor_split(cuts, dim=1) for t in (x, dt, B, C))):
        y, state = scan(x_part, dt_part, A, B_part, C_part, state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


@pytest.mark.parametrize("seed", range(100 if LONG else 5))
@pytest.mark.parametrize(
    "scan", [ssd_loop, partial(ssd_chunked, chunk=16), pytest.param(triton16, marks=needs_triton)]
)
def test_laws_of_the_scan(scan, seed):
    """At random sizes: linear in x and the state, both at once; dt = 0 writes and forgets nothing; permuted heads, parts of
    the batch and segments of the sequence (cut anywhere, a token's length too) give the same numbers."""
    draw, same = random.Random(seed), partial(assert_close, atol=2e-4, rtol=1e-4)
    b, l, g, r = draw.randint(1, 3), draw.randint(2, 50), draw.choice([1, 2]), draw.randint(1, 3)
    x, dt, A, B, C, S = triton_inputs(l, g=g, b=b, h=g * r)
    y, final = scan(x, dt, A, B, C, S)
    x2, S2 = torch.randn_like(x), torch.randn_like(S)
    y2, final2 = scan(x2, dt, A, B, C, S2)
    same(scan(2 * x - x2, dt, A, B, C, 2 * S - S2), (2 * y - y2, 2 * final - final2))
    only_read = torch.einsum("bhpn,blhn->blhp", S, C.repeat_interleave(r, dim=2))
    same(scan(x, torch.zeros_like(dt), A, B, C, S), (only_read, S))
    heads = torch.cat([i * r + torch.randperm(r) for i in range(g)]).to(x.device)  # within their group
    same(
        scan(x[:, :, heads], dt[:, :, heads], A[heads], B, C, S[:, heads]), (y[:, :, heads], final[:, heads])
    )
    same(scan(x[-1:], dt[-1:], A, B[-1:], C[-1:], S[-1:]), (y[-1:], final[-1:]))
    cuts = sorted(draw.sample(range(1, l), draw.randint(1, min(3, l - 1))))
    same(in_segments(scan, x, dt, A, B, C, S, cuts), (y, final))


@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_a_carried_state_does_not_drift(dtype, limit):
    """100,000 tokens (10 million with LONG=1) in segments of random lengths: the state at the end is that of the recurrence
    in float64 over the last tokens that matter, for heads that forget within a token to those that take thousands."""
    l, draw, A = 10**7 if LONG else 10**5, random.Random(0), torch.tensor([-16.0, -1.0, -0.1, -0.02])
    ends = itertools.accumulate(draw.choices([1, 2, 63, 64, 65, 1000, 4096], k=l))
    x, B, C = (torch.randn(1, l, *shape).to(dtype) for shape in ((4, 3), (1, 5), (1, 5)))
    dt = F.softplus(torch.randn(1, l, 4) - 2)
    _, state = in_segments(
        ssd_chunked, x, dt, A, B, C, None, list(itertools.takewhile(lambda end: end < l, ends))
    )
    x, dt, B, C = (t[:, -10_000:].double() for t in (x, dt, B, C))  # exp(-0.02 * 0.2 * 10,000) is 1e-17
    _, reference = ssd_loop(x, dt, A.double(), B, C)
    for head in range(4):
        assert relative_error(reference[:, head], state[:, head]) < limit


# ----------------------------------------------------------------------------------------------------------------------
# The model


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    shape = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 8, "chunk": 16, "A_init": "log",
             "A_init_range": (0.01, 16), "ngroups": 2}  # fmt: skip
    return Mamba2LM(Mamba2Config(**shape | changes)).double()


def random_ids(b, l, seed=0):
    return torch.randint(61, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [[1, 50], [3, 4, 70], [32, 64], [2, 3]])
def test_segments_equal_one_pass(cuts):
    """Cut anywhere, with the state carried, a text has the same logits at every position and the same gradients."""
    model, idx = tiny_model(), random_ids(2, 77)
    weights = torch.randn(2, 77, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, _, whole_state = model(idx)
    gradients = torch.autograd.grad((whole * weights).sum(), model.parameters())
    state, parts = None, []
    for part in idx.tensor_split(cuts, dim=1):
        logits, _, state = model(part, state=state)
        parts.append(logits)
    parts = torch.cat(parts, dim=1)
    found = parts, state, torch.autograd.grad((parts * weights).sum(), model.parameters())
    assert_close(found, (whole, whole_state, gradients), rtol=1e-10, atol=1e-10)


def test_step_equals_forward():
    """Token by token, in constant time and blind to what follows, the logits and the state are the parallel form's; and
    generate, at temperature 0, picks what that finds likeliest."""
    model, idx = tiny_model(), random_ids(2, 20)
    whole, _, whole_state = model(idx)
    logits, state = [], model.zero_state(2)
    for token in idx.unbind(1):
        out, state = model.step(token, state)
        logits.append(out)
    assert_close((torch.stack(logits, dim=1), state), (whole, whole_state), rtol=1e-10, atol=1e-11)
    out = model.generate(idx, 12, temperature=0)
    for _ in range(12):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, idx[:, 20:])


@torch.no_grad()
def test_two_threads_compute_what_one_does():
    """The logits are the same from one thread and from two."""
    model, idx, threads = tiny_model().float(), random_ids(4, 300), torch.get_num_threads()
    logits = []
    for n in (1, 2):
        torch.set_num_threads(n)
        logits.append(model(idx)[0])
    torch.set_num_threads(threads)
    assert relative_error(*logits) < 1e-6


def test_sliced_loss_equals_whole(monkeypatch):
    """per_token_nll in slices of the logits: the same losses and gradients as cross-entropy on all of them."""
    model, idx = tiny_model(), random_ids(3, 41)
    weights = torch.rand(3, 40, dtype=torch.float64)
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 61 * 7)
    whole = F.cross_entropy(model(idx[:, :-1])[0].float().transpose(1, 2), idx[:, 1:], reduction="none")
    sliced, _ = model.per_token_nll(idx[:, :-1], idx[:, 1:])
    assert relative_error(whole, sliced) < 1e-6, "nll"
    gradients = (
        torch.autograd.grad((nll * weights).sum(), model.lm_head.weight)[0] for nll in (whole, sliced)
    )
    assert relative_error(*gradients) < 1e-5, "gradient"


def test_parameters_are_the_official_ones():
    """Names and shapes of mamba_ssm's MambaLMHeadModel with Mamba-2 layers (d_inner 64, conv_dim 64 + 2 x 2 x 16)."""
    shapes = {name: tuple(t.shape) for name, t in tiny_model(n_layer=1).state_dict().items()}
    layer = "backbone.layers.0."
    assert shapes == {
        "backbone.embedding.weight": (61, 32), layer + "norm.weight": (32,), layer + "mixer.dt_bias": (8,),
        layer + "mixer.A_log": (8,), layer + "mixer.D": (8,), layer + "mixer.in_proj.weight": (64 + 128 + 8, 32),
        layer + "mixer.conv1d.weight": (128, 1, 4), layer + "mixer.conv1d.bias": (128,),
        layer + "mixer.norm.weight": (64,), layer + "mixer.out_proj.weight": (32, 64),
        "backbone.norm_f.weight": (32,), "lm_head.weight": (61, 32),
    }  # fmt: skip


def test_initialisation():
    """dt within [dt_min, dt_max]; A log-uniform with one head in each of h equal parts, for every seed."""
    for seed in range(5):
        mixer = tiny_model(seed).backbone.layers[0].mixer
        dt, A = F.softplus(mixer.dt_bias), mixer.A_log.exp()
        assert 0.99e-3 <= dt.min() and dt.max() <= 0.101
        part = (A / 0.01).log() / math.log(16 / 0.01) * 8
        assert part.floor().long().tolist() == list(range(8))


def test_config_says_what_is_wrong():
    """An impossible configuration is a ValueError that names the field."""
    for field, value in {"headdim": 7, "ngroups": 3, "chunk": 0, "A_init_range": (0, 1), "dt_min": 1}.items():
        with pytest.raises(ValueError, match=field):
            tiny_model(**{field: value})


# ----------------------------------------------------------------------------------------------------------------------
# The data

TEXT = "".join(f"def f_{i}(x):\n    return x + {i * 7919 % 1000}  # é 日本\n\n" for i in range(1500))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder of its own as the current one, with a text of about 75 KB. Training here installs no signal handlers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    Path("a text.txt").write_text(TEXT, encoding="utf-8")


def test_tokenizers_are_lossless():
    """decode(encode(s)) == s for random Unicode, with the text of the separator in it; N ids, the separator the last."""
    rng = random.Random(0)
    for spec, size in (("byte", 257), ("bpe300", 300)):
        tokenizer = data.make_tokenizer(spec, [TEXT])
        assert tokenizer.n_vocab == size and tokenizer.encode_single_token(data.SEPARATOR) == size - 1
        for _ in range(200):
            characters = (
                chr(rng.randrange(end)) for end in rng.choices([0x80, 0xD800, 0x110000], k=rng.randrange(60))
            )
            string = "".join(characters).encode(errors="ignore").decode()  # without surrogates
            string += rng.choice(["", data.SEPARATOR, "    \n\t  x\r\n"])
            ids = tokenizer.encode_ordinary(string)
            assert tokenizer.decode(ids) == string and size - 1 not in ids


def test_bpe_merges_the_most_frequent_pair():
    """The learnt tokens, against pairs counted again from scratch after each merge."""
    counted = Counter(re.findall(data.PATTERN, TEXT))
    words = [[bytes([byte]) for byte in word.encode()] for word in counted.elements() if counted[word] > 1]
    ranks = data.train_bpe([TEXT], 256 + 30 + 1)
    for token in sorted((t for t in ranks if len(t) > 1), key=ranks.get):
        pairs = Counter(pair for word in words for pair in map(bytes.__add__, word, word[1:]))
        assert pairs[token] == max(pairs.values())
        for word in words:
            for j in range(len(word) - 1, 0, -1):
                if j < len(word) and word[j - 1] + word[j] == token:
                    word[j - 1 : j + 1] = [token]


def test_corpus_is_prepared_once_and_damage_is_found(work, monkeypatch):
    """Two processes prepare it at once, and leave whole files and nothing else, which are used from then on; a file that is
    cut or has one flipped bit is refused in a line."""
    command = [sys.executable, ROOT / "data.py", "--dataset=a text.txt", "--tokenizer=bpe300"]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0] and len(list(Path("data").glob("*/*"))) == 3
    monkeypatch.setattr(data, "train_bpe", None)
    corpus, cut = data.load_corpus("a text.txt", "bpe300"), len(TEXT) * 4 // 5
    texts = [corpus.tokenizer.decode(ids.tolist()) for ids in (corpus.train, corpus.val)]
    assert texts == [TEXT[:cut] + data.SEPARATOR, TEXT[cut:] + data.SEPARATOR]
    path = next(Path("data").rglob("*-val-*.npy"))
    content = path.read_bytes()
    for damaged in (content[:-2], content[:-1] + bytes([content[-1] ^ 1]), content[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged"):
            data.load_corpus("a text.txt", "bpe300")


def test_dataset_from_an_address(work):
    """A text, .gz and .zip from a server; one that breaks off, is not there or is no .gz leaves nothing behind."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        """Serves the current folder, and promises more of cut.txt than there is."""

        def send_header(self, name, value):
            cut = self.path == "/cut.txt" and name == "Content-Length"
            super().send_header(name, int(value) + 1000 if cut else value)

    for name in ("cut.txt", "bad.gz"):
        shutil.copy("a text.txt", name)
    Path("text.gz").write_bytes(gzip.compress(TEXT.encode()))
    with zipfile.ZipFile("text.zip", "w") as archive:
        archive.writestr("readme", "short")
        archive.write("a text.txt")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        for name in ("a%20text.txt", "text.gz", "text.zip"):
            assert list(data.read_documents(f"{address}/{name}").values()) == [TEXT]
        Path("text.gz").unlink()  # the download is kept: the server is not asked again
        assert (
            data.load_corpus(f"{address}/text.gz", "byte").train.size
            == len(TEXT[: len(TEXT) * 4 // 5].encode()) + 1
        )
        before = sorted(Path("data/downloads").iterdir())
        for name in ("cut.txt", "none.txt", "bad.gz"):
            with pytest.raises(ValueError, match="needs no internet"):
                data.read_documents(f"{address}/{name}")
        assert sorted(Path("data/downloads").iterdir()) == before
        server.shutdown()
    with pytest.raises(ValueError, match="needs no internet"):
        data.read_documents(f"{address}/other.txt")


def test_tasks_have_the_right_answer():
    """copy: the letters again; passkey: the number hidden at the asked depth; documents hold both, and fit T = 32."""
    random = np.random.default_rng(1)
    prompt, answer = data.make_sample("copy", 9, random)
    assert re.fullmatch("[a-z]{9}>", prompt) and answer == prompt[:9]
    text = "".join(chr(200 + i) for i in range(1000))
    for depth, size in itertools.product((0, 0.5, 1), (0, 40)):
        prompt, answer = data.make_sample("passkey", size, random, text, depth)
        before, hidden, after = re.fullmatch(r"(.*)\n# key( \d{5})\n(.*)\n# key", prompt).groups()
        assert hidden == answer and before + after in text
        assert len(before) == depth * size and len(before + after) == size
    documents = data.read_documents("copy")
    assert len(set(documents.values())) > 190_000 and max(map(len, documents.values())) == 31


@torch.no_grad()
@pytest.mark.parametrize("late", [0, 40])
def test_recall_counts_right_answers(late):
    """A model that knows the answers scores 1, one that says something else next to nothing, at each size that fits."""

    class Oracle:
        """Its "hidden" are the logits of what was said (a prompt's length and one) before."""

        lm_head = torch.nn.Identity()
        lm_head.weight = torch.empty(0)

        def hidden(self, idx):
            return F.one_hot(idx.roll(idx.shape[1] // 2 + late), 257).float(), None

    corpus = data.Corpus("copy", "", data.make_tokenizer("byte", []), None, None, 1.0)
    rows = eval_long.recall(Oracle(), corpus, range(64), 130, 8, NO_BAR)
    assert [row["to"] for row in rows] == [31, 61, 121]
    assert rows[-1]["accuracy"] < 0.2 if late else all(row["accuracy"] == 1 for row in rows)


def test_held_out_documents_are_not_trained_on():
    """A fifth of the files of a folder, whichever order they come in; of a single file, its end."""
    documents = {f"{i}.txt": f"text {i}" for i in range(50)}
    train_texts, val_texts = data.split_documents(documents)
    assert len(val_texts) == 10 and sorted(train_texts + val_texts) == sorted(documents.values())
    assert data.split_documents(dict(reversed(documents.items())))[1][::-1] == val_texts
    assert data.split_documents({"a": "0123456789"}) == (["01234567"], ["89"])


def test_batches():
    """Targets are the next tokens; a step's batch depends on seed and step only; tbtt's streams continue."""
    tokens = np.arange(1000, dtype=np.uint16)
    for windows in (data.random_windows, data.next_windows):
        batch = windows(tokens, 4, 10, 3, 5)
        assert batch.shape == (4, 11) and ((batch[:, 1:] - batch[:, :-1]) % 1000 == 1).all()
        assert (batch == windows(tokens, 4, 10, 3, 5)).all() and (batch != windows(tokens, 4, 10, 4, 5)).any()
    for step in range(200):  # through the end of the text too
        batch, following = (data.next_windows(tokens, 4, 10, 3, step + i) for i in range(2))
        assert (batch[:, -1] == following[:, 0]).all()
    assert len(set(data.next_windows(tokens, 4, 10, 3, 0)[:, 0].tolist())) == 4


# ----------------------------------------------------------------------------------------------------------------------
# The initial states


def initial_state(mode, **changes):
    args = {"init_state": mode, "seed": 0, "noise_std": 0.3, "init_prob": 1.0} | changes
    return train.InitialState(args, torch.device("cpu"))


def test_noise_has_the_asked_standard_deviation():
    """Noise: mean 0, standard deviation noise_std, another one each step; init_prob of the sequences get it."""
    model = tiny_model()
    state = initial_state("noise").draw(model, 64, 0)
    assert all(conv is None and abs(ssm.std() - 0.3) < 0.01 and abs(ssm.mean()) < 0.01 for conv, ssm in state)
    assert (initial_state("noise").draw(model, 64, 1)[0][1] != state[0][1]).any()
    for _, ssm in initial_state("noise", init_prob=0.75).draw(model, 8, 0):
        assert (ssm.abs().amax((1, 2, 3)) > 0).tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize("mode", ["prev", "tbtt"])
def test_carried_states(mode):
    """First zeros, then the previous step's final state, detached; tbtt also takes its convolution. zero takes nothing."""
    model, init, zero = tiny_model(), initial_state(mode), initial_state("zero")
    assert all((ssm == 0).all() for _, ssm in init.draw(model, 2, 0))
    _, _, final = model(random_ids(2, 16))
    assert init.observe(final) == zero.observe(final) == 0 and zero.draw(model, 2, 1) is None
    for (conv, ssm), (final_conv, final_ssm) in zip(init.draw(model, 2, 1), final):
        assert (ssm == final_ssm).all() and not ssm.requires_grad
        assert conv is None if mode == "prev" else (conv == final_conv).all() and not conv.requires_grad


def test_fitted_noise_has_the_moments_of_final_states():
    """Fitted: for each layer and head the mean and standard deviation of final states from zero."""
    model, init = tiny_model().float(), initial_state("fitted")
    with torch.no_grad():
        final = [model.hidden(random_ids(8, 16, seed=i))[1] for i in range(20)]
    for i, state in enumerate(final):
        init.fit(state, 1 / (i + 1))
    drawn = init.draw(model, 500, 0)
    for layer in range(2):
        seen = torch.cat([state[layer][1] for state in final]).transpose(0, 1).flatten(1)  # (h, all numbers)
        made = drawn[layer][1].transpose(0, 1).flatten(1)
        assert_close(made.std(1), seen.std(1), rtol=0.05, atol=0)
        assert ((made.mean(1) - seen.mean(1)).abs() < 0.05 * seen.std(1)).all()


# ----------------------------------------------------------------------------------------------------------------------
# Training, resuming

SIZES = {"d_model": 16, "n_layer": 2, "d_state": 8, "headdim": 8, "chunk": 8, "seq_len": 8, "batch_size": 4}
SMALL = [*(f"--{name}={size}" for name, size in SIZES.items()), "--dataset=a text.txt", "--tokenizer=byte", "--device=cpu",
         "--log_every=2", "--val_every=100"]  # fmt: skip


def exit_code(main, *argv):
    """What the script would end with."""
    try:
        return main(list(map(str, argv))) or 0
    except SystemExit as stop:
        return stop.code


def run_train(*flags):
    return exit_code(train.main, *SMALL, *flags)


def evaluate(*flags):
    return exit_code(eval_long.main, *flags)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def weights(run):
    return torch.load(f"{run}/ckpt.pt", weights_only=True)["model"]


def assert_same_weights(run, other):
    assert_close(weights(run), weights(other), rtol=0, atol=0)


@pytest.mark.parametrize("mode, compiled", [*((mode, "off") for mode in train.INIT_STATES), ("prev", "on")])
def test_resumed_run_equals_uninterrupted_one(work, mode, compiled, monkeypatch):
    """Killed in step 8, resumed from the checkpoint of step 6: the weights and the log are those of an undisturbed run."""
    flags = [
        f"--init_state={mode}",
        "--init_prob=0.7",
        "--steps=12",
        "--save_every=3",
        f"--compile={compiled}",
    ]
    assert run_train(*flags, "--out=whole") == 0
    rate = train.learning_rate
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(
            train, "learning_rate", lambda step, args: rate(step, args) if step < 7 else 1 / 0
        )  # power cut
        run_train(*flags, "--out=cut")
    with open("cut/log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a line cut short
    assert run_train("--out=cut", "--resume") == 0
    assert_same_weights("cut", "whole")
    logs = [
        [{**row, "ms_per_step": 0, "tokens_per_s": 0} for row in read_jsonl(f"{run}/log.jsonl")]
        for run in ("whole", "cut")
    ]
    assert logs[0] == logs[1] and [row["step"] for row in logs[0]] == [2, 4, 6, 8, 10, 12]
    assert run_train("--out=cut", "--resume") == 0  # finished: says so


@pytest.mark.parametrize("mode", train.INIT_STATES if LONG else ["tbtt"])
def test_interrupted_at_any_moment(work, mode):
    """kill -9, SIGTERM, Ctrl-C and Ctrl-C twice, at random moments from the first import and the preparation of the corpus
    on: the next call goes on, and the weights at the end are those of a run that was left alone, bit for bit."""
    flags = [
        f"--init_state={mode}",
        "--steps=800",
        "--save_every=20",
        "--val_every=800",
        "--tokenizer=bpe300",
    ]
    command = [sys.executable, ROOT / "train.py", *SMALL, *flags, "--out=cut"]
    draw, codes, resume = random.Random(0), [], lambda: ["--resume"][: Path("cut/ckpt.pt").exists()]
    for i in range(20 if LONG else 6):
        process = subprocess.Popen(
            [*command, *resume()], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        signals = [[signal.SIGKILL], [signal.SIGTERM], [signal.SIGINT], [signal.SIGINT, signal.SIGINT]][i % 4]
        try:
            process.wait(draw.uniform(0.3, 4))
        except subprocess.TimeoutExpired:
            for number in signals:
                process.send_signal(number)
                time.sleep(0.01)
        errors = process.communicate()[1]
        codes.append(process.returncode)
        assert "Error" not in errors, errors
    assert sum(code != 0 for code in codes) > 2  # the others were finished
    assert run_train(*flags, "--out=cut", *resume()) == run_train(*flags, "--out=whole") == 0
    assert_same_weights("cut", "whole")


def damaged(content, i):
    """The i-th copy: one in four is cut, the others have one flipped bit, at a random place."""
    draw = random.Random(i)
    place = draw.randrange(len(content))
    flipped = bytes([content[place] ^ 1 << draw.randrange(8)])
    return content[:place] + (flipped + content[place + 1 :] if i % 4 else b"")


def test_damaged_checkpoints_are_found(work):
    """200 copies, each cut or with one bit flipped: an error of one line, or the same weights (the bit was padding)."""
    assert run_train("--init_state=prev", "--steps=1") == 0
    good, expected, found = Path("out/prev/ckpt.pt").read_bytes(), weights("out/prev"), 0
    for i in range(200):
        Path("damaged.pt").write_bytes(damaged(good, i))
        try:
            assert_close(load_run("damaged.pt")[0].state_dict(), expected, rtol=0, atol=0)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 150


def test_files_from_elsewhere_are_refused_by_name(work, capsys):
    """A checkpoint that would run code, one with other weights than it says, and a tokenizer that is damaged, or another
    run's: exit code 2 and one line with the name of what is wrong, from training and from evaluation."""
    assert run_train("--init_state=prev", "--steps=1") == 0
    checkpoint, path = torch.load("out/prev/ckpt.pt", weights_only=True), Path("out/prev/tokenizer.json")

    def refused(reason):
        for run, *flags in ((run_train, "--init_from=out/prev", "--out=new"), (evaluate, "out/prev")):
            code, error = run(*flags), capsys.readouterr().err
            assert code == 2 and reason in error and error.count("\n") == 1, error
        assert not Path("new").exists() and not Path("out/eval").exists()

    name, weight = "backbone.layers.1.mixer.D", checkpoint["model"]["backbone.layers.1.mixer.D"]
    for reason, changes in (
        ("it holds re._compile", {"optimizer": re.compile("")}),  # pickled as a call
        (name, {"model": {key: t for key, t in checkpoint["model"].items() if key != name}}),
        (name + "x", {"model": checkpoint["model"] | {name + "x": weight}}),
        (name, {"model": checkpoint["model"] | {name: weight[:1]}}),
        (name, {"model": checkpoint["model"] | {name: weight / 0 * 0}}),
        ("headdim", {"config": checkpoint["config"] | {"headdim": 7}}),
    ):
        torch.save(checkpoint | changes, "out/prev/ckpt.pt")
        refused(reason)
    torch.save(checkpoint, "out/prev/ckpt.pt")
    good = path.read_bytes()
    for i in range(LONG * 200 + 30):
        path.write_bytes(damaged(good, i))
        refused("tokenizer")
    assert run_train("--out=third", "--steps=1", "--tokenizer=bpe300") == 0
    shutil.copy("third/tokenizer.json", path)
    refused("tokenizer")


def test_full_disk_keeps_the_last_checkpoint(work):
    """A checkpoint that cannot be written whole: one line that names it, the one before stays, and training goes on later."""
    resource = pytest.importorskip("resource")  # not on Windows
    flags = ["--init_state=prev", "--steps=6", "--save_every=2"]
    assert run_train(*flags, "--out=whole") == 0
    limit = int(
        0.9 * Path("whole/ckpt.pt").stat().st_size
    )  # the first checkpoint, without Adam's moments, is smaller
    command = [sys.executable, ROOT / "train.py", *SMALL, *flags]
    result = subprocess.run(command, capture_output=True, text=True, check=False,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))  # fmt: skip
    last = result.stderr.splitlines()[-1]
    assert (
        result.returncode == 1 and "ckpt.pt could not be written" in last and "Traceback" not in result.stderr
    )
    assert load_run("out/prev")[1]["step"] == 0 and sorted(Path("out/prev").glob(".*")) == []
    assert run_train("--out=out/prev", "--resume") == 0
    assert_same_weights("out/prev", "whole")


def test_modes_differ_in_the_initial_state_only(work):
    """One seed: zero and prev begin with the same loss, so with the same weights and batch, and part in the second step;
    noise and fitted differ from the first."""
    rows = {}
    for mode in ("zero", "noise", "fitted", "prev"):
        assert run_train(f"--init_state={mode}", "--steps=2", "--log_every=1") == 0
        rows[mode] = [row["loss"] for row in read_jsonl(f"out/{mode}/log.jsonl")]
    assert rows["zero"][0] == rows["prev"][0]
    assert len({rows[mode][0] for mode in ("zero", "noise", "fitted")}) == 3
    assert rows["zero"][1] != rows["prev"][1]


def test_fitted_does_not_run_away(work):
    """200 steps of fitted noise, with heads that forget almost nothing: the noise stays as large as states from zero."""
    flags = [
        "--init_state=fitted",
        "--steps=200",
        "--A_init_range",
        "0.0001",
        "0.01",
        "--val_every=200",
        "--lr=1e-4",
    ]
    assert run_train(*flags) == 0
    model, checkpoint = load_run("out/fitted")
    with torch.no_grad():
        tokens = data.load_corpus("a text.txt", "byte").train
        _, final = model.hidden(data.random_windows(tokens, 64, 8, 0, 0)[:, :-1])
    for layer, (_, ssm) in enumerate(final):
        fitted = checkpoint["init_state"]["square"][layer].sqrt()
        assert_close(fitted, ssm.square().mean((0, 2, 3)).sqrt(), rtol=0.3, atol=1e-3)


def test_post_training_takes_over_the_architecture(work, capsys):
    """--init_from: the other run's weights, architecture and T; that run stays as it is. A path to its ckpt.pt will do."""
    assert run_train("--init_state=zero", "--steps=4") == 0
    before = Path("out/zero/ckpt.pt").read_bytes()
    assert not train.main(["--init_from=out/zero/ckpt.pt", "--init_state=prev", "--steps=2", "--lr=0"])
    assert Path("out/zero/ckpt.pt").read_bytes() == before
    assert_same_weights("out/prev", "out/zero")  # lr is 0
    assert load_run("out/prev")[1]["args"]["seq_len"] == 8
    for flag in ("--seq_len=16", "--tokenizer=auto"):
        assert exit_code(train.main, "--init_from=out/zero", "--out=other", flag) == 2
        assert f"{flag} contradicts" in capsys.readouterr().err and not Path("other").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("d, layers, T", [(64, 2, 32), (128, 3, 128)])
def test_memory_estimate(d, layers, T, dtype):
    """What is printed before the first step, against the tensors that autograd really keeps: within 30 %."""
    model, kept = (
        Mamba2LM(Mamba2Config(500, d_model=d, n_layer=layers, d_state=128, headdim=32, chunk=32)),
        [],
    )

    def keep(tensor):
        kept.append(tensor)
        return tensor

    idx = torch.randint(500, (4, T))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), \
         torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):  # fmt: skip
        model(idx, idx, model.zero_state(4))
    storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in kept)}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for address, size in storages.items() if address not in own)
    assert 0.7 < train.estimate_memory(model.config, 4, T, 1, dtype)[1] / measured < 1.3


@pytest.mark.parametrize("mode", ["fitted", "tbtt"])
def test_parts_of_a_batch_and_two_processes_equal_one(work, mode, monkeypatch):
    """Within rounding, 1 x 4 rows are the same as 4 x 1 by --grad_accum, and as 2 x 2 by torchrun, stopped and resumed:
    weights, what is remembered, and with two processes the evaluation. One process alone may not resume."""
    flags = [f"--init_state={mode}", "--init_prob=0.75", "--steps=40", "--lr=1e-4", "--dtype=float32"]
    assert run_train(*flags, "--out=one") == run_train(*flags, "--grad_accum=4", "--out=parts") == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        ROOT / "train.py",
    ]
    command = [*launch, *SMALL, *flags, "--batch_size=2", "--out=two", "--save_every=10"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not Path("two/ckpt.pt").exists() or load_run("two")[1]["step"] < 10):
        time.sleep(0.05)
    process.terminate()  # torchrun passes it on: both processes stop after the same step, and save
    process.wait()
    assert run_train("--out=two", "--resume") == 2 or load_run("two")[1]["step"] == 40
    subprocess.run([*launch, "--out=two", "--resume"], check=True, stdout=subprocess.DEVNULL)
    one, two, parts = (load_run(run)[1] for run in ("one", "two", "parts"))
    assert one["tokens"] == two["tokens"] == 40 * 4 * 8 and two["processes"] == 2
    for other in (two, parts):
        assert_close(other["model"], one["model"], atol=1e-5, rtol=1e-4)
        assert_close(other["init_state"], one["init_state"], atol=1e-4, rtol=1e-3)
    assert len(read_jsonl("two/log.jsonl")) == len(read_jsonl("one/log.jsonl"))
    evaluation = ["two", "--max_len=256", "--sequences=4", "--device=cpu"]
    assert evaluate(*evaluation, "--out=ev1") == 0
    command = [*launch[:-1], ROOT / "eval_long.py", *evaluation, "--out=ev2"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    for one, two in zip(read_jsonl("ev1/results.jsonl"), read_jsonl("ev2/results.jsonl"), strict=True):
        for name in ("tokens", "nll", "excess", "excess_se", "window_loss"):
            assert abs(one[name] - two[name]) < 1e-5


def test_rates_of_forgetting_have_their_own_learning_rate(work):
    """--rates_lr=0 holds A and dt_bias and nothing else; 10 moves them about ten times as far as 1 in the first step."""
    assert run_train("--init_state=zero", "--steps=1") == 0
    start, moved = weights("out/zero"), {}
    for times in (0, 1, 10):
        flags = [
            "--init_from=out/zero",
            "--init_state=prev",
            "--steps=1",
            f"--rates_lr={times}",
            f"--out=out/{times}",
        ]
        assert not train.main(flags)
        moved[times] = {
            name: (t - start[name]).abs().max().item() for name, t in weights(f"out/{times}").items()
        }
    for name in start:
        rate = name.endswith(("A_log", "dt_bias"))
        assert moved[1][name] > 0 and (moved[0][name] == 0) == rate
        assert abs(moved[10][name] / moved[1][name] - (10 if rate else 1)) < 0.01


@pytest.mark.parametrize("mode", ["zero", "tbtt"])
def test_steps_that_are_not_finite(work, mode, monkeypatch, capsys):
    """Steps 3 and 5 are skipped and counted: they poison neither weights nor chains, and training ends well. Where all
    are bad, it ends with a message and exit code 1, and the last checkpoint is good."""
    forward, calls = Mamba2LM.forward, []

    def poisoned(self, idx, targets=None, state=None):
        logits, loss, state = forward(self, idx, targets, state)
        if targets is not None and self.training:
            calls.append(0)
            if len(calls) in (3, 5) or len(calls) > 8:
                state[0][1].detach()[1] = math.nan
                loss = loss * math.inf
        return logits, loss, state

    monkeypatch.setattr(Mamba2LM, "forward", poisoned)
    assert run_train(f"--init_state={mode}", "--steps=8", "--lr=1e-3") == 0
    last = read_jsonl(f"out/{mode}/log.jsonl")[-1]
    assert (
        last["skipped"] == 2
        and last["bad_rows"] == (2 if mode == "tbtt" else 0)
        and math.isfinite(last["loss"])
    )
    memory = load_run(f"out/{mode}")[1]["init_state"]
    assert all(torch.isfinite(t).all() for tensors in memory.values() for t in tensors)
    assert run_train(f"--init_state={mode}", "--steps=50", "--save_every=2", "--out=out/bad") == 1
    assert "last checkpoint" in capsys.readouterr().err and load_run("out/bad")[1]["step"] == 0
    state = [(torch.ones(3, 1, 1), torch.ones(3, 1, 1, 1)) for _ in range(2)]
    state[1][1][2] = math.inf
    init = initial_state(mode)
    assert init.observe(state) == (mode == "tbtt")
    assert all(t.flatten().tolist() == [1, 1, 0] for tensors in init.memory.values() for t in tensors)


@pytest.mark.parametrize("flags, message", [
    (["--steps=0"], "argument --steps"), (["--lr=nan"], "argument --lr"), (["--seq_len=7"], "even"), (["--headdim=5"], "headdim"),
    (["--dataset=missing.txt"], "no such file"), (["--tokenizer=bpe"], "--tokenizer"), (["--device=cuda:77"], "--device"),
    (["--init_from=nowhere"], "nowhere"), (["--resume", "--out=nowhere"], "nowhere"), (["--out=full"], "not empty"),
    (["--seq_len=20000"], "less than two windows"), (["--init_prob=1.5"], "argument --init_prob"), (["--stepz=5"], "--stepz"),
    (["--chunk=24"], "chunk"), (["--out=full/thesis.txt/run"], "no folder to write in"),
])  # fmt: skip
def test_bad_input_is_exit_code_2_and_touches_nothing(work, flags, message, capsys):
    """Exit code 2 and a message that names what is wrong, and no file made or changed."""
    data.load_corpus("a text.txt", "byte")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert run_train(*flags) == 2
    assert message in capsys.readouterr().err and sorted(Path().rglob("*")) == before


def test_every_number_refuses_nonsense(work, capsys):
    """Each numeric flag of train.py and eval_long.py, at -1, nan, inf, a word and, but for eval_long's seed, 10^30: exit
    code 2, nothing made. And what would not fit into memory."""
    flags = [action.option_strings[0] for action in train.make_parser()._actions if action.type]
    assert len(flags) > 15 and run_train("--init_state=zero", "--steps=1") == 0
    before, values = sorted(Path().rglob("*")), ("-1", "nan", "inf", "ten", "1" + 30 * "0")
    for flag, value in itertools.product(flags, values):
        more = ["1"] if flag == "--A_init_range" else []
        assert run_train("--out=other", flag, value, *more) == 2, (flag, value)
    for flag, value in [
        ("--seed", "-1"),
        *itertools.product(("--max_len", "--sequences", "--dt_scale"), values),
    ]:
        assert evaluate("out/zero", "--max_len=64", "--out=ev", f"{flag}={value}") == 2, (flag, value)
    for flag in ("batch_size", "n_layer", "d_model", "d_state"):
        assert run_train("--out=other", f"--{flag}=1000000000") == 2 and "GB" in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


# ----------------------------------------------------------------------------------------------------------------------
# Official checkpoints and tokenizers, made up here in the same formats


@pytest.fixture
def official(tmp_path):
    """-> function that writes official_model, or one of other fields, as a mamba_ssm folder with a tokenizer like GPT-NeoX's."""
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer(unicode_normalizer="nfc")
    code = ["def hello(world):\n    return world\n" * 9]
    bpe.train_from_iterator(code, 300, special_tokens=[data.SEPARATOR], show_progress=False)
    bpe.add_tokens(["  ", "    "])

    def write(ssm_cfg=(), **changes):
        folder = tmp_path / "official model \u00e9"
        folder.mkdir(exist_ok=True)
        fields = {"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 300, "attn_layer_idx": [], "attn_cfg": {},
                  "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 256} | dict(ssm_cfg),
                  "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
                  "tie_embeddings": True}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(fields | changes))
        (folder / "tokenizer.json").write_text(bpe.to_str())
        torch.save(official_model().state_dict(), folder / "pytorch_model.bin")
        return folder

    return write


def official_model():
    torch.manual_seed(0)
    return Mamba2LM(
        Mamba2Config(304, d_model=32, n_layer=2, d_state=16, headdim=16)
    ).half()  # 300 ids, padded to 304


@torch.no_grad()
@pytest.mark.parametrize("groups, tied, l", [(1, True, 37), (2, False, 50), (2, True, 1)])
def test_transformers_computes_the_same(groups, tied, l, tmp_path):
    """Our weights there, theirs here: the same logits, after a text and going on from the state that it left."""
    transformers = pytest.importorskip("transformers")
    config = Mamba2Config(
        61, d_model=32, n_layer=2, d_state=16, headdim=16, ngroups=groups, tie_embeddings=tied
    )
    ours = Mamba2LM(config).eval()
    sizes = {theirs: getattr(config, name) for theirs, name in model_file.TRANSFORMERS.items()}
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(num_heads=4, chunk_size=8, **sizes))
    theirs.load_state_dict(
        {name.replace("embedding.", "embeddings."): w for name, w in ours.state_dict().items()}
    )
    theirs.eval().save_pretrained(tmp_path)
    back, checkpoint = load_run(tmp_path)
    assert checkpoint["args"]["seq_len"] == 2048
    idx, more = random_ids(2, l), random_ids(2, 1)
    logits, _, state = ours(idx)
    expected = theirs(idx, use_cache=True)
    assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    next_logits = theirs(more, cache_params=expected.cache_params).logits
    assert_close(ours(more, state=state)[0], next_logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(back(idx)[0], logits)
    content = (tmp_path / "model.safetensors").read_bytes()
    for broken in (content[:100], content[:-9], b"\xff" + content[1:]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="not a whole checkpoint"):
            load_run(tmp_path)


def test_official_folder_is_read_or_refused_by_name(official):
    """float16 weights come as float32; a field, a vocabulary or a pickle that does not fit is named."""
    folder = official()
    assert_close(load_run(folder)[0].state_dict(), official_model().float().state_dict(), rtol=0, atol=0)
    for changes, message in (({"attn_layer_idx": [1]}, "attn_layer_idx"), ({"d_intermediate": 64}, "d_intermediate"),
                             ({"ssm_cfg": {"layer": "Mamba1"}}, "layer=Mamba1"), ({"vocab_size": 280}, "vocab_size=280"),
                             ({"ssm_cfg": {"new_thing": 1}}, "new_thing=1"), ({"d_model": 48}, "size mismatch"),
                             ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            load_run(official(**changes))
    official()
    torch.save({"backbone": os.system}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        load_run(folder)


def test_hugging_face_tokenizer_gives_the_same_ids(official):
    """Behind our calls: the same ids as from the library, NFC and runs of spaces included; the file stays as it is."""
    from tokenizers import Tokenizer

    folder = official()
    ours, theirs = data.load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("def  hello(cafe\u0301):\n        return\t1\n", "   ", "\u65e5\u672c \U0001f600 a<b", ""):
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode_ordinary(text)) == unicodedata.normalize("NFC", text)
    assert ours.encode_single_token(data.SEPARATOR) not in ours.encode_ordinary(data.SEPARATOR)
    assert data.tokenizer_json(ours) == (folder / "tokenizer.json").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# The long evaluation


def some_sequences(number, length):
    """Random tokens; where `number` sequences of length + 1 begin in them; these sequences."""
    tokens = random_ids(1, 2000)[0].numpy()
    starts = eval_long.choose_starts(tokens, length, number, 0)
    return tokens, starts, torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)])


@torch.no_grad()
def test_evaluation_equals_brute_force(monkeypatch):
    """Perplexity, excess, spread of the state of each bucket, and the window loss, against one pass and separate windows,
    whatever the segments are."""
    model, T, half, (tokens, starts, idx) = tiny_model().float(), 8, 4, some_sequences(3, 101)
    full = model.per_token_nll(idx[:, :-1], idx[:, 1:])[0].double()
    restarted = torch.zeros_like(full)
    for t in range(half, 100):
        begin = t // half * half - half
        restarted[:, t] = model.per_token_nll(idx[:, begin : t + 1], idx[:, begin + 1 : t + 2])[0][:, -1]
    windows = idx.unfold(1, T + 1, half).flatten(0, 1)
    window_loss = model.per_token_nll(windows[:, :-1], windows[:, 1:])[0].mean()
    for at_once in (1, 3 * 5 * half, 10**6):
        monkeypatch.setattr(eval_long, "TOKENS_AT_ONCE", at_once)
        rows = eval_long.perplexity(model, tokens, starts, 101, T, NO_BAR)
        assert [(row["from"], row["to"]) for row in rows] == [(4, 8), (8, 16), (16, 32), (32, 64), (64, 100)]
        for row in rows:
            span = slice(row["from"], row["to"])
            excess = (full - restarted)[:, span].mean(1)
            expected = full[:, span].mean(), excess.mean(), excess.std() / 3**0.5, window_loss
            found = [row[name] for name in ("nll", "excess", "excess_se", "window_loss")]
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
            assert row["tokens"] == 3 * (row["to"] - row["from"])
            ssm = [ssm for _, ssm in model.hidden(idx[:, : row["to"]])[1]]
            assert abs(row["state_std"] - torch.cat([t.flatten() for t in ssm]).std()) < 1e-6
            heads = [t.transpose(0, 1).flatten(1).std(1).tolist() for t in ssm]
            np.testing.assert_allclose(row["head_std"], heads, atol=1e-5)
        assert abs(rows[0]["excess"]) < 1e-6


@torch.no_grad()
def test_remembrance_equals_brute_force(monkeypatch):
    """Total variation between the predictions after the whole text and after its end, whatever the segments are."""
    model, (tokens, starts, idx) = tiny_model().float(), some_sequences(3, 50)
    for at_once in (1, 20, 10**6):
        monkeypatch.setattr(eval_long, "TOKENS_AT_ONCE", at_once)
        rows = eval_long.remembrance(model, tokens, starts, 50, 8, NO_BAR)
        assert [row["context"] for row in rows] == [1, 2, 4, 8, 16, 32]
        for row in rows:
            p, q = (model(idx[:, i:50])[0][:, -1].double().softmax(-1) for i in (0, 50 - row["context"]))
            variation = 1 - torch.minimum(p, q).sum(1)  # = half of the sum of |p - q|
            assert row["remembrance"] > 0 and abs(row["remembrance"] - variation.mean()) < 1e-5


@torch.no_grad()
def test_cost_of_initial_states_equals_brute_force():
    """True context: the text after its past in one pass. Foreign: after another past. Noise and fitted cost something."""
    past, length = 128 * 2, 20
    model, (tokens, starts, idx) = tiny_model().float(), some_sequences(4, past + length)
    rows = eval_long.init_state(model, tokens, starts, length, 2, NO_BAR)
    assert len({(row["from"], row["to"]) for row in rows}) == 6 and len(rows) == 30
    state = model.hidden(idx[:, :past])[1]
    foreign = [(torch.zeros_like(conv), ssm[[3, 0, 1, 2]]) for conv, ssm in state]
    text = idx[:, past:-1], idx[:, past + 1 :]
    expected = {"zero": model.per_token_nll(*text)[0], "foreign": model.per_token_nll(*text, foreign)[0],
                "true": model.per_token_nll(idx[:, :-1], idx[:, 1:])[0][:, past:]}  # fmt: skip
    for row in rows:
        span = slice(row["from"], row["to"])
        if row["start"] in expected:
            nll, zero = (expected[start][:, span].mean() for start in (row["start"], "zero"))
            assert abs(row["nll"] - nll) < 1e-5 and abs(row["cost"] - (nll - zero)) < 1e-5
        else:
            assert row["cost"] != 0


def test_sequences_do_not_overlap():
    """The chosen texts are apart, inside the tokens, the same for the same seed; too little text says what would fit."""
    tokens = np.zeros(1000)
    for sequences, length in ((4, 249), (3, 100), (None, 62), (None, 999)):
        starts = eval_long.choose_starts(tokens, length, sequences, 0)
        assert (np.diff(starts) > length).all() and starts[-1] + length < 1000
        assert (starts == eval_long.choose_starts(tokens, length, sequences, 0)).all()
    with pytest.raises(ValueError, match="--max_len=249 would"):
        eval_long.choose_starts(tokens, 250, 4, 0)


def test_evaluation_from_end_to_end(work, monkeypatch, capsys):
    """Two runs, Ctrl-C in the second: what the first one gave is kept, and not computed again. A table, results.jsonl, a
    figure; another call uses what is known; errors name what to do, and change nothing."""
    for mode in ("zero", "prev"):
        assert run_train(f"--init_state={mode}", "--steps=2") == 0
    runs, flags = ["out/zero", "out/prev"], ["--max_len=512", "--sequences=4", "--out=ev", "--device=cpu"]
    function, *rest = eval_long.MEASURES["perplexity"]

    def interrupted(*args):
        if Path("ev/results.jsonl").exists():
            raise KeyboardInterrupt
        return function(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setitem(eval_long.MEASURES, "perplexity", (interrupted, *rest))
        evaluate(*runs, *flags)
    assert evaluate(*runs, *flags) == 0
    rows, out = read_jsonl("ev/results.jsonl"), capsys.readouterr().out
    assert [row["to"] for row in rows] == 2 * [8, 16, 32, 64, 128, 256, 512] and Path(
        "ev/perplexity.png"
    ).exists()
    assert "out/zero is in ev/results.jsonl already" in out and all(
        f"{row['perplexity']:.2f}" in out for row in rows
    )
    assert evaluate("out/zero", "--out=ev/results.jsonl/x") == 2 and "no folder" in capsys.readouterr().err
    assert evaluate(*runs, *flags) == 0 and read_jsonl("ev/results.jsonl") == rows
    for measure in (
        "remembrance --max_len=64",
        "init_state --max_len=32",
        "perplexity --max_len=512 --dt_scale=0.5",
    ):
        assert (
            evaluate(*runs, "--sequences=4", "--out=ev", "--device=cpu", *f"--measure={measure}".split()) == 0
        )
        assert Path(f"ev/{measure.split()[0]}.png").exists()
    assert len({row["nll"] for row in read_jsonl("ev/results.jsonl") if row.get("to") == 512}) == 4
    content = Path("ev/results.jsonl").read_bytes()
    assert run_train("--tokenizer=bpe300", "--steps=1", "--out=other") == 0
    assert evaluate("out/zero", "other", "--max_len=64", "--out=ev") == 2
    assert (
        "different tokenizers" in capsys.readouterr().err and Path("ev/results.jsonl").read_bytes() == content
    )


def test_passkeys_are_recalled_at_three_depths(work, monkeypatch, capsys):
    """From training to the figure; and --measure=recall refuses a text, and flags that it would ignore."""
    monkeypatch.setattr(data, "SAMPLES", 500)
    for module in (data, eval_long):
        monkeypatch.setattr(module, "passkey_text", lambda part: TEXT)
    assert run_train("--dataset=passkey", "--steps=1") == 0
    command = "out/zero", "--measure=recall", "--sequences=2", "--max_len=300"
    assert evaluate(*command) == 0 and Path("out/eval/recall.png").exists()
    found = [(row["size"], row["depth"]) for row in read_jsonl("out/eval/results.jsonl")]
    assert found == list(itertools.product((40, 80, 160), (0.1, 0.5, 0.9)))
    for flag in ("--seed=1", "--part=train", "--dataset=a text.txt"):
        assert evaluate(*command, flag) == 2 and "--measure=recall" in capsys.readouterr().err


def test_denormal_numbers_cost_nothing():
    """A state that has decayed to 1e-40, where a CPU's arithmetic can be 10 times slower, takes the time of one of 1."""
    model, idx = Mamba2LM(Mamba2Config(61, d_model=128, n_layer=2)), random_ids(8, 4)
    times = {1.0: [], 1e-40: []}
    with torch.inference_mode():
        for size, found in 9 * list(times.items()):
            state = [(None, torch.full_like(ssm, size)) for _, ssm in model.zero_state(8)]
            start = time.perf_counter()
            model.hidden(idx, state)
            found.append(time.perf_counter() - start)
    assert np.median(times[1e-40]) < 1.5 * np.median(times[1.0]), times


def peaks():
    eval_long.TOKENS_AT_ONCE, tokens = 2048, random_ids(1, 40000)[0].numpy()
    for length in (2048, 32768):
        eval_long.perplexity(tiny_model().float(), tokens, np.array([0]), length, 32, NO_BAR)
        print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_length():
    """Peak memory of a process (not ru_maxrss, which begins at its parent's) after 16 times the length: within 1.1 times."""
    short, long = map(int, run_python("-c", "import test_all; test_all.peaks()").split())
    assert long < 1.1 * short, (short, long)


# ----------------------------------------------------------------------------------------------------------------------
# The words

README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = README + (ROOT / "results/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("script", ["train.py", "eval_long.py", "data.py"])
def test_help_works_anywhere(script, tmp_path):
    """--help needs no data, no GPU, and makes no file."""
    assert "--dataset" in run_python(ROOT / script, "--help", folder=tmp_path) and not list(
        tmp_path.iterdir()
    )


def test_numbers_in_the_readmes_were_measured():
    """Each table in both READMEs, the quick start's, of speed and of kernels too, is what results/report.py makes of what
    was measured and committed."""
    report = importlib.import_module("results.report")
    assert len(re.findall("<!-- (?!end)", READMES)) == 12
    assert report.fill(READMES, report.tables(read_jsonl(ROOT / "results/results.jsonl"))) == READMES
    zero, prev = (
        row["excess"] for row in read_jsonl(ROOT / "results/quickstart/bfloat16.jsonl") if row["to"] == 65536
    )
    assert f"in bfloat16: {zero:+.3f} and {prev:+.3f} in the last row" in README


def test_base_run_is_small_and_cannot_be_resumed(capsys):
    """results/base: weights only, below 3 MB; --resume is refused in one line that says what to do instead."""
    folder = ROOT / "results/base"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * 2**20
    assert run_train(f"--out={folder}", "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--init_from" in error
    model, checkpoint = load_run(folder)
    assert checkpoint["args"]["seq_len"] == 32 and sum(p.numel() for p in model.parameters()) < 500_000


def test_commands_in_the_readme_run(work, monkeypatch, request):
    """In its order, as they stand there, but for tiny presets, two steps and short texts."""
    for name, preset in train.PRESETS.items():
        monkeypatch.setitem(train.PRESETS, name, preset | SIZES | {"tokenizer": "byte", "steps": 2})
    monkeypatch.setitem(train.POST_TRAINING, "steps", 2)
    for name, (function, _, *rest) in eval_long.MEASURES.items():
        monkeypatch.setitem(eval_long.MEASURES, name, (function, 128, *rest))
    read = data.read_documents
    monkeypatch.setattr(data, "SAMPLES", 500)
    monkeypatch.setattr(
        data, "read_documents", lambda dataset: read("a text.txt" if dataset == "python" else dataset)
    )
    Path("my_texts").mkdir()
    for i in range(6):
        shutil.copy("a text.txt", f"my_texts/{i}.txt")
    shutil.copytree(ROOT / "results/base", "results/base")
    if importlib.util.find_spec("tokenizers"):
        request.getfixturevalue("official")().rename("mamba2-130m")
    done = []
    for script, flags in re.findall(
        r"^    .*?python (train|eval_long)\.py\b([^\n&#]*)", README, flags=re.MULTILINE
    ):
        if "https:" in flags or "mamba2-130m" in flags and not Path("mamba2-130m").exists():
            continue
        for old, new in (("steps=\\d+", "steps=2"), ("bpe2048", "bpe300"), ("max_len=\\d+", "max_len=2048"),
                         ("seq_len=\\d+", "seq_len=64"), ("sequences=\\d+", "sequences=1")):  # fmt: skip
            flags = re.sub(old, new, flags)
        assert not {"train": train, "eval_long": eval_long}[script].main(flags.split()), flags
        done.append(flags)
    assert len(done) > 10 and Path("out/eval/perplexity.png").exists()
    if Path("mamba2-130m").exists():
        assert Path("out/130m/tokenizer.json").read_bytes() == Path("mamba2-130m/tokenizer.json").read_bytes()


def test_commands_in_the_texts_have_existing_flags():
    """train.py accepts each of its commands in the README and in its docstring, and each flag that the README names."""
    parser, inline = train.make_parser(), re.findall(r"`(--[^`]*)`", README)
    commands = re.findall(r"python train\.py( --(?!help)[^\n`#&|{]*)", README + train.__doc__)
    commands = [re.split(r" {3,}", command.strip())[0] for command in commands]
    assert len(commands) > 8 and {re.match(r"--\w+", flag)[0] for flag in inline} <= {
        *parser._option_string_actions
    }
    for command in commands + [flag for flag in inline if re.search("[ =]", flag)]:
        parser.parse_args(command.split())
