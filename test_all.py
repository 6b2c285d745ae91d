"""What this project claims, as tests: python -m pytest test_all.py

Each compares with something computed in another way, such as one pass over the whole text. Triton's kernels
run on a GPU if there is one; elsewhere in its interpreter, and compiled for GPUs that are not here."""

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
import time
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported: tensors are small here

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from tqdm import tqdm

os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")  # before triton

import data
import eval_long
import scan_kernel
import train
from model import Mamba2Config, Mamba2LM, load_run
from scan_kernel import ssd, ssd_chunked, ssd_loop, ssd_triton

ROOT = Path(__file__).parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_BAR = tqdm(disable=True)


def run_python(*command, folder=ROOT, interpret="0"):
    """Standard output of a Python process without a GPU, and without the interpreter of kernels."""
    env = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *command]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- The scan

SCANS = [partial(scan, chunk=16) for scan in (ssd_chunked, ssd_triton)[: 2 if scan_kernel.triton else 1]]
LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}
LOSSES = {  # what has a gradient coming in
    "y": lambda y, state, C: (y,),
    "state": lambda y, state, C: (state + 0 * C.sum(),),  # so that C has a gradient: 0
    "both": lambda y, state, C: (y, state),
    "strided": lambda y, state, C: (y.transpose(1, 3), state.mT),
}
needs_triton = pytest.mark.skipif(scan_kernel.triton is None, reason="triton is not installed")


def random_inputs(b, l, h, p, n, dtype=torch.float64, seed=0):
    """u, a, B, C, init_state on the CPU: from heads that forget within a token to some that take hundreds."""
    draw = torch.Generator().manual_seed(seed)
    shapes = (b, l, h, p), (b, l, n), (b, l, n), (b, h, p, n)
    u, B, C, init_state = (torch.randn(shape, generator=draw) for shape in shapes)
    a = -torch.rand((b, l, h), generator=draw) * torch.logspace(-2, 1, h)
    wide = torch.promote_types(dtype, torch.float32)
    return [u.to(dtype), a.to(wide), B.to(dtype), C.to(dtype), init_state.to(wide)]


def with_gradients(scan, inputs, seed=1):
    """[*outputs, *gradients of the inputs] of scan(*inputs), for random gradients of the outputs."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    outputs = scan(*inputs)
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=draw).to(t) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def inputs_for(l, dtype=torch.float32, b=2, h=2, p=16, n=16, init=True):
    """u, a, B, C and, if asked for, init_state"""
    inputs = [t.to(DEVICE) for t in random_inputs(b, l, h, p, n, dtype, seed=l)]
    return inputs if init else inputs[:4]


def results(scan, inputs, loss):
    """Of the scan, what `loss` takes of its results, and all gradients."""
    return with_gradients(lambda *args: LOSSES[loss](*scan(*args), args[3]), inputs)


def check_scan(scan, inputs, limit=1e-5, loss="both"):
    """All results and gradients are those of the recurrence in float64 on the same numbers."""
    reference = results(ssd_loop, [t.double() for t in inputs], loss)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    found = results(scan, inputs, loss)
    torch.use_deterministic_algorithms(False)
    for i, (r, f) in enumerate(zip(reference, found, strict=True)):
        error = (f.double() - r).norm().item()
        assert error <= limit * r.norm().item() + 1e-9, (i - len(found), error)


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


CASES = [
    *itertools.product((1, 15, 16, 17, 63, 65, 131), (16,), ("both",), ({},)),
    *itertools.product((37,), (16,), ("y", "state", "both"), ({"init": False}, {"h": 3})),
    *itertools.product((73,), (1, 64, 128), ("both",), ({"b": 1, "p": 64, "n": 128},)),
    *itertools.product((41,), (32,), ("both",), ({"b": 1, "h": 1, "p": 128, "n": 256},)),
]


# The interpreter cannot do bfloat16: on a CPU, float16 stands for it.
ones = torch.ones(1, 1, 1, 16, device=DEVICE)
RUNS = [(ssd_chunked, dtype) for dtype in LIMITS]
RUNS += [(ssd_triton, dtype) for dtype in LIMITS if not scan_kernel.why_not_triton(ones.to(dtype), ones[0])]


@pytest.mark.parametrize("scan, dtype", RUNS)
@pytest.mark.parametrize("l, chunk, loss, sizes", CASES)
def test_scan_equals_loop(scan, dtype, l, chunk, loss, sizes):
    """At any length, chunk and tile; with and without an initial state; from a loss on any of the results."""
    check_scan(partial(scan, chunk=chunk), inputs_for(l, dtype, **sizes), LIMITS[dtype], loss)


@pytest.mark.parametrize("scan", SCANS)
def test_scan_takes_any_strides(scan):
    """Every argument, and every gradient that comes in, may be a view with gaps, in which NaN may stand."""
    views = [torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0] for t in inputs_for(40)]
    check_scan(scan, views, loss="strided")
    transposed = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs_for(40)]
    check_scan(scan, transposed, loss="strided")


@needs_triton
@pytest.mark.parametrize("loss", LOSSES)
def test_triton_is_one_operator_that_gives_equal_bits(loss):
    """Twice, and compiled into one graph by torch.compile: the same results and gradients, bit for bit."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    compiled = torch.compile(ssd_triton, fullgraph=True, backend=backend)
    once, again, found = [results(scan, inputs_for(130), loss) for scan in (ssd_triton, ssd_triton, compiled)]
    assert all(map(torch.equal, once, again)) and all(map(torch.equal, once, found))


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("a", [-1e6, -50.0, -5.0, -1e-6, -0.0])
def test_extreme_decays_stay_finite(scan, a):
    """Heads that forget within a token, or never, make neither NaN nor infinity, forward or backward."""
    u, decays, B, C, S = inputs_for(130)
    inputs = u, torch.full_like(decays, a), B, C, S
    assert all(torch.isfinite(t).all() for t in with_gradients(scan, inputs))
    if a > -1:  # else a' is a small difference of large sums
        check_scan(scan, inputs, 1e-4)


@pytest.mark.parametrize("scan", SCANS)
def test_nan_is_not_swallowed(scan):
    """One NaN in a: in the results of that head from there on and nowhere else, and in all gradients."""
    inputs = inputs_for(40)
    inputs[1][1, 21, 0] = math.nan
    y, final, *gradients = with_gradients(scan, inputs)
    assert y[1, 32:, 0].isnan().all() and final[1, 0].isnan().all()
    assert y[0].isfinite().all() and y[1, :, 1].isfinite().all() and y[1, :16, 0].isfinite().all()
    assert all(gradient[1].isnan().any() for gradient in gradients)


ARGUMENTS = dict(zip(("u", "a", "B", "C", "init_state"), random_inputs(2, 5, 4, 8, 16, torch.float32)))


@pytest.mark.parametrize("name, value, expected", [
    ("a", torch.ones(2, 5, 3), r"\(2, 5, 4\)"), ("a", torch.ones(2, 5, 4).half(), "float32"),
    ("B", torch.ones(2, 5, 1, 16), r"\(2, 5, 16\)"), ("B", torch.ones(2, 5, 16).half(), "float32"),
    ("C", torch.ones(2, 5, 8), r"\(2, 5, 16\)"), ("C", torch.ones(2, 5, 16).half(), "float32"),
    ("init_state", torch.ones(2, 4, 16, 8), r"\(2, 4, 8, 16\)"), ("chunk", 0, "power of two"),
    ("init_state", torch.ones(2, 4, 8, 16).half(), "float32"), ("chunk", 48, "power of two"),
    ("backend", "triton", "does not work here"),
])  # fmt: skip
def test_scan_names_the_argument_that_does_not_fit(name, value, expected):
    """Nothing is ignored or guessed: a ValueError names the argument, and what it should be."""
    with pytest.raises(ValueError, match=f"ssd: {name} .*{expected}"):
        ssd(**ARGUMENTS | {name: value})


@pytest.mark.parametrize("scan", SCANS)
@pytest.mark.parametrize("seed", range(4))
def test_laws_of_the_scan(scan, seed):
    """Linear in u and the state; segments with the state carried, cut anywhere, are the same as one pass."""
    draw = random.Random(seed)
    same = partial(assert_close, atol=2e-4, rtol=1e-4)
    l = draw.randint(2, 50)
    u, a, B, C, S = inputs_for(l, b=draw.randint(1, 3), h=draw.randint(1, 3))
    whole = scan(u, a, B, C, S)
    for from_both, written, kept in zip(whole, scan(u, a, B, C), scan(0 * u, a, B, C, S), strict=True):
        same(from_both, written + kept)
    cuts = sorted(draw.sample(range(1, l), draw.randint(1, min(3, l - 1))))
    ys = []
    for parts in zip(*(t.tensor_split(cuts, dim=1) for t in (u, a, B, C))):
        y_part, S = scan(*parts, S)
        ys.append(y_part)
    same((torch.cat(ys, dim=1), S), whole)


def last_row_far_away():
    """Of so many rows only the last is computed: memory that is never touched takes no room."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    def both_passes(u, a, B, C, S):  # u and S also serve as gradients
        y, final, states = scan_kernel._forward(u, a, B, C, S, 16)
        return [y, final, *scan_kernel._backward(u, a, B, C, states, u, S, 16, True)]

    inputs = random_inputs(1, 16, 1, 16, 16, torch.float16)
    expected = both_passes(*inputs)
    launch = scan_kernel._launch
    scan_kernel._launch = lambda k, axes, c, u, *rest, **flags: launch(k, axes, c, u[:1], *rest, **flags)
    last = TensorHandle(np.array([2**23], np.int32), tl.int32)
    InterpreterBuilder.create_get_program_id = lambda *_: last
    far = [t.new_empty(2**23 + 1, *t.shape[1:]) for t in inputs]
    for rows, t in zip(far, inputs):
        rows[-1:] = t
    found = both_passes(*far)
    print(all(torch.equal(r, f[-1:]) for r, f in zip(expected, found, strict=True)))


@needs_triton
def test_triton_offsets_past_2_31_elements():
    """A row more than 2^31 elements from the first: the same bits as alone. (A wrong offset may crash.)"""
    command = ["-c", "import test_all; test_all.last_row_far_away()"]
    assert run_python(*command, interpret="1") == "True\n"


@needs_triton
def test_kernels_compile_for_gpus_that_are_not_here():
    """No spills in bf16 on sm_80 and sm_90, products of bf16 on tensor cores and of float32 exact."""
    command = "--compile --shapes small --dtypes bf16 fp32 --targets sm_80 sm_90 gfx942"
    rows = json.loads(run_python("results/kernel_report.py", *command.split()).splitlines()[-1])["kernels"]
    built = {(row["kernel"].split()[0], row["dtype"], row["target"]) for row in rows}
    assert built >= set(itertools.product(scan_kernel.SETTINGS, ("bf16", "fp32"), command.split()[-3:]))
    for row in rows:
        assert row["shared"] <= (65536 if row["target"] == "gfx942" else 101376), row  # of consumer GPUs
        assert row["dtype"] != "fp32" or row["tf32"] == 0, row
        assert row["dtype"] != "bf16" or row["target"] == "gfx942" or row["spilled"] == 0, row
        if row["dtype"] == "bf16" and row["l"] > 32:  # else some products are of zeros, and left out
            assert row["tensor_ops"] >= row["products"], row


# ---- The model


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "d_state": 16, "headdim": 8, "chunk": 16}
    return Mamba2LM(Mamba2Config(**sizes | {"A_init": "log", "A_init_range": (0.01, 16)} | changes)).double()


def random_ids(b, l, seed=0):
    return torch.randint(61, (b, l), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("cuts", [[1, 50], [3, 4, 70], [32, 64], [2, 3], list(range(1, 77))])
def test_segments_equal_one_pass(cuts):
    """Cut anywhere, with the state carried: the same logits at every position, state and gradients."""
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


def test_generate_draws_from_what_forward_gives():
    """Token by token, with the state carried: the same as from the whole text each time."""
    model = tiny_model()
    idx = random_ids(2, 20)
    generated = model.generate(idx, 12, torch.Generator().manual_seed(0))
    draw = torch.Generator().manual_seed(0)
    for _ in range(12):
        drawn = torch.multinomial(model(idx)[0][:, -1].softmax(-1), 1, generator=draw)
        idx = torch.cat([idx, drawn], dim=1)
    assert torch.equal(generated, idx[:, 20:])


def test_parameters_are_the_official_ones():
    """Names and shapes of mamba_ssm's MambaLMHeadModel (d_inner 64, conv_dim 64 + 2 x 16, 8 heads)."""
    layer = {"norm.weight": (32,), "mixer.dt_bias": (8,), "mixer.A_log": (8,), "mixer.D": (8,)}
    layer |= {"mixer.in_proj.weight": (64 + 96 + 8, 32), "mixer.out_proj.weight": (32, 64)}
    layer |= {"mixer.conv1d.weight": (96, 1, 4), "mixer.conv1d.bias": (96,), "mixer.norm.weight": (64,)}
    rest = {f"{name}.weight": (61, 32) for name in ("backbone.embedding", "lm_head")}
    rest["backbone.norm_f.weight"] = (32,)
    shapes = {name: tuple(t.shape) for name, t in tiny_model(n_layer=1).state_dict().items()}
    assert shapes == rest | {f"backbone.layers.0.{name}": shape for name, shape in layer.items()}


@pytest.mark.parametrize("seed", range(5))
def test_initialisation(seed):
    """dt within [dt_min, dt_max]; A log-uniform, with one head in each of h equal parts."""
    mixer = tiny_model(seed).backbone.layers[0].mixer
    dt = F.softplus(mixer.dt_bias)
    assert 0.99e-3 <= dt.min() and dt.max() <= 0.101
    part = (mixer.A_log.exp() / 0.01).log() / math.log(16 / 0.01) * 8
    assert part.floor().long().tolist() == list(range(8))


@pytest.fixture
def official(tmp_path):
    """-> function that writes a model as mamba_ssm does, in float16, with a tokenizer like GPT-NeoX's."""
    bpe = pytest.importorskip("tokenizers").ByteLevelBPETokenizer(unicode_normalizer="nfc")
    code = ["def hello(world):\n    return world\n" * 9]
    bpe.train_from_iterator(code, 300, special_tokens=[data.SEPARATOR], show_progress=False)
    bpe.add_tokens(["  ", "    "])
    model = Mamba2LM(Mamba2Config(304, d_model=32, n_layer=2, d_state=16, headdim=16))  # 300 ids, padded

    def write(ssm_cfg=(), **changes):
        folder = tmp_path / "official model \u00e9"
        folder.mkdir(exist_ok=True)
        layer = {"layer": "Mamba2", "d_state": 16, "headdim": 16, "chunk_size": 256} | dict(ssm_cfg)
        fields = {"d_model": 32, "d_intermediate": 0, "n_layer": 2, "vocab_size": 300, "ssm_cfg": layer}
        fields |= {"attn_layer_idx": [], "attn_cfg": {}, "rms_norm": True, "pad_vocab_size_multiple": 16}
        (folder / "config.json").write_text(json.dumps(fields | changes))
        (folder / "tokenizer.json").write_text(bpe.to_str())
        torch.save(model.half().state_dict(), folder / "pytorch_model.bin")
        return folder

    return write


def test_official_folder_is_read(official):
    """All weights of a mamba_ssm folder in float16 come as float32; a pickle that could run code does not."""
    file = official() / "pytorch_model.bin"
    model, checkpoint = load_run(file.parent)
    expected = {name: w.float() for name, w in torch.load(file, weights_only=True).items()}
    assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    assert checkpoint["args"]["seq_len"] == 2048
    torch.save({"backbone": os.system}, file)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load_run(file.parent)


OTHER_MODEL = {"attn_layer_idx": [1], "d_intermediate": 64, "rms_norm": False}
OTHER_LAYER = {"layer": "Mamba1", "ngroups": 2, "norm_before_gate": True, "D_has_hdim": True}


@pytest.mark.parametrize("name, value", [*OTHER_MODEL.items(), *OTHER_LAYER.items()])
def test_official_folder_of_another_architecture_is_refused_by_name(official, name, value):
    """What is not implemented here is not ignored."""
    folder = official(**{name: value}) if name in OTHER_MODEL else official({name: value})
    with pytest.raises(ValueError, match=re.escape(f"{name}={value} is not implemented")):
        load_run(folder)


@torch.no_grad()
@pytest.mark.parametrize("tied, l", [(True, 37), (False, 50), (True, 1)])
def test_transformers_computes_the_same(tied, l, tmp_path):
    """Our weights there, theirs here: the same logits, after a text and going on from the state it left."""
    transformers = pytest.importorskip("transformers")
    config = Mamba2Config(61, d_model=32, n_layer=2, d_state=16, headdim=16, tie_embeddings=tied)
    ours = Mamba2LM(config).eval()
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 16, "head_dim": 16}
    sizes |= {"num_heads": 4, "n_groups": 1, "chunk_size": 8, "tie_word_embeddings": tied}
    theirs = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes)).eval()
    weights = ours.state_dict().items()
    theirs.load_state_dict({name.replace("embedding.", "embeddings."): w for name, w in weights})
    idx, more = random_ids(2, l), random_ids(2, 1, seed=1)
    logits, _, state = ours(idx)
    expected = theirs(idx, use_cache=True)
    assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    next_logits = theirs(more, cache_params=expected.cache_params).logits
    assert_close(ours(more, state=state)[0], next_logits, atol=1e-4, rtol=1e-4)
    theirs.config.norm_before_gate = True  # as older versions wrote; it means nothing
    theirs.save_pretrained(tmp_path)
    assert torch.equal(load_run(tmp_path)[0](idx)[0], logits)


def test_hugging_face_tokenizer_gives_the_same_ids(official):
    """The library's own, NFC and runs of spaces included; the text of a separator is no separator."""
    from tokenizers import Tokenizer

    file = official() / "tokenizer.json"
    ours, theirs = data.load_tokenizer(file.parent, 304), Tokenizer.from_file(str(file))
    for text in ("def  hello(cafe\u0301):\n        return\t1\n", "   ", "日本 \U0001f600 a<b", ""):
        ids = ours.encode_ordinary(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.encode_single_token(data.SEPARATOR) not in ours.encode_ordinary(data.SEPARATOR)


# ---- The data

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
    tokenizer = data.read_tokenizer(data.make_tokenizer(spec, [TEXT]))
    assert tokenizer.n_vocab == size and tokenizer.encode_single_token(data.SEPARATOR) == size - 1
    for _ in range(200):
        ends = rng.choices([0x80, 0xD800, 0x110000], k=rng.randrange(60))
        string = "".join(chr(rng.randrange(end)) for end in ends)
        string += rng.choice(["", data.SEPARATOR, "   \n\t x\r\n"])
        string = string.encode(errors="ignore").decode()  # without surrogates
        ids = tokenizer.encode_ordinary(string)
        assert tokenizer.decode(ids) == string and size - 1 not in ids


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
    """Two processes at once leave whole files and nothing else; they are used from then on."""
    command = [sys.executable, "-c", "import data; data.load_corpus('a text.txt', 'bpe300')"]
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    processes = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert len(list(Path("data").glob("*/*"))) == 3
    monkeypatch.setattr(data, "train_bpe", None)
    corpus = data.load_corpus("a text.txt", "bpe300")
    cut = len(TEXT) * 4 // 5
    assert corpus.tokenizer.decode(corpus.train.tolist()) == TEXT[:cut] + data.SEPARATOR
    assert corpus.tokenizer.decode(corpus.val.tolist()) == TEXT[cut:] + data.SEPARATOR


def test_held_out_documents_are_not_trained_on():
    """A fifth of the files of a folder, whichever order they come in; of a single file, its end."""
    documents = {f"{i}.txt": f"text {i}" for i in range(50)}
    train_texts, val_texts = data.split_documents(documents)
    assert len(val_texts) == 10 and sorted(train_texts + val_texts) == sorted(documents.values())
    assert data.split_documents(dict(reversed(documents.items())))[1][::-1] == val_texts
    assert data.split_documents({"a": "0123456789"}) == (["01234567"], ["89"])


@pytest.mark.parametrize("windows", [data.random_windows, data.next_windows])
def test_batches_depend_on_seed_and_step_alone(windows):
    """Targets are the next tokens; another seed or step gives another batch; streams go on in the next."""
    batches = [windows(np.arange(1000), 4, 10, 3, step) for step in range(200)]
    assert all(((batch[:, 1:] - batch[:, :-1]) % 1000 == 1).all() for batch in batches)
    assert torch.equal(batches[5], windows(np.arange(1000), 4, 10, 3, 5))
    assert (batches[5] != windows(np.arange(1000), 4, 10, 4, 5)).any() and (batches[5] != batches[6]).any()
    go_on = [torch.equal(batch[:, -1], following[:, 0]) for batch, following in pairwise(batches)]
    assert all(go_on) if windows is data.next_windows else not any(go_on)
    assert len(set(batches[0][:, 0].tolist())) == 4


# ---- Initial states, training, resuming

SMALL = ["--d_model=16", "--n_layer=2", "--d_state=8", "--headdim=8", "--seq_len=8", "--batch_size=4"]
SMALL += ["--dataset=a text.txt", "--tokenizer=byte", "--device=cpu", "--log_every=2"]


def initial_state(mode, *flags):
    args = train.make_parser().parse_args([f"--init_state={mode}", *flags])
    return train.InitialState(args, torch.device("cpu"), {})


def test_noise_has_the_asked_standard_deviation():
    """noise: mean 0, standard deviation noise_std, another one each step; no noise for the convolution."""
    model, init = tiny_model(), initial_state("noise", "--noise_std=0.3")
    state = init.draw(model, 64, 0)
    for conv, ssm in state:
        assert abs(ssm.std() - 0.3) < 0.01 and abs(ssm.mean()) < 0.01 and (conv == 0).all()
    assert (init.draw(model, 64, 1)[0][1] != state[0][1]).any()


@pytest.mark.parametrize("mode", ["prev", "tbtt"])
def test_carried_states(mode):
    """First zeros, then the last final state, detached, in init_prob of the rows; in tbtt its conv too."""
    model, init = tiny_model(), initial_state(mode, "--init_prob=0.75")
    assert initial_state("zero").draw(model, 8, 0) is None
    assert all((ssm == 0).all() for _, ssm in init.draw(model, 8, 0))
    _, _, final = model(random_ids(8, 16))
    init.observe(final)
    for (conv, ssm), (final_conv, final_ssm) in zip(init.draw(model, 8, 1), final, strict=True):
        assert (ssm[:2] == 0).all() and torch.equal(ssm[2:], final_ssm[2:]) and not ssm.requires_grad
        expected = final_conv[2:] if mode == "tbtt" else 0 * final_conv[2:]
        assert (conv[:2] == 0).all() and (conv[2:] == expected).all() and not conv.requires_grad


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
        assert ((made.mean(1) - seen.mean(1)).abs() < 0.05 * seen.std(1)).all() and (conv == 0).all()


def exit_code(main, *flags):
    """What a script would end with; a message stands for 1."""
    try:
        data.run_script(lambda: main([str(flag) for flag in flags]))
    except SystemExit as stop:
        return stop.code
    return 0


run_train = partial(exit_code, train.main, *SMALL)
run_eval = partial(exit_code, eval_long.main, "--device=cpu")


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def assert_same_run(run, other):
    """The same weights and log, bit for bit, but for the times."""
    runs = [torch.load(f"{folder}/ckpt.pt", weights_only=True) for folder in (run, other)]
    for name in ("model", "optimizer", "kept"):
        assert_close(runs[0][name], runs[1][name], rtol=0, atol=0)
    logs = [read_jsonl(f"{folder}/log.jsonl") for folder in (run, other)]
    for row in itertools.chain(*logs):
        del row["tokens_per_s"]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("mode", ["zero", "noise", "fitted", "prev", "tbtt"])
def test_resumed_run_equals_uninterrupted_one(work, mode, monkeypatch):
    """A gradient that is not finite stops it; resumed from its last checkpoint it is the same bit for bit."""
    flags = [f"--init_state={mode}", "--init_prob=0.7", "--steps=12", "--save_every=3"]
    assert run_train(*flags, "--out=whole") == 0
    rate = train.learning_rate
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", lambda *args: math.nan if args[0] == 6 else rate(*args))
        assert "the gradient of step 7 is not finite" in run_train(*flags, "--out=cut")
    with open("cut/log.jsonl", "a") as file:
        file.write('{"step": 8, "lo')  # a line cut short
    assert run_train("--out=cut", "--resume") == 0
    assert_same_run("cut", "whole")
    assert [row["step"] for row in read_jsonl("cut/log.jsonl")] == [2, 3, 4, 6, 8, 9, 10, 12]


def test_interrupted_at_any_moment(work):
    """Ctrl-C and kill -9, from the first import on: the next call goes on; in the end it is the same run."""
    flags = ["--init_state=tbtt", "--steps=1000", "--save_every=20", "--tokenizer=bpe300", "--out=cut"]
    codes = []
    # Processes that a background job starts would ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    Path("cut").mkdir()
    Path("cut/tokenizer.json").touch()  # what a kill before the first checkpoint may leave
    Path("cut/.ckpt.pt.123").touch()
    for i, lines in enumerate((0, 2, 8, 9, 30, 60)):  # that it prints before
        resume = ["--resume"] if Path("cut/ckpt.pt").exists() else []
        command = [sys.executable, "-u", ROOT / "train.py", *SMALL, *flags, *resume]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(random.uniform(0, 0.3))
        process.send_signal([signal.SIGINT, signal.SIGKILL][i % 2])
        process.communicate()
        codes.append(process.returncode)
    assert 2 not in codes and sum(code != 0 for code in codes) >= 4, codes  # a quick machine may finish
    assert {130, -signal.SIGKILL} <= set(codes), codes
    assert run_train(*flags, "--resume") == run_train(*flags, "--out=whole") == 0
    assert_same_run("cut", "whole")


@pytest.mark.parametrize("file", ["ckpt.pt", "tokenizer.json"])
def test_cut_files_are_found(work, file, capsys):
    """Anywhere: exit code 2 and one line that names the run."""
    assert run_train("--init_state=prev", "--steps=1") == 0
    path = Path("out/prev") / file
    good = path.read_bytes()
    for i in range(20):
        path.write_bytes(good[: random.Random(i).randrange(len(good))])
        assert run_train("--init_from=out/prev", "--out=new") == 2
        assert re.fullmatch(".*out/prev.*\n", capsys.readouterr().err)


D = "backbone.layers.1.mixer.D"
SPOILERS = [  # part of a checkpoint, what is done to it, what the error names
    ("optimizer", lambda _: re.compile(""), "Weights only load"),  # pickled as a call: no file may run code
    ("model", lambda weights: {name: w for name, w in weights.items() if name != D}, D),
    ("model", lambda weights: weights | {D: weights[D][:1]}, D),
    ("config", lambda config: config | {"headdim": 7}, "headdim"),
]


@pytest.mark.parametrize("part, spoil, name", SPOILERS)
def test_checkpoint_that_does_not_fit_is_refused_by_name(work, part, spoil, name, capsys):
    """By training and by evaluation, with exit code 2 and one line, and nothing is made."""
    assert run_train("--init_state=prev", "--steps=1") == 0
    checkpoint = torch.load("out/prev/ckpt.pt", weights_only=True)
    torch.save(checkpoint | {part: spoil(checkpoint[part])}, "out/prev/ckpt.pt")
    assert run_train("--init_from=out/prev", "--out=new") == run_eval("out/prev") == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and name in errors[0] and name in errors[1]
    assert not Path("new").exists() and not Path("out/eval").exists()


def test_full_disk_keeps_the_last_checkpoint(work):
    """A checkpoint that cannot be written whole: one line names it, the one before stays; it can go on."""
    resource = pytest.importorskip("resource")  # not on Windows
    flags = ["--init_state=prev", "--steps=6", "--save_every=2"]
    assert run_train(*flags, "--out=whole") == 0
    limit = int(0.9 * Path("whole/ckpt.pt").stat().st_size)  # the first is smaller: it has no moments of Adam
    options = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))}
    command = [sys.executable, ROOT / "train.py", *SMALL, *flags]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "ckpt.pt could not be written" in done.stderr.splitlines()[-1]
    assert load_run("out/prev")[1]["step"] == 0 and list(Path("out/prev").glob(".*")) == []
    assert run_train("--out=out/prev", "--resume") == 0
    assert_same_run("out/prev", "whole")


def test_modes_differ_in_the_initial_state_only(work):
    """One seed: zero and prev have the same loss in the first step, noise and fitted others."""
    losses = {}
    for mode in ("zero", "noise", "fitted", "prev"):
        assert run_train(f"--init_state={mode}", "--steps=2", "--log_every=1") == 0
        losses[mode] = [row["loss"] for row in read_jsonl(f"out/{mode}/log.jsonl")]
    assert losses["zero"][0] == losses["prev"][0]
    assert len({losses[mode][0] for mode in ("zero", "noise", "fitted")}) == 3
    assert losses["zero"][1] != losses["prev"][1]


def test_post_training_takes_over_the_architecture(work, capsys):
    """--init_from: the other run's weights, sizes and tokenizer; that run stays as it is."""
    assert run_train("--steps=4") == 0
    before = Path("out/zero/ckpt.pt").read_bytes()
    command = [train.main, "--init_from=out/zero", "--init_state=prev"]
    assert exit_code(*command, "--steps=2", "--lr=0") == 0
    assert Path("out/zero/ckpt.pt").read_bytes() == before
    old, new = load_run("out/zero")[1], load_run("out/prev")[1]
    assert_close(new["model"], old["model"], rtol=0, atol=0)  # lr is 0
    assert new["config"] == old["config"] and new["args"]["seq_len"] == old["args"]["seq_len"]
    for name, value in {"tokenizer": "bpe300", "d_model": 32}.items():
        assert exit_code(*command, "--out=other", f"--{name}={value}") == 2
        assert f"--{name} " in capsys.readouterr().err and not Path("other").exists()


@pytest.mark.parametrize("mode", ["fitted", "tbtt"])
def test_two_processes_equal_one(work, mode, capsys):
    """2 x 2 rows by torchrun, killed and resumed, are the same as 1 x 4; one alone may not resume them."""
    flags = (
        f"--init_state={mode} --init_prob=0.75 --lr=1e-4 --dtype=float32 --steps=40 --save_every=10".split()
    )
    assert run_train(*flags, "--out=one") == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    launch += [ROOT / "train.py", "--out=two"]
    process = subprocess.Popen([*launch, *SMALL, *flags, "--batch_size=2"], stdout=subprocess.PIPE, text=True)
    assert any("held-out" in line for line in process.stdout)
    process.terminate()
    process.communicate()
    assert exit_code(train.main, "--out=two", "--resume") == 2
    assert "trained with processes 2, not 1" in capsys.readouterr().err
    subprocess.run([*launch, "--resume"], check=True, stdout=subprocess.DEVNULL)
    one, two = load_run("one")[1], load_run("two")[1]
    assert_close(two["model"], one["model"], atol=1e-5, rtol=1e-4)
    assert_close(two["kept"], one["kept"], atol=1e-4, rtol=1e-3)
    losses = [[row["loss"] for row in read_jsonl(f"{run}/log.jsonl")] for run in ("one", "two")]
    np.testing.assert_allclose(*losses, atol=1e-4)


BAD_FLAGS = [
    ("--steps=0", "argument --steps"), ("--init_prob=1.5", "argument --init_prob"), ("--stepz=5", "--stepz"),
    ("--init_state=last", "argument --init_state"), ("--headdim=5", "headdim"), ("--seq_len=7", "even"),
    ("--A_init_range 5 1", "A_init_range"), ("--seq_len=20000", "less than two windows"),
    ("--dataset=missing.txt", "no such file"), ("--tokenizer=bpe", "--tokenizer=bpe"),
    ("--device=cuda:77", "--device=cuda:77"), ("--backend=triton", "'triton' does not work here"),
    ("--init_from=nowhere", "nowhere holds no checkpoint"), ("--resume", "out/zero holds no checkpoint"),
    ("--out=one", "holds a run"), ("--out=full/thesis.txt/run", "Not a directory"),
    ("eval one other", "different tokenizers"), ("eval one --max_len=4", "less than T = 8"),
    ("eval one --max_len=100000", "would"), ("eval one --max_len=64 --out=full/thesis.txt", "thesis.txt"),
    ("eval one nowhere", "holds no"), ("eval one --max_len=64 --backend=triton --out=full", "not work"),
]  # fmt: skip
NUMBERS = [action.option_strings[0] for action in train.make_parser()._actions if action.type]
NUMBERS += ["eval one --max_len", "eval one --max_len=64 --sequences"]
for flag, value in itertools.product(NUMBERS, ("-1", "nan", "inf", "ten", "1" + 30 * "0")):
    BAD_FLAGS.append((f"{flag} {value} 1" if flag == "--A_init_range" else f"{flag}={value}", "error"))


def test_bad_flags_are_exit_code_2_and_touch_nothing(work, capsys):
    """A message names what is wrong, such as a number that makes no sense; no file is made or changed."""
    assert len(NUMBERS) > 12 and run_train("--steps=1", "--out=one") == 0
    assert run_train("--steps=1", "--out=other", "--tokenizer=bpe300") == 0
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("mine")
    Path("full/results.jsonl").touch()
    before = sorted(Path().rglob("*"))
    for flags, message in BAD_FLAGS:
        run, flags = (run_eval, flags.split()[1:]) if flags.startswith("eval") else (run_train, flags.split())
        capsys.readouterr()
        assert run(*flags) == 2, flags
        assert message in capsys.readouterr().err
        assert sorted(Path().rglob("*")) == before, flags


# ---- The long evaluation


@torch.no_grad()
@pytest.mark.parametrize("at_once", [1, 3 * 5 * 4, 10**6])
def test_evaluation_equals_brute_force(monkeypatch, at_once):
    """Each number, against one pass and separate windows, however many tokens are computed at once."""
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
        nll, other = [losses[:, row["from"] : row["to"]].mean(1) for losses in (full, restarted)]
        excess = nll - other
        expected = nll.mean(), excess.mean(), excess.std() / 3**0.5, window_loss
        found = [row[name] for name in ("nll", "excess", "excess_se", "window_loss")]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
        assert row["tokens"] == 3 * (row["to"] - row["from"])
    assert abs(rows[0]["excess"]) < 1e-6


@pytest.mark.parametrize("sequences, length", [(4, 249), (3, 100), (None, 62), (None, 999)])
def test_sequences_do_not_overlap(sequences, length):
    """The texts are apart, inside the tokens, the same for the same seed; an error says what would fit."""
    tokens = np.zeros(1000)
    starts = eval_long.choose_starts(tokens, length, sequences)
    assert (np.diff(starts) > length).all() and starts[0] >= 0 and starts[-1] + length < 1000
    assert (starts == eval_long.choose_starts(tokens, length, sequences)).all()
    with pytest.raises(ValueError, match="=249 would"):
        eval_long.choose_starts(np.zeros(1000), 250, 4)


def test_evaluation_from_end_to_end(work, monkeypatch, capsys):
    """A table, results.jsonl and a figure; Ctrl-C keeps what is finished, and another call adds to it."""
    assert run_train("--init_state=zero", "--steps=2") == run_train("--init_state=prev", "--steps=2") == 0
    command = ["out/zero", "out/prev", "--max_len=512", "--sequences=4", "--out=ev"]
    evaluate = eval_long.evaluate

    def interrupted(*args):
        if Path("ev/results.jsonl").stat().st_size:
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(eval_long, "evaluate", interrupted)
        assert run_eval(*command) == 130
    finished = read_jsonl("ev/results.jsonl")
    assert run_eval(*command) == 0
    out, rows = capsys.readouterr().out, read_jsonl("ev/results.jsonl")
    assert [row["to"] for row in rows] == 3 * [8, 16, 32, 64, 128, 256, 512]
    assert rows[:7] == rows[7:14] == finished
    assert all(f"{math.exp(row['nll']):.2f} {row['excess']:+8.3f}" in out for row in rows)
    assert Path("ev/excess.png").stat().st_size > 10_000


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


# ---- The words

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAINS = {"train": train, "eval_long": eval_long}


def commands_in(text):
    """(script, flags) of each command of train.py and eval_long.py in a code block."""
    launch = r"(?:python|torchrun --nproc_per_node=\d+)"
    found = re.findall(rf"^ *(?:[^`\n]*&& *)?{launch} (train|eval_long)\.py\b(.*)", text, re.MULTILINE)
    commands = [(script, re.split(" {3,}|[#&|]", rest)[0].split()) for script, rest in found]
    return [(script, flags) for script, flags in commands if flags != ["--help"]]


def test_help_works_anywhere(tmp_path):
    """--help needs no data and no GPU, and makes no file."""
    for script in MAINS:
        assert "--dataset" in run_python(ROOT / f"{script}.py", "--help", folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_commands_and_flags_in_the_texts_exist():
    """Each command in the README and in the docstrings is accepted, and so is each `--flag` in a sentence."""
    commands = commands_in(README + "\n" + train.__doc__ + eval_long.__doc__)
    assert len(commands) > 8
    for script, flags in commands:
        MAINS[script].make_parser().parse_args(flags)
    known = [*train.make_parser()._option_string_actions, *eval_long.make_parser()._option_string_actions]
    assert set(re.findall(r"`(--\w+)", README)) <= set(known)


def test_commands_in_the_readme_run(work, official, monkeypatch):
    """In its order, as they stand there, but for small sizes, two steps and a short text."""
    read = data.read_documents
    monkeypatch.setattr(data, "read_documents", lambda _: read("a text.txt"))
    shutil.copytree(ROOT / "results/base", "results/base")
    official().rename("mamba2-130m")
    for script, flags in commands_in(README):
        names = {flag.partition("=")[0] for flag in flags}
        more = ["--steps=2"]
        if script == "eval_long":
            more = ["--max_len=2048", "--sequences=1"]
        elif "--init_from" in names:
            more.append("--batch_size=1")
        elif "--resume" not in names:
            more += SMALL
        assert exit_code(MAINS[script].main, *flags, *more) == 0, flags
    assert Path("out/eval/excess.png").exists()


def test_tables_in_the_readmes_were_measured():
    """Each table in both READMEs is what results/report.py makes of the committed results."""
    from results import report

    found = report.tables(report.Results(read_jsonl(ROOT / "results/results.jsonl")))
    for text in (README, (ROOT / "results/README.md").read_text(encoding="utf-8")):
        assert report.fill(text, found) == text
        assert set(re.findall(r"<!-- (?!end)(\w+) -->", text)) <= set(found)


# In sentences, but no results: the mark for "repaired", aims, a share, the name of a paper, versions.
NOT_MEASURED = {"0.05", "0.5", "0.03", "0.1", "2507.02782", "2410.07145", "3.10", "3.11"}


@pytest.mark.parametrize("path", ["README.md", "results/README.md"])
def test_numbers_in_sentences_stand_in_a_table(path):
    """Each decimal number in a sentence is one of the tables of its section, rounded."""
    for section in re.split("^## ", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE):
        lines = section.splitlines()
        tables = " ".join(line for line in lines if line.startswith(("|", "    ")))
        known = [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*(?:\.\d+)?", tables)]
        words = " ".join(line for line in lines if not line.startswith(("|", "    ")))
        for number in set(re.findall(r"\d+\.\d+(?![\dM])", words)) - NOT_MEASURED:
            places = len(number.partition(".")[2])
            assert any(f"{value:.{places}f}" == number for value in known), (section[:40], number)


def test_base_run_is_small_and_cannot_be_resumed(capsys):
    """results/base: weights only, below 3 MB; --resume is refused in a line that says what to do instead."""
    folder = ROOT / "results/base"
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * 2**20
    model, _ = load_run(folder)
    data.load_tokenizer(folder, model.config.vocab_size)
    assert exit_code(train.main, f"--out={folder}", "--resume") == 2
    assert re.fullmatch(".*--init_from.*\n", capsys.readouterr().err)
