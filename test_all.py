"""What this project claims, as tests: python -m pytest test_all.py

Each compares with something computed in another way: a sum written out, the recurrence in float64, one pass
over the whole text, a run that nothing interrupted. Where gradients are compared, the gradient that comes in
is random.

Triton's kernels run on a GPU if there is one. Elsewhere they run in Triton's interpreter, and are compiled for
GPUs that are not here."""

import importlib.util
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from tqdm import tqdm

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # read when triton is imported

import data
import eval_long
import model as model_file
import scan_kernel
import train
from model import Mamba2Config, Mamba2LM, load_run
from scan_kernel import random_inputs, relative_error, ssd, ssd_chunked, ssd_loop, ssd_triton, with_gradients

ROOT = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MODES = ("zero", "noise", "fitted", "prev", "tbtt")
NO_BAR = tqdm(disable=True)


def run_python(*command, folder=ROOT):
    """Standard output of a Python process without the interpreter of kernels and without a GPU."""
    env = os.environ | {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ------------------------------------------------------------------------------------------------------------
# The scan

needs_triton = pytest.mark.skipif(scan_kernel.triton is None, reason="triton is not installed")
# The interpreter computes with the raw bits of bfloat16. So on a CPU its evidence is float16, the same code
# with another type, and that the kernels compile.
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3}
if DEVICE == "cuda":
    LIMITS[torch.bfloat16] = 1e-2
SCANS = [
    pytest.param(partial(ssd_chunked, chunk=16), id="chunked"),
    pytest.param(partial(ssd_triton, chunk=16), id="triton", marks=needs_triton),
]
LOSSES = {  # what has a gradient coming in
    "y": lambda y, state, C: (y,),
    "state": lambda y, state, C: (state + 0 * C.sum(),),  # so that C has a gradient: 0
    "both": lambda y, state, C: (y, state),
    "strided": lambda y, state, C: (y.transpose(1, 3), state.mT),
}


def inputs_for(l, dtype=torch.float32, b=2, h=2, p=16, n=16, init=True):
    """u, a, B, C and, if asked for, init_state"""
    inputs = [t.to(DEVICE) for t in random_inputs(b, l, h, p, n, dtype, seed=l)]
    return inputs if init else inputs[:4]


def check_scan(scan, inputs, limit, loss="both"):
    """The results, and the gradients of all inputs, are those of the recurrence in float64 on the same
    numbers."""

    def results(scan, inputs):
        return with_gradients(lambda *args: LOSSES[loss](*scan(*args), args[3]), inputs)

    reference = results(ssd_loop, [t.double() for t in inputs])
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    found = results(scan, inputs)
    torch.use_deterministic_algorithms(False)
    for i, (r, f) in enumerate(zip(reference, found, strict=True)):
        error = (f.double() - r).norm().item()
        assert error <= limit * r.norm().item() + 1e-9, (i - len(found), error)
    for gradient, t in zip(found[-len(inputs) :], inputs):
        assert gradient.dtype == t.dtype


def test_loop_is_the_sum_written_out():
    """The reference: S_t = what is left of S + the sum over s <= t of exp(a_s+1 + ... + a_t) u_s B_s^T."""
    u, a, B, C, S = random_inputs(2, 7, 2, 8, 16)
    y, final = ssd_loop(u, a, B, C, S)
    for b, h in itertools.product(range(2), range(2)):
        for t in range(7):
            state = torch.exp(a[b, : t + 1, h].sum()) * S[b, h]
            for s in range(t + 1):
                decay = torch.exp(a[b, s + 1 : t + 1, h].sum())
                state = state + decay * torch.outer(u[b, s, h], B[b, s])
            assert_close(y[b, t, h], state @ C[b, t], rtol=1e-9, atol=1e-12)
        assert_close(final[b, h], state, rtol=1e-9, atol=1e-12)
    assert_close(ssd_loop(u, a, B, C), ssd_loop(u, a, B, C, torch.zeros_like(S)), rtol=0, atol=0)


@pytest.mark.parametrize("l", [1, 3, 63, 64, 65, 131])
@pytest.mark.parametrize("init", [True, False], ids=["init", "zero"])
@pytest.mark.parametrize("loss", ["y", "state", "both"])
def test_chunked_equals_loop(l, init, loss):
    """In float64, at any length, with and without an initial state, from either result or both."""
    check_scan(ssd_chunked, inputs_for(l, torch.float64, p=8, init=init), 1e-10, loss)


@pytest.mark.parametrize("chunk", [1, 16, 128])
@pytest.mark.parametrize(
    "dtype, limit", [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 2e-2)]
)
def test_chunked_is_accurate_in_low_precision(dtype, limit, chunk):
    """At any chunk size, against the recurrence in float64 on the same numbers."""
    check_scan(partial(ssd_chunked, chunk=chunk), inputs_for(300, dtype, h=4), limit)


@needs_triton
@pytest.mark.parametrize("init", [True, False], ids=["init", "zero"])
@pytest.mark.parametrize("loss", ["y", "state", "both"])
def test_triton_equals_loop_from_any_loss(init, loss):
    """With and without an initial state; from a loss on y, on the final state, or on both."""
    check_scan(partial(ssd_triton, chunk=16), inputs_for(37, h=3, init=init), LIMITS[torch.float32], loss)


@needs_triton
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("l", [1, 15, 16, 17, 63, 65, 131])
def test_triton_equals_loop_at_any_length(l, dtype):
    """Also where l is no multiple of the chunk."""
    check_scan(partial(ssd_triton, chunk=16), inputs_for(l, dtype), LIMITS[dtype])


@needs_triton
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("p, n, chunk", [(64, 128, 64), (128, 256, 32), (32, 64, 128), (16, 32, 1)])
def test_triton_equals_loop_at_any_size(p, n, chunk, dtype):
    """At all chunk sizes, with several tiles of p and n and with one."""
    check_scan(partial(ssd_triton, chunk=chunk), inputs_for(chunk + 9, dtype, b=1, p=p, n=n), LIMITS[dtype])


@pytest.mark.parametrize("scan", SCANS)
def test_scan_takes_any_strides(scan):
    """Every argument, and every gradient that comes in, may be a view with gaps; what lies between is unread."""
    views = [torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for t in inputs_for(40)]
    assert not any(view.is_contiguous() for view in views)
    check_scan(scan, views, 1e-5, "strided")
    transposed = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs_for(40)]
    check_scan(scan, transposed, 1e-5, "strided")


@needs_triton
def test_triton_gives_equal_bits_twice():
    """No result or gradient depends on the order in which programs run."""
    inputs = inputs_for(50, h=4)
    once, again = [with_gradients(ssd_triton, inputs) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))


@needs_triton
@pytest.mark.parametrize("loss", ["y", "state", "both"])
def test_triton_compiles_into_one_graph(loss):
    """torch.compile(fullgraph=True) sees one operator: the same results and gradients, whatever the loss."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(partial(ssd_triton, chunk=16), fullgraph=True, backend=backend)
    check_scan(compiled, inputs_for(33), 1e-5, loss)


@pytest.mark.parametrize("a", [-1e6, -50.0, -5.0, -1e-6, -0.0])
@pytest.mark.parametrize("scan", SCANS)
def test_extreme_decays_stay_finite(scan, a):
    """Heads that forget within a token, or never, make neither NaN nor infinity, forward or backward."""
    u, decays, B, C, S = inputs_for(130)
    inputs = u, torch.full_like(decays, a), B, C, S
    found = with_gradients(scan, inputs)
    assert all(torch.isfinite(t).all() for t in found)
    if a > -1:  # else a' is a small difference of large sums
        check_scan(scan, inputs, 1e-4)


BASE = dict(zip(("u", "a", "B", "C", "init_state"), random_inputs(2, 5, 4, 8, 16, torch.float32)))


@pytest.mark.parametrize(
    "name, value, expected",
    [
        ("u", torch.zeros(2, 0, 4, 8), "l >= 1"),
        ("u", torch.zeros(2, 5, 4, 8, dtype=torch.int64), "float dtype"),
        ("a", torch.zeros(2, 5, 3), r"\(2, 5, 4\)"),
        ("a", torch.zeros(2, 5, 4, dtype=torch.float16), "float32"),
        ("B", torch.zeros(2, 5, 1, 16), r"\(b, l, n\)"),
        ("B", torch.zeros(2, 4, 16), r"\(2, 5, 16\)"),
        ("C", torch.zeros(2, 5, 8), r"\(2, 5, 16\)"),
        ("C", torch.zeros(2, 5, 16, dtype=torch.float16), "float32"),
        ("init_state", torch.zeros(2, 4, 16, 8), r"\(2, 4, 8, 16\)"),
        ("init_state", torch.zeros(2, 4, 8, 16, dtype=torch.float16), "float32"),
        ("chunk", 48, "power of two"),
        ("chunk", 0, "power of two"),
        ("backend", "cuda", "'triton', 'torch' or None"),
    ],
)
def test_scan_names_the_argument_that_does_not_fit(name, value, expected):
    """Nothing is ignored or guessed: a ValueError names the argument, and what it should be."""
    with pytest.raises(ValueError, match=f"ssd: {name} should be .*{expected}"):
        ssd(**BASE | {name: value})


@needs_triton
@pytest.mark.parametrize(
    "changes, message",
    [({"p": 8}, "p of u"), ({"n": 8}, "n of B"), ({"dtype": torch.float64}, "u should be float32")],
)
def test_triton_refuses_by_name_and_torch_takes_over(changes, message):
    """What the kernels cannot take is a ValueError if they are asked for; else torch computes it."""
    inputs = inputs_for(4, **changes)
    with pytest.raises(ValueError, match=f"backend 'triton' does not work here: .*{message}"):
        ssd(*inputs, backend="triton")
    check_scan(ssd, inputs, 1e-5)


def in_segments(scan, u, a, B, C, state, cuts):
    """The scan of what lies between the cuts, one part after the other, with the state carried."""
    ys = []
    for parts in zip(*(t.tensor_split(cuts, dim=1) for t in (u, a, B, C))):
        y, state = scan(*parts, state)
        ys.append(y)
    return torch.cat(ys, dim=1), state


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scan", SCANS)
def test_laws_of_the_scan(scan, seed):
    """At random sizes: linear in u and the state, both at once; without decay and writing the state stays;
    segments with the state carried, cut anywhere, give the same numbers as one pass."""
    draw = random.Random(seed)
    same = partial(assert_close, atol=2e-4, rtol=1e-4)
    l = draw.randint(2, 50)
    u, a, B, C, S = inputs_for(l, b=draw.randint(1, 3), h=draw.randint(1, 3))
    y, final = scan(u, a, B, C, S)
    other_y, other_final = scan(u.flip(1), a, B, C, S.flip(2))
    mixed = scan(2 * u - u.flip(1), a, B, C, 2 * S - S.flip(2))
    same(mixed, (2 * y - other_y, 2 * final - other_final))
    only_read = torch.einsum("bhpn,bln->blhp", S, C)
    same(scan(0 * u, 0 * a, B, C, S), (only_read, S))
    cuts = sorted(draw.sample(range(1, l), draw.randint(1, min(3, l - 1))))
    same(in_segments(scan, u, a, B, C, S, cuts), (y, final))


@torch.no_grad()
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_a_carried_state_does_not_drift(dtype, limit):
    """After 100,000 tokens in segments of random lengths, the state is that of the recurrence in float64 over
    the last ones that matter, for heads that forget within a token and such that remember hundreds."""
    draw = random.Random(0)
    u, a, B, C = random_inputs(1, 100_000, 4, 4, 8, dtype)[:4]
    a = a.clamp(max=-0.004)
    ends = itertools.accumulate(draw.choices([1, 2, 63, 64, 65, 1000, 4096], k=1000))
    cuts = [end for end in ends if end < 100_000]
    _, state = in_segments(ssd_chunked, u, a, B, C, None, cuts)
    last = [t[:, -8000:].double() for t in (u, a, B, C)]
    _, reference = ssd_loop(*last)
    for h in range(4):
        assert relative_error(reference[:, h], state[:, h]) < limit


class LastProgram:
    """Stands in for a kernel: launches the last program of a grid alone."""

    def __init__(self, kernel):
        self.kernel = kernel
        self.fn = kernel.fn

    def __getitem__(self, grid):
        LastProgram.number = grid[0] - 1
        return self.kernel[(1,)]


def last_row_far_away():
    """Each tensor passes 2^31 elements; memory that is never touched takes no room."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    near = random_inputs(1, 16, 1, 16, 16, torch.float16)
    expected = with_gradients(ssd_triton, near)
    for name in scan_kernel.SETTINGS:
        setattr(scan_kernel, name, LastProgram(getattr(scan_kernel, name)))
    InterpreterBuilder.create_get_program_id = lambda *_: TensorHandle(
        np.array([LastProgram.number], dtype=np.int32), tl.int32
    )

    def far(t):
        t_far = torch.empty(2**23 + 1, *t.shape[1:], dtype=t.dtype)
        t_far[-1:] = t
        return t_far

    inputs = [far(t).requires_grad_() for t in near]
    outputs = ssd_triton(*inputs)
    draw = torch.Generator().manual_seed(1)
    weights = [far(torch.randn(t[:1].shape, generator=draw).to(t)) for t in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, inputs, weights)]
    for r, f in zip(expected, found, strict=True):
        assert torch.equal(r, f[-1:])
    print("equal")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="would take 60 GB: results/gpu_check.py has it for a GPU")
def test_triton_offsets_past_2_31_elements():
    """A row of a batch more than 2^31 elements from the first: the same bits as on its own."""
    code = "import test_all; test_all.last_row_far_away()"
    assert run_python("-c", code) == "equal\n"  # a wrong offset would end the process


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here():
    """bf16, p 64, n 128, chunk 64: no spills on sm_80 and sm_90, a tensor-core instruction for every product,
    shared memory that consumer GPUs have; float32: no product rounded to tf32."""
    command = "results/kernel_report.py --compile --shapes small --targets sm_80 sm_90 gfx942"
    rows = json.loads(run_python(*command.split()).splitlines()[-1])["kernels"]
    built = {(row["kernel"].split()[0], row["dtype"], row["target"]) for row in rows}
    targets = ("sm_80", "sm_90", "gfx942")
    assert built >= set(itertools.product(scan_kernel.SETTINGS, ("bf16", "fp32"), targets))
    for row in rows:
        assert row["shared"] <= (65536 if row["target"] == "gfx942" else 101376), row
        if row["dtype"] == "fp32":
            assert row["tf32"] == 0, row
        if row["dtype"] == "bf16":
            assert row["tensor_ops"] >= row["products"], row
            assert row["spilled"] == 0 or row["target"] == "gfx942", row


# ------------------------------------------------------------------------------------------------------------
# The model


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 8, "chunk": 16}
    return Mamba2LM(Mamba2Config(**sizes | {"A_init": "log", "A_init_range": (0.01, 16)} | changes)).double()


def random_ids(b, l, seed=0):
    return torch.randint(61, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [[1, 50], [3, 4, 70], [32, 64], [2, 3]])
def test_segments_equal_one_pass(cuts):
    """Cut anywhere, with the state carried, a text has the same logits at every position, the same state at
    the end and the same gradients."""
    model = tiny_model()
    idx = random_ids(2, 77)
    weights = torch.randn(2, 77, 61, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole, _, whole_state = model(idx)
    gradients = torch.autograd.grad((whole * weights).sum(), model.parameters())
    state, parts = None, []
    for part in idx.tensor_split(cuts, dim=1):
        logits, _, state = model(part, state=state)
        parts.append(logits)
    parts = torch.cat(parts, dim=1)
    found = torch.autograd.grad((parts * weights).sum(), model.parameters())
    assert_close((parts, state, found), (whole, whole_state, gradients), rtol=1e-10, atol=1e-10)


def test_step_equals_forward():
    """Token by token, and so blind to what follows, the logits and the state are those of the whole text."""
    model = tiny_model()
    idx = random_ids(2, 20)
    whole, _, whole_state = model(idx)
    logits, state = [], model.zero_state(2)
    for token in idx.unbind(1):
        out, state = model.step(token, state)
        logits.append(out)
    assert_close((torch.stack(logits, dim=1), state), (whole, whole_state), rtol=1e-10, atol=1e-11)


def test_generate_equals_forward():
    """At temperature 0 it picks, token by token, what the whole text so far makes likeliest."""
    model = tiny_model()
    idx = random_ids(2, 20)
    out = model.generate(idx, 12, temperature=0)
    for _ in range(12):
        idx = torch.cat([idx, model(idx)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, idx[:, 20:])


def test_sliced_loss_equals_whole(monkeypatch):
    """per_token_nll, in slices of the logits: the losses and gradients of cross-entropy on all of them."""
    model = tiny_model()
    idx = random_ids(3, 41)
    weights = torch.rand(3, 40, dtype=torch.float64)
    logits, _, _ = model(idx[:, :-1])
    whole = F.cross_entropy(logits.float().transpose(1, 2), idx[:, 1:], reduction="none")
    monkeypatch.setattr(model_file, "LOGITS_AT_ONCE", 61 * 7)
    sliced, _ = model.per_token_nll(idx[:, :-1], idx[:, 1:])
    assert relative_error(whole, sliced) < 1e-6
    gradients = [
        torch.autograd.grad((nll * weights).sum(), model.lm_head.weight)[0] for nll in (whole, sliced)
    ]
    assert relative_error(*gradients) < 1e-5
    assert_close(model(idx[:, :-1], idx[:, 1:])[1], whole.mean())


def test_parameters_are_the_official_ones():
    """Names and shapes of mamba_ssm's MambaLMHeadModel (d_inner 64, conv_dim 64 + 2 x 16, 8 heads)."""
    shapes = {name: tuple(t.shape) for name, t in tiny_model(n_layer=1).state_dict().items()}
    layer = "backbone.layers.0."
    assert shapes == {
        "backbone.embedding.weight": (61, 32),
        layer + "norm.weight": (32,),
        layer + "mixer.dt_bias": (8,),
        layer + "mixer.A_log": (8,),
        layer + "mixer.D": (8,),
        layer + "mixer.in_proj.weight": (64 + 96 + 8, 32),
        layer + "mixer.conv1d.weight": (96, 1, 4),
        layer + "mixer.conv1d.bias": (96,),
        layer + "mixer.norm.weight": (64,),
        layer + "mixer.out_proj.weight": (32, 64),
        "backbone.norm_f.weight": (32,),
        "lm_head.weight": (61, 32),
    }


@pytest.mark.parametrize("seed", range(5))
def test_initialisation(seed):
    """dt within [dt_min, dt_max]; A within its range, log-uniform with one head in each of h equal parts."""
    mixer = tiny_model(seed).backbone.layers[0].mixer
    dt = F.softplus(mixer.dt_bias)
    assert 0.99e-3 <= dt.min() and dt.max() <= 0.101
    part = (mixer.A_log.exp() / 0.01).log() / math.log(16 / 0.01) * 8
    assert part.floor().long().tolist() == list(range(8))
    A = tiny_model(seed, A_init="uniform", A_init_range=(1, 16)).backbone.layers[0].mixer.A_log.exp()
    assert 1 <= A.min() and A.max() <= 16


@pytest.mark.parametrize("field, value", [("headdim", 7), ("chunk", 24), ("A_init_range", (0, 1))])
def test_config_says_what_is_wrong(field, value):
    """An impossible configuration is a ValueError that names the field."""
    with pytest.raises(ValueError, match=field):
        tiny_model(**{field: value})


# ------------------------------------------------------------------------------------------------------------
# The data

TEXT = "".join(f"def f_{i}(x):\n    return x + {i * 7919 % 1000}  # é 日本\n\n" for i in range(1500))


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder of its own as the current one, with a text of about 75 KB."""
    monkeypatch.chdir(tmp_path)
    Path("a text.txt").write_text(TEXT, encoding="utf-8")


@pytest.mark.parametrize("spec, size", [("byte", 257), ("bpe300", 300)])
def test_tokenizers_are_lossless(spec, size):
    """decode(encode(s)) == s for random Unicode, also where the text holds the separator's."""
    rng = random.Random(0)
    tokenizer = data.make_tokenizer(spec, [TEXT])
    assert tokenizer.n_vocab == size
    assert tokenizer.encode_single_token(data.SEPARATOR) == size - 1
    for _ in range(200):
        ends = rng.choices([0x80, 0xD800, 0x110000], k=rng.randrange(60))
        string = "".join(chr(rng.randrange(end)) for end in ends)
        string = string.encode(errors="ignore").decode()  # without surrogates
        string += rng.choice(["", data.SEPARATOR, "    \n\t  x\r\n"])
        ids = tokenizer.encode_ordinary(string)
        assert tokenizer.decode(ids) == string
        assert size - 1 not in ids


def test_bpe_merges_the_most_frequent_pair():
    """The learnt tokens, against pairs counted again from scratch after each merge."""
    counted = Counter(re.findall(data.PATTERN, TEXT))
    words = [[bytes([byte]) for byte in word.encode()] for word in counted.elements() if counted[word] > 1]
    ranks = data.train_bpe([TEXT], 256 + 30 + 1)
    for token in sorted(ranks, key=ranks.get)[256:]:
        pairs = Counter(left + right for word in words for left, right in pairwise(word))
        assert pairs[token] == max(pairs.values())
        for word in words:
            for j in range(len(word)):
                if j + 1 < len(word) and word[j] + word[j + 1] == token:
                    word[j : j + 2] = [token]


def test_corpus_is_prepared_once(work, monkeypatch):
    """Two processes prepare it at once and leave whole files and nothing else; they are used from then on."""
    command = [sys.executable, ROOT / "data.py", "--dataset=a text.txt", "--tokenizer=bpe300"]
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(Path("data").glob("*/*"))) == 3
    monkeypatch.setattr(data, "train_bpe", None)
    corpus = data.load_corpus("a text.txt", "bpe300")
    cut = len(TEXT) * 4 // 5
    assert corpus.tokenizer.decode(corpus.train.tolist()) == TEXT[:cut] + data.SEPARATOR
    assert corpus.tokenizer.decode(corpus.val.tolist()) == TEXT[cut:] + data.SEPARATOR


@pytest.mark.parametrize(
    "pattern, message", [("*-val-*", "is damaged"), ("bpe300-*", "is not the tokenizer")]
)
def test_damaged_corpus_is_found(work, pattern, message):
    """A file that is cut, empty or has one flipped bit is refused in a line."""
    data.load_corpus("a text.txt", "bpe300")
    path = next(Path("data").glob(f"*/{pattern}"))
    content = path.read_bytes()
    for damage in (content[:-2], content[:-1] + bytes([content[-1] ^ 1]), content[:50], b""):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=message):
            data.load_corpus("a text.txt", "bpe300")


def test_held_out_documents_are_not_trained_on():
    """A fifth of the files of a folder, whichever order they come in; of a single file, its end."""
    documents = {f"{i}.txt": f"text {i}" for i in range(50)}
    train_texts, val_texts = data.split_documents(documents)
    assert len(val_texts) == 10
    assert sorted(train_texts + val_texts) == sorted(documents.values())
    assert data.split_documents(dict(reversed(documents.items())))[1][::-1] == val_texts
    assert data.split_documents({"a": "0123456789"}) == (["01234567"], ["89"])


@pytest.mark.parametrize("windows", [data.random_windows, data.next_windows])
def test_batches(windows):
    """Targets are the next tokens; a step's batch depends on seed and step alone."""
    tokens = np.arange(1000, dtype=np.uint16)
    batch = windows(tokens, 4, 10, 3, 5)
    assert batch.shape == (4, 11)
    assert ((batch[:, 1:] - batch[:, :-1]) % 1000 == 1).all()
    assert torch.equal(batch, windows(tokens, 4, 10, 3, 5))
    assert (batch != windows(tokens, 4, 10, 4, 5)).any()
    assert (batch != windows(tokens, 4, 10, 3, 6)).any()


def test_streams_continue():
    """In tbtt each row goes on where it was, through the end of the text too; rows are at different places."""
    tokens = np.arange(1000, dtype=np.uint16)
    for step in range(200):
        batch = data.next_windows(tokens, 4, 10, 3, step)
        following = data.next_windows(tokens, 4, 10, 3, step + 1)
        assert torch.equal(batch[:, -1], following[:, 0])
    assert len(set(batch[:, 0].tolist())) == 4


# ------------------------------------------------------------------------------------------------------------
# The initial states


def initial_state(mode, **changes):
    args = {"init_state": mode, "seed": 0, "noise_std": 0.3, "init_prob": 1.0} | changes
    return train.InitialState(SimpleNamespace(**args), torch.device("cpu"), {})


def test_zero_is_no_state():
    """zero starts from nothing, whatever was observed."""
    model, init = tiny_model(), initial_state("zero")
    init.observe(model(random_ids(2, 16))[2])
    assert init.draw(model, 2, 1) is None and init.memory == {}


def test_noise_has_the_asked_standard_deviation():
    """noise: mean 0, standard deviation noise_std, another one each step; no noise for the convolution."""
    model, init = tiny_model(), initial_state("noise")
    state = init.draw(model, 64, 0)
    for conv, ssm in state:
        assert abs(ssm.std() - 0.3) < 0.01 and abs(ssm.mean()) < 0.01
        assert (conv == 0).all()
    assert_close(init.draw(model, 64, 0), state, rtol=0, atol=0)
    assert (init.draw(model, 64, 1)[0][1] != state[0][1]).any()


@pytest.mark.parametrize("mode", ["noise", "prev", "tbtt"])
def test_init_prob_is_a_share_of_the_rows(mode):
    """With init_prob 0.75 the first quarter of the rows starts from zero, and these only."""
    model, init = tiny_model(), initial_state(mode, init_prob=0.75)
    init.observe(model(random_ids(8, 16))[2])
    for _, ssm in init.draw(model, 8, 1):
        assert (ssm.abs().amax((1, 2, 3)) > 0).tolist() == [False] * 2 + [True] * 6


@pytest.mark.parametrize("mode", ["prev", "tbtt"])
def test_carried_states(mode):
    """First zeros, then the previous step's final state, detached; tbtt also takes its convolution."""
    model, init = tiny_model(), initial_state(mode)
    assert all((ssm == 0).all() for _, ssm in init.draw(model, 2, 0))
    _, _, final = model(random_ids(2, 16))
    init.observe(final)
    for (conv, ssm), (final_conv, final_ssm) in zip(init.draw(model, 2, 1), final, strict=True):
        assert torch.equal(ssm, final_ssm)
        assert not ssm.requires_grad and not conv.requires_grad
        assert torch.equal(conv, final_conv) if mode == "tbtt" else (conv == 0).all()


def test_fitted_noise_has_the_moments_of_final_states():
    """fitted: for each layer and head the mean and standard deviation of final states from zero."""
    model, init = tiny_model().float(), initial_state("fitted")
    batches = [random_ids(8, 16, seed=i) for i in range(20)]
    for i, idx in enumerate(batches):
        init.fit(model, idx, 1 / (i + 1))
    _, final = model.hidden(torch.cat(batches))
    for (conv, drawn), (_, ssm) in zip(init.draw(model, 500, 0), final, strict=True):
        made = drawn.transpose(0, 1).flatten(1)  # (h, all numbers)
        seen = ssm.detach().transpose(0, 1).flatten(1)
        assert_close(made.std(1), seen.std(1), rtol=0.05, atol=0)
        assert ((made.mean(1) - seen.mean(1)).abs() < 0.05 * seen.std(1)).all()
        assert (conv == 0).all()


# ------------------------------------------------------------------------------------------------------------
# Training, resuming

SIZES = {"d_model": 16, "n_layer": 2, "d_state": 8, "headdim": 8, "chunk": 8, "seq_len": 8, "batch_size": 4}
SMALL = [f"--{name}={size}" for name, size in SIZES.items()]
SMALL += ["--dataset=a text.txt", "--tokenizer=byte", "--device=cpu", "--log_every=2"]


def exit_code(main, *flags):
    """What a script would end with; what it says then is on stderr."""
    try:
        data.run_script(lambda: main([str(flag) for flag in flags]))
    except SystemExit as stop:
        if isinstance(stop.code, str):  # as Python does in the end
            print(stop.code, file=sys.stderr)
        return 1 if isinstance(stop.code, str) else stop.code
    return 0


def run_train(*flags):
    return exit_code(train.main, *SMALL, *flags)


def run_eval(*flags):
    return exit_code(eval_long.main, *flags, "--device=cpu")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_same_run(run, other):
    """The same weights and log, bit for bit, but for the times."""
    runs = [torch.load(f"{folder}/ckpt.pt", weights_only=True) for folder in (run, other)]
    for name in ("model", "optimizer", "memory"):
        assert_close(runs[0][name], runs[1][name], rtol=0, atol=0)
    logs = [read_jsonl(f"{folder}/log.jsonl") for folder in (run, other)]
    for row in itertools.chain(*logs):
        del row["tokens_per_s"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("mode", MODES)
def test_resumed_run_equals_uninterrupted_one(work, mode, monkeypatch):
    """Cut off in step 8, resumed from the checkpoint of step 6: in the end the same run, bit for bit."""
    flags = [f"--init_state={mode}", "--init_prob=0.7", "--steps=12", "--save_every=3"]
    assert run_train(*flags, "--out=whole") == 0
    rate = train.learning_rate
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train, "learning_rate", lambda step, args: rate(step, args) if step < 7 else 1 / 0)
        run_train(*flags, "--out=cut")
    with open("cut/log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a line cut short
    assert run_train("--out=cut", "--resume") == 0
    assert_same_run("cut", "whole")
    assert [row["step"] for row in read_jsonl("cut/log.jsonl")] == [2, 3, 4, 6, 8, 9, 10, 12]


def test_interrupted_at_any_moment(work):
    """kill -9 and Ctrl-C at random moments from the first import on: the next call goes on, and in the end it
    is the same run as one that was left alone, bit for bit."""
    flags = ["--init_state=tbtt", "--steps=600", "--save_every=20", "--tokenizer=bpe300", "--out=cut"]
    command = [sys.executable, ROOT / "train.py", *SMALL, *flags]
    draw = random.Random(0)
    interrupted = 0

    def resume():
        return ["--resume"] if Path("cut/ckpt.pt").exists() else []

    for i in range(6):
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, *resume()], **streams)
        try:
            process.wait(draw.uniform(0.5, 9))
        except subprocess.TimeoutExpired:
            interrupted += 1
            process.send_signal([signal.SIGKILL, signal.SIGINT][i % 2])
            process.wait()
    assert interrupted > 2  # else it was finished
    assert run_train(*flags, *resume()) == 0
    assert run_train(*flags, "--out=whole") == 0
    assert_same_run("cut", "whole")


def test_killed_before_the_first_checkpoint(work):
    """What a run that was killed at its start may leave does not keep the next one from starting."""
    assert run_train("--steps=1", "--out=whole") == 0
    Path("cut").mkdir()
    shutil.copy("whole/tokenizer.json", "cut")
    Path("cut/.ckpt.pt.123").write_bytes(b"half of it")
    assert run_train("--steps=1", "--out=cut") == 0
    assert_same_run("cut", "whole")


def damaged(content, i):
    """The i-th copy: one in four is cut, the others have one flipped bit, at a random place."""
    draw = random.Random(i)
    place = draw.randrange(len(content))
    if i % 4 == 0:
        return content[:place]
    return content[:place] + bytes([content[place] ^ 1 << draw.randrange(8)]) + content[place + 1 :]


def test_damaged_checkpoints_are_found(work):
    """100 copies, each cut or with one bit flipped: an error of one line, or the same weights (the bit was
    padding)."""
    assert run_train("--init_state=prev", "--steps=1") == 0
    good = Path("out/prev/ckpt.pt").read_bytes()
    expected = load_run("out/prev")[0].state_dict()
    found = 0
    for i in range(100):
        Path("out/prev/ckpt.pt").write_bytes(damaged(good, i))
        try:
            state_dict = load_run("out/prev")[0].state_dict()
            assert_close(state_dict, expected, rtol=0, atol=0)
        except ValueError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > 75


@pytest.fixture
def refused(work, capsys):
    """-> function that makes sure that training and evaluation refuse out/prev, in a line that says why."""
    assert run_train("--init_state=prev", "--steps=1") == 0

    def check(reason):
        capsys.readouterr()
        for code in (run_train("--init_from=out/prev", "--out=new"), run_eval("out/prev")):
            error = capsys.readouterr().err
            assert code == 2 and reason in error, error
        assert error.count("\n") == 1
        assert not Path("new").exists() and not Path("out/eval").exists()

    return check


D = "backbone.layers.1.mixer.D"


@pytest.mark.parametrize(
    "part, change, reason",
    [
        ("optimizer", lambda _: re.compile(""), "re._compile"),  # pickled as a call: a file must not run code
        ("model", lambda weights: {name: w for name, w in weights.items() if name != D}, D),
        ("model", lambda weights: weights | {D + "x": weights[D]}, D + "x"),
        ("model", lambda weights: weights | {D: weights[D][:1]}, D),
        ("config", lambda config: config | {"headdim": 7}, "headdim"),
    ],
)
def test_checkpoint_that_does_not_fit_is_refused_by_name(refused, part, change, reason):
    """A checkpoint that would run code, or holds other weights than it says: exit code 2 and one line."""
    checkpoint = torch.load("out/prev/ckpt.pt", weights_only=True)
    torch.save(checkpoint | {part: change(checkpoint[part])}, "out/prev/ckpt.pt")
    refused(reason)


def test_other_tokenizer_is_refused(refused):
    """A tokenizer that is damaged, or another run's, is not used."""
    path = Path("out/prev/tokenizer.json")
    good = path.read_bytes()
    for i in range(8):
        path.write_bytes(damaged(good, i))
        refused("tokenizer.json is not the tokenizer it should be")
    assert run_train("--out=third", "--steps=1", "--tokenizer=bpe300") == 0
    shutil.copy("third/tokenizer.json", path)
    refused("tokenizer.json is not the tokenizer it should be")


def test_full_disk_keeps_the_last_checkpoint(work):
    """A checkpoint that cannot be written whole: one line that names it, the one before stays, and training
    goes on later."""
    resource = pytest.importorskip("resource")  # not on Windows
    flags = ["--init_state=prev", "--steps=6", "--save_every=2"]
    assert run_train(*flags, "--out=whole") == 0
    # The first checkpoint is smaller: it has no moments of Adam.
    limit = int(0.9 * Path("whole/ckpt.pt").stat().st_size)
    result = subprocess.run(
        [sys.executable, ROOT / "train.py", *SMALL, *flags],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "ckpt.pt could not be written" in result.stderr.splitlines()[-1]
    assert load_run("out/prev")[1]["step"] == 0
    assert list(Path("out/prev").glob(".*")) == []
    assert run_train("--out=out/prev", "--resume") == 0
    assert_same_run("out/prev", "whole")


def test_modes_differ_in_the_initial_state_only(work):
    """One seed: zero and prev begin with the same loss, so with the same weights and batch, and part in the
    second step; noise and fitted differ from the first."""
    losses = {}
    for mode in ("zero", "noise", "fitted", "prev"):
        assert run_train(f"--init_state={mode}", "--steps=2", "--log_every=1") == 0
        losses[mode] = [row["loss"] for row in read_jsonl(f"out/{mode}/log.jsonl")]
    assert losses["zero"][0] == losses["prev"][0]
    assert len({losses[mode][0] for mode in ("zero", "noise", "fitted")}) == 3
    assert losses["zero"][1] != losses["prev"][1]


def test_fitted_does_not_feed_on_itself(work):
    """100 steps with heads that forget almost nothing: the noise stays as large as states from zero."""
    flags = ["--init_state=fitted", "--steps=100", "--A_init_range", "0.0001", "0.01", "--lr=1e-4"]
    assert run_train(*flags) == 0
    model, checkpoint = load_run("out/fitted")
    tokens = data.load_corpus("a text.txt", "byte").train
    _, final = model.hidden(data.random_windows(tokens, 64, 8, 0, 0)[:, :-1])
    for square, (_, ssm) in zip(checkpoint["memory"]["square"], final, strict=True):
        assert_close(square.sqrt(), ssm.square().mean((0, 2, 3)).sqrt(), rtol=0.3, atol=1e-3)


def test_post_training_takes_over_the_architecture(work, capsys):
    """--init_from: the other run's weights, architecture, T and tokenizer; that run stays as it is."""
    assert run_train("--init_state=zero", "--steps=4") == 0
    before = Path("out/zero/ckpt.pt").read_bytes()
    assert exit_code(train.main, "--init_from=out/zero", "--init_state=prev", "--steps=2", "--lr=0") == 0
    assert Path("out/zero/ckpt.pt").read_bytes() == before
    old, new = load_run("out/zero")[1], load_run("out/prev")[1]
    assert_close(new["model"], old["model"], rtol=0, atol=0)  # lr is 0
    assert new["config"] == old["config"] and new["args"]["seq_len"] == 8 and new["args"]["init_prob"] == 0.2
    for flag in ("--seq_len=16", "--tokenizer=bpe300", "--d_model=32"):
        assert exit_code(train.main, "--init_from=out/zero", "--out=other", flag) == 2
        assert f"{flag} contradicts" in capsys.readouterr().err
        assert not Path("other").exists()


@pytest.mark.parametrize("mode", ["fitted", "tbtt"])
def test_two_processes_equal_one(work, mode, monkeypatch, capsys):
    """Within rounding, 2 x 2 rows by torchrun, killed and resumed, are the same as 1 x 4: weights and what is
    remembered. One process alone may not resume."""
    flags = [f"--init_state={mode}", "--init_prob=0.75", "--steps=40", "--lr=1e-4", "--dtype=float32"]
    assert run_train(*flags, "--out=one", "--save_every=10") == 0
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, ROOT / "train.py", *SMALL, *flags, "--batch_size=2", "--out=two", "--save_every=10"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not Path("two/log.jsonl").exists():
        time.sleep(0.02)
    process.terminate()
    process.wait()
    assert exit_code(train.main, "--out=two", "--resume") == 2
    assert "trained by 2 processes" in capsys.readouterr().err
    command = [*launch, ROOT / "train.py", "--out=two", "--resume"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    one, two = load_run("one")[1], load_run("two")[1]
    assert one["tokens"] == two["tokens"] == 40 * 4 * 8
    assert_close(two["model"], one["model"], atol=1e-5, rtol=1e-4)
    assert_close(two["memory"], one["memory"], atol=1e-4, rtol=1e-3)
    for row_one, row_two in zip(read_jsonl("one/log.jsonl"), read_jsonl("two/log.jsonl"), strict=True):
        assert abs(row_one["loss"] - row_two["loss"]) < 1e-4


def test_gradient_that_is_not_finite_stops(work, monkeypatch, capsys):
    """Exit code 1 and one line; the last checkpoint is good, and the run goes on from it."""
    flags = ["--init_state=noise", "--steps=8", "--save_every=2"]
    assert run_train(*flags, "--out=whole") == 0
    draw = train.InitialState.draw

    def poisoned(self, model, b, step):
        state = draw(self, model, b, step)
        if step == 5:
            state[1][1][2] = math.nan
        return state

    with monkeypatch.context() as patch:
        patch.setattr(train.InitialState, "draw", poisoned)
        assert run_train(*flags, "--out=bad") == 1
    error = capsys.readouterr().err
    assert "step 5 is not finite" in error and error.count("\n") == 1
    assert load_run("bad")[1]["step"] == 4
    assert run_train("--out=bad", "--resume") == 0
    assert_same_run("bad", "whole")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--steps=0", "argument --steps"),
        ("--lr=nan", "argument --lr"),
        ("--init_prob=1.5", "argument --init_prob"),
        ("--stepz=5", "--stepz"),
        ("--init_state=previous", "argument --init_state"),
        ("--seq_len=7", "even"),
        ("--seq_len=20000", "less than two windows"),
        ("--headdim=5", "headdim"),
        ("--chunk=24", "chunk"),
        ("--dataset=missing.txt", "no such file"),
        ("--tokenizer=bpe", "--tokenizer=bpe"),
        ("--device=cuda:77", "--device=cuda:77"),
        ("--backend=triton", "'triton' does not work here"),
        ("--init_from=nowhere", "nowhere holds no checkpoint"),
        ("--resume", "out/zero holds no checkpoint"),
        ("--out=full", "not empty"),
        ("--out=full/thesis.txt/run", "no folder to write in"),
    ],
)
def test_bad_flag_is_exit_code_2_and_touches_nothing(work, flag, message, capsys):
    """A message names what is wrong, and no file is made or changed."""
    data.load_corpus("a text.txt", "byte")
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert run_train(flag) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_every_number_refuses_nonsense(work):
    """Each numeric flag of train.py and eval_long.py, at -1, nan, inf, a word and 10^30: exit code 2, and
    nothing is made."""
    flags = [action.option_strings[0] for action in train.make_parser()._actions if action.type]
    assert len(flags) > 12
    assert run_train("--steps=1") == 0
    before = sorted(Path().rglob("*"))
    nonsense = ("-1", "nan", "inf", "ten", "1" + 30 * "0")
    for flag, value in itertools.product(flags, nonsense):
        values = [value, "1"] if flag == "--A_init_range" else [value]
        assert run_train("--out=other", flag, *values) == 2, (flag, value)
    for flag, value in [("--seed", "-1"), *itertools.product(("--max_len", "--sequences"), nonsense)]:
        assert run_eval("out/zero", "--max_len=64", "--out=ev", f"{flag}={value}") == 2, (flag, value)
    assert sorted(Path().rglob("*")) == before


# ------------------------------------------------------------------------------------------------------------
# Official checkpoints and tokenizers, made up here in the same formats


def official_model():
    torch.manual_seed(0)
    return Mamba2LM(Mamba2Config(304, d_model=32, n_layer=2, d_state=16, headdim=16))


@pytest.fixture
def official(tmp_path):
    """-> function that writes official_model as a folder of mamba_ssm, in float16, with a tokenizer like
    GPT-NeoX's of 300 ids, padded to 304, and with other fields if they are given."""
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer(unicode_normalizer="nfc")
    code = ["def hello(world):\n    return world\n" * 9]
    bpe.train_from_iterator(code, 300, special_tokens=[data.SEPARATOR], show_progress=False)
    bpe.add_tokens(["  ", "    "])

    def write(ssm_cfg=(), **changes):
        folder = tmp_path / "official model \u00e9"
        folder.mkdir(exist_ok=True)
        fields = {
            "d_model": 32,
            "d_intermediate": 0,
            "n_layer": 2,
            "vocab_size": 300,
            "ssm_cfg": {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 256} | dict(ssm_cfg),
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 16,
            "tie_embeddings": True,
        }
        (folder / "config.json").write_text(json.dumps(fields | changes))
        (folder / "tokenizer.json").write_text(bpe.to_str())
        torch.save(official_model().half().state_dict(), folder / "pytorch_model.bin")
        return folder

    return write


def test_official_folder_is_read(official):
    """All weights of a mamba_ssm folder in float16 come as float32; T is 2,048."""
    model, checkpoint = load_run(official())
    assert_close(model.state_dict(), official_model().half().float().state_dict(), rtol=0, atol=0)
    assert checkpoint["args"]["seq_len"] == 2048


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate=64"),
        ({"rms_norm": False}, "rms_norm=False"),
        ({"ssm_cfg": {"layer": "Mamba1"}}, "layer=Mamba1"),
        ({"ssm_cfg": {"ngroups": 2}}, "ngroups=2"),
        ({"ssm_cfg": {"norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"D_has_hdim": True}}, "D_has_hdim"),
        ({"d_model": 48}, "size mismatch"),
        ({"n_layer": 3}, "Missing key"),
    ],
)
def test_official_folder_of_another_architecture_is_refused_by_name(official, changes, message):
    """What is not implemented here is not ignored."""
    with pytest.raises(ValueError, match=message):
        load_run(official(**changes))


def test_official_folder_cannot_run_code(official):
    """A pickle that holds more than tensors is refused."""
    folder = official()
    torch.save({"backbone": os.system}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        load_run(folder)


@torch.no_grad()
@pytest.mark.parametrize("tied, l", [(True, 37), (False, 50), (True, 1)])
def test_transformers_computes_the_same(tied, l, tmp_path):
    """Our weights there, theirs here: the same logits, after a text and going on from the state it left."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 16, "tie_embeddings": tied}
    ours = Mamba2LM(Mamba2Config(61, **sizes)).eval()
    config = transformers.Mamba2Config(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=16,
        head_dim=16,
        num_heads=4,
        n_groups=1,
        chunk_size=8,
        tie_word_embeddings=tied,
    )
    theirs = transformers.Mamba2ForCausalLM(config).eval()
    weights = ours.state_dict().items()
    theirs.load_state_dict({name.replace("embedding.", "embeddings."): w for name, w in weights})
    idx, more = random_ids(2, l), random_ids(2, 1, seed=1)
    logits, _, state = ours(idx)
    expected = theirs(idx, use_cache=True)
    assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    next_logits = theirs(more, cache_params=expected.cache_params).logits
    assert_close(ours(more, state=state)[0], next_logits, atol=1e-4, rtol=1e-4)
    theirs.save_pretrained(tmp_path)
    assert torch.equal(load_run(tmp_path)[0](idx)[0], logits)
    content = (tmp_path / "model.safetensors").read_bytes()
    for broken in (content[:100], content[:-9], b"\xff" + content[1:]):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="holds no whole checkpoint"):
            load_run(tmp_path)


@pytest.mark.parametrize(
    "text", ["def  hello(cafe\u0301):\n        return\t1\n", "   ", "日本 \U0001f600 a<b", ""]
)
def test_hugging_face_tokenizer_gives_the_same_ids(official, text):
    """Behind our calls: the same ids as from the library, NFC and runs of spaces included; a separator that
    stands in a text is text; the file stays as it is."""
    from tokenizers import Tokenizer

    folder = official()
    ours = data.load_tokenizer(folder)
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = ours.encode_ordinary(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)
    assert ours.encode_single_token(data.SEPARATOR) not in ours.encode_ordinary(text + data.SEPARATOR)
    assert data.tokenizer_json(ours) == (folder / "tokenizer.json").read_text()


# ------------------------------------------------------------------------------------------------------------
# The long evaluation


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 3 * 5 * 4, 10**6])
def test_evaluation_equals_brute_force(monkeypatch, at_once):
    """Loss, excess and standard error of each bucket, and the window loss, against one pass over the text and
    separate windows, however many tokens are computed at once."""
    model, T, half, length = tiny_model().float(), 8, 4, 100
    tokens = random_ids(1, 2000)[0].numpy()
    starts = eval_long.choose_starts(tokens, length, 3)
    idx = torch.from_numpy(tokens[starts[:, None] + np.arange(length + 1)])
    full = model.per_token_nll(idx[:, :-1], idx[:, 1:])[0].double()
    restarted = torch.zeros_like(full)
    for t in range(half, length):
        begin = t // half * half - half
        nll, _ = model.per_token_nll(idx[:, begin : t + 1], idx[:, begin + 1 : t + 2])
        restarted[:, t] = nll[:, -1]
    windows = idx.unfold(1, T + 1, half).flatten(0, 1)
    window_loss = model.per_token_nll(windows[:, :-1], windows[:, 1:])[0].mean()
    monkeypatch.setattr(eval_long, "TOKENS_AT_ONCE", at_once)
    rows = eval_long.evaluate(model, tokens, starts, length, T, NO_BAR)
    assert [(row["from"], row["to"]) for row in rows] == [(4, 8), (8, 16), (16, 32), (32, 64), (64, 100)]
    for row in rows:
        span = slice(row["from"], row["to"])
        nll = full[:, span].mean(1)
        excess = (full - restarted)[:, span].mean(1)
        expected = nll.mean(), nll.std() / 3**0.5, excess.mean(), excess.std() / 3**0.5, window_loss
        found = [row[name] for name in ("nll", "nll_se", "excess", "excess_se", "window_loss")]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert row["tokens"] == 3 * (row["to"] - row["from"])
    assert abs(rows[0]["excess"]) < 1e-6


@pytest.mark.parametrize("sequences, length", [(4, 249), (3, 100), (None, 62), (None, 999)])
def test_sequences_do_not_overlap(sequences, length):
    """The chosen texts are apart, inside the tokens, and the same for the same seed."""
    tokens = np.zeros(1000)
    starts = eval_long.choose_starts(tokens, length, sequences)
    assert (np.diff(starts) > length).all()
    assert starts[0] >= 0 and starts[-1] + length < 1000
    assert (starts == eval_long.choose_starts(tokens, length, sequences)).all()


def test_too_little_text_says_what_would_fit():
    """The length in the message fits."""
    with pytest.raises(ValueError, match="of 249 would"):
        eval_long.choose_starts(np.zeros(1000), 250, 4)


def test_evaluation_from_end_to_end(work, monkeypatch, capsys):
    """Two runs, Ctrl-C in the second: what the first one gave is kept, and nothing is computed twice. In the
    end a table, results.jsonl and a figure."""
    for mode in ("zero", "prev"):
        assert run_train(f"--init_state={mode}", "--steps=2") == 0
    command = ["out/zero", "out/prev", "--max_len=512", "--sequences=4", "--out=ev"]
    evaluate = eval_long.evaluate

    def interrupted(*args):
        if Path("ev/results.jsonl").exists():
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(eval_long, "evaluate", interrupted)
        assert run_eval(*command) == 130
    assert {row["run"] for row in read_jsonl("ev/results.jsonl")} == {"out/zero"}
    assert run_eval(*command) == 0
    out = capsys.readouterr().out
    rows = read_jsonl("ev/results.jsonl")
    assert [row["to"] for row in rows] == 2 * [8, 16, 32, 64, 128, 256, 512]
    assert "out/zero is in ev/results.jsonl already" in out
    assert all(f"{math.exp(row['nll']):.2f}" in out and f"{row['excess']:+.3f}" in out for row in rows)
    assert Path("ev/excess.png").stat().st_size > 10_000
    monkeypatch.setattr(eval_long, "evaluate", None)
    assert run_eval(*command) == 0
    assert read_jsonl("ev/results.jsonl") == rows


@pytest.mark.parametrize(
    "flags, message",
    [
        (["other"], "different tokenizers"),
        (["--max_len=4"], "less than T = 8"),
        (["--max_len=100000"], "would"),
        (["--dataset=missing.txt"], "no such file"),
        (["nowhere"], "nowhere holds no checkpoint"),
        (["--out=a text.txt"], "no folder to write in"),
        (["--backend=triton"], "'triton' does not work here"),
    ],
)
def test_bad_evaluation_is_exit_code_2_and_touches_nothing(work, flags, message, capsys):
    """A message names what is wrong, and no file is made or changed."""
    assert run_train("--steps=1") == 0
    assert run_train("--steps=1", "--tokenizer=bpe300", "--out=other") == 0
    before = sorted(Path().rglob("*"))
    assert run_eval("out/zero", "--max_len=64", "--out=ev", *flags) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_denormal_numbers_cost_nothing():
    """Products below 1e-38, for which a CPU's arithmetic can take 10 times as long, are zero in all threads."""
    code = "import torch, model; model.choose_device('cpu');"
    code += "print((torch.full((10**6,), 1e-30) * 1e-10).abs().max().item())"
    assert run_python("-c", code) == "0.0\n"


def peaks():
    """Prints the peak memory of this process, in KB, after a short and after a long evaluation."""
    tokens = random_ids(1, 40000)[0].numpy()
    for length in (2048, 32768):
        eval_long.evaluate(tiny_model().float(), tokens, np.array([0]), length, 32, NO_BAR)
        print(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_memory_does_not_grow_with_length():
    """Peak memory of a process (not ru_maxrss, which begins at its parent's) for 16 times the length."""
    short, long = run_python("-c", "import test_all; test_all.peaks()").split()
    assert int(long) < 1.1 * int(short)


# ------------------------------------------------------------------------------------------------------------
# The words

README = (ROOT / "README.md").read_text(encoding="utf-8")
PARSERS = {"train": train.make_parser, "eval_long": eval_long.make_parser}


def commands_in(text):
    """(script, flags) of each command of train.py and eval_long.py that stands in a code block."""
    found = re.findall(r"^ *(?:[^`\n]*&& *)?python (train|eval_long)\.py\b(.*)", text, flags=re.MULTILINE)
    # An explanation may follow, after # or some spaces.
    return [(script, shlex.split(re.split(r" {3,}|&|\|", rest)[0], comments=True)) for script, rest in found]


@pytest.mark.parametrize("script", ["train.py", "eval_long.py", "data.py"])
def test_help_works_anywhere(script, tmp_path):
    """--help needs no data and no GPU, and makes no file."""
    assert "--dataset" in run_python(ROOT / script, "--help", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_commands_in_the_texts_are_accepted():
    """Each command in the README and in the docstrings has existing flags and possible values."""
    commands = commands_in(README + "\n" + train.__doc__ + eval_long.__doc__)
    assert len(commands) > 8
    for script, flags in commands:
        if flags != ["--help"]:
            PARSERS[script]().parse_args(flags)


def test_flags_in_the_readme_exist():
    """Each `--flag` that the README names in a sentence is one of train.py's or eval_long.py's."""
    known = [*train.make_parser()._option_string_actions, *eval_long.make_parser()._option_string_actions]
    assert {flag for flag in re.findall(r"`(--\w+)", README)} <= set(known)


def test_commands_in_the_readme_run(work, monkeypatch, request):
    """In its order, as they stand there, but for small sizes, two steps and a short text."""
    read = data.read_documents
    monkeypatch.setattr(data, "read_documents", lambda _: read("a text.txt"))
    shutil.copytree(ROOT / "results/base", "results/base")
    if importlib.util.find_spec("tokenizers"):
        request.getfixturevalue("official")().rename("mamba2-130m")
    done = 0
    for script, flags in commands_in(README):
        if flags == ["--help"] or "mamba2-130m" in " ".join(flags) and not Path("mamba2-130m").exists():
            continue
        if script == "eval_long":
            flags += ["--max_len=2048", "--sequences=1"]
        elif not {"--resume", "--init_from"} & {flag.partition("=")[0] for flag in flags}:
            flags += [*SMALL, "--steps=2"]
        elif "--resume" not in flags:
            flags += ["--batch_size=4", "--steps=2"]
        assert exit_code({"train": train.main, "eval_long": eval_long.main}[script], *flags) == 0, flags
        done += 1
    assert done >= 5 and Path("out/eval/excess.png").exists()


def test_base_run_is_small_and_cannot_be_resumed(capsys):
    """results/base: weights only, below 3 MB; --resume is refused in a line that says what to do instead."""
    folder = ROOT / "results/base"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * 2**20
    model, checkpoint = load_run(folder)
    assert checkpoint["args"]["seq_len"] == 32
    assert sum(p.numel() for p in model.parameters()) < 500_000
    data.load_tokenizer(folder, checkpoint["tokenizer_hash"], model.config.vocab_size)
    assert exit_code(train.main, f"--out={folder}", "--resume") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--init_from" in error
