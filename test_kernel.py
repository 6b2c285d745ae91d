"""The Triton kernels: on CPU tensors in Triton's interpreter, compiled for GPUs that are not here, on a GPU if one is.

    python -m pytest -q test_kernel.py

Passed with triton 3.5.0 (whose interpreter needs NumPy below 2.4), 3.7.0 and 3.9.0, without a GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, and only where there is no GPU

import scan_kernel
from scan_kernel import ssd, ssd_loop

pytestmark = pytest.mark.skipif(scan_kernel.triton is None, reason="triton is not installed")
needs_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU")
DEVICE = "cuda" if GPU else "cpu"
# Triton's interpreter (3.5 to 3.9) computes with the raw 16 bits of bfloat16. So bfloat16 is tested on a GPU only; its
# evidence elsewhere is float16, the same code with another type, and the compile report.
LIMITS = {torch.float32: 1e-5, torch.float16: 5e-3} | ({torch.bfloat16: 1e-2} if GPU else {})
NAMES = ("y", "final_state", "dx", "ddt", "dA", "dB", "dC", "dinit_state")


@pytest.fixture(autouse=True)
def nan_filled():
    """What a kernel forgets to write is NaN: this mode fills torch.empty."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_inputs(l, dtype=torch.float32, p=16, n=16, g=1, b=2, h=2, init=True):
    torch.manual_seed(l)
    x, B, C = (torch.randn(b, l, *s).to(dtype) for s in ((h, p), (g, n), (g, n)))
    dt, A, S = 0.1 * torch.rand(b, l, h), -1 - 15 * torch.rand(h), torch.randn(b, h, p, n)
    return [t.to(DEVICE) for t in (x, dt, A, B, C) + ((S,) if init else ())]


def results(scan, inputs, loss="both"):
    """y, final_state and all gradients of a random weighting of y, of final_state, or of both."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    y, S = scan(*inputs)
    torch.manual_seed(1)
    weights = [torch.randn(t.shape).to(t) for t in (y, S)]
    total = sum((t * w).sum() for t, w, k in zip((y, S), weights, ("y", "state")) if loss in (k, "both"))
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return dict(zip(NAMES, (y, S, *grads)))


def assert_close(reference, out, dtype, limit=None):
    """RMS(error) / RMS(reference) of every result and gradient; dA, a sum over all tokens, may have twice as much."""
    ratios = {}
    for name, r in reference.items():
        r = torch.zeros_like(out[name]) if r is None else r
        error = (out[name].double() - r.double()).square().mean().sqrt().item()
        ratios[name] = error / (r.double().square().mean().sqrt().item() or 1.0)
    print(" ".join(f"{name} {ratio:.1e}" for name, ratio in ratios.items()))
    for name, ratio in ratios.items():
        assert ratio < (limit or LIMITS[dtype]) * (2 if name == "dA" and dtype == torch.float32 else 1), (name, ratio)


def triton(chunk):
    return lambda *tensors: ssd(*tensors, chunk=chunk, backend="triton")


def run_python(command):
    """Standard output of a process without the interpreter and without a GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, check=False,
                          cwd=Path(__file__).parent)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(inputs, dtype, loss="both", chunk=16):
    reference = results(ssd_loop, [t.double() for t in inputs], loss)
    assert_close(reference, results(triton(chunk), inputs, loss), dtype)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("l", [1, 15, 16, 17, 63, 65, 100, 131])
def test_triton_matches_loop_at_any_length(l, dtype):
    """Any length, also no multiple of the chunk, two groups: results and every gradient equal the recurrence's."""
    check(make_inputs(l, dtype, g=2), dtype)


@pytest.mark.parametrize("loss", ["y", "state", "both"])
@pytest.mark.parametrize("init", [True, False])
def test_triton_gradients_reach_everything_from_either_result(loss, init):
    """A loss on y alone, on final_state alone or on both, with and without an initial state, heads sharing B and C."""
    check(make_inputs(37, init=init, h=3), torch.float32, loss)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("p, n, chunk", [(64, 128, 64), (64, 128, 128), (128, 256, 32), (32, 64, 16), (16, 32, 1)])
def test_triton_matches_loop_with_every_launch_setting(p, n, chunk, dtype):
    """Each row of the table, at every chunk size and with tiles of p and n smaller than p and n."""
    check(make_inputs(chunk + 9, dtype, p, n, b=1), dtype, chunk=chunk)


def test_triton_takes_views_into_one_projection_and_other_strides():
    """x, B and C as slices of one tensor, as the model passes them, and as transposed tensors."""
    x, dt, A, B, C, S = make_inputs(40)
    packed = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
    x, B, C = (t.unflatten(2, (-1, 16)) for t in packed.split((32, 16, 16), dim=2))
    check((x, dt, A, B, C, S), torch.float32)
    check([t.mT.contiguous().mT if t.dim() > 1 else t for t in (x, dt, A, B, C, S)], torch.float32)


def test_triton_decays_never_overflow():
    """Huge dt A, and none at all: exp sees no positive number, and nothing becomes infinite or NaN."""
    x, dt, A, B, C, S = make_inputs(40)
    for factor in (0.0, 1e3):
        out = results(triton(64), (x, dt * factor, A * 1e3, B, C, S))
        assert all(t.isfinite().all() for t in out.values())


def test_triton_is_deterministic_and_carries_over():
    """Two runs give the same bits; two parts with the state handed over equal the whole."""
    x, dt, A, B, C, S = make_inputs(48)
    y, final_state = triton(16)(x, dt, A, B, C, S)
    y1, S = triton(16)(x[:, :20], dt[:, :20], A, B[:, :20], C[:, :20], S)
    y2, S = triton(16)(x[:, 20:], dt[:, 20:], A, B[:, 20:], C[:, 20:], S)
    assert_close({"y": y, "S": final_state}, {"y": torch.cat([y1, y2], 1), "S": S}, torch.float32)
    first, second = (results(triton(16), make_inputs(20)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_triton_compiles_into_one_graph():
    """torch.compile(fullgraph=True) sees one operator: same results, same gradients, final_state's included."""
    for loss in ("both", "state"):
        compiled = torch.compile(triton(16), fullgraph=True, backend="inductor" if GPU else "aot_eager")
        inputs = make_inputs(33)
        assert_close(results(triton(16), inputs, loss), results(compiled, inputs, loss), torch.float32, 1e-6)


def test_triton_refuses_by_name():
    """What the kernels cannot take is a ValueError that names the argument; left to choose, ssd takes torch for it."""
    for inputs, message in (
        (make_inputs(4, p=8), "p of x should be 16, "),
        (make_inputs(4, n=8), "n of B should be 16, "),
        ([t.double() for t in make_inputs(4)], "x should be 32 or 16 bits"),
    ):
        with pytest.raises(ValueError, match=message):
            triton(16)(*inputs)
        ssd(*inputs)
    code = (
        "import torch, scan_kernel; print(scan_kernel.triton_needs(torch.ones(1, 1, 1, 16), torch.ones(1, 1, 1, 16)))"
    )
    assert "backend" in run_python(["-c", code]), "without the interpreter a CPU cannot run the kernels"


def far_rows():
    row = 2**27 + 16  # elements; the last row lies past 2^31, and memory that is never touched takes no room
    x, dt, A, B, C, S = make_inputs(17, torch.float16, b=1)
    far = torch.empty(17 * row, dtype=torch.float16).as_strided(x.shape, (17 * row, row, 16, 1))
    check((far.copy_(x), dt, A, B, C, S), torch.float16)


def test_triton_offsets_past_2_31_elements():
    """Rows of x further than 2^31 elements from the first. On its own: a wrong offset would end the process."""
    run_python(["-c", f"import {Path(__file__).stem} as tests; tests.far_rows()"])


def test_kernels_compile_for_gpus_that_are_not_here():
    """bf16, p 64, n 128, chunk 64: no spills on sm_80 and sm_90, a tensor-core instruction for every product, shared
    memory that consumer GPUs have; fp32: no product rounded to tf32."""
    command = ["results/kernel_report.py", "--compile", "--shapes", "small", "--targets", "sm_80", "sm_90", "gfx942"]
    rows = json.loads(run_python(command).splitlines()[-1])["kernels"]
    assert len(rows) == 2 * 3 * 5
    for row in rows:
        assert row["shared"] <= (65536 if row["target"] == "gfx942" else 101376), row
        assert row["tf32"] == 0, row
        if row["dtype"] == "bf16":
            assert row["tensor_ops"] >= row["products"], row
            assert row["spilled"] == 0 or row["target"] == "gfx942", row


@needs_gpu
@pytest.mark.parametrize("p, n, g, chunk", [(64, 128, 1, 64), (128, 256, 2, 64), (32, 128, 1, 32)])
def test_triton_matches_loop_on_a_gpu(p, n, g, chunk):
    """The real thing, in bfloat16, at the sizes of real models."""
    check(make_inputs(1000, torch.bfloat16, p, n, g, h=8), torch.bfloat16, chunk=chunk)
