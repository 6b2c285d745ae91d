"""What the scan's kernels cost: compiled for GPUs that this machine does not have, or timed on the one it has.

    python results/kernel_report.py --compile    registers, spills, shared memory, ... of every kernel; needs no GPU
    python results/kernel_report.py --sweep      times other launch settings on this GPU, prints the table to paste
    python results/kernel_report.py              times the scan: the kernels on a GPU, the torch versions on a CPU

The last line of each is one JSON object. results/kernel_compile.txt is the output of the first.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import scan_kernel

KERNELS = ["walk_kernel", "output_kernel", "inputs_grad_kernel", "group_grad_kernel"]
SHAPES = {  # h, p, g, n, chunk
    "tiny": (8, 32, 1, 128, 32),
    "small": (16, 64, 1, 128, 64),
    "mamba2-130m": (24, 64, 1, 128, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# For the estimate of occupancy, a multiprocessor's: warps, KB of shared memory, KB that a program reserves on top
TARGETS = {
    "sm_80": ("cuda", 80, 32, 64, 164, 1),
    "sm_89": ("cuda", 89, 32, 48, 100, 1),
    "sm_90": ("cuda", 90, 32, 64, 228, 1),
    "sm_120": ("cuda", 120, 32, 48, 100, 1),
    "gfx942": ("hip", "gfx942", 64, 32, 64, 0),
}

HEAD = """Kernels for b = 1, l = 2048, built by triton {}. Registers and spilled bytes of a thread; shared memory of a program;
tensor-core instructions / matrix products in the code; warps in flight over the most there can be, estimated; bytes that
all programs together load and store over the least (each tensor once).

shape       dtype target  kernel              P   N warps  registers spilled  shared  tensor/products warps   bytes"""


def make_inputs(b, l, h, p, g, n, dtype, device="cpu"):
    """Arguments of `ssd`, all of them with gradients."""
    x, B, C = (torch.randn(b, l, *s, device=device).to(dtype) for s in ((h, p), (g, n), (g, n)))
    dt, A = torch.rand(b, l, h, device=device) * 0.1, -1 - 15 * torch.rand(h, device=device)
    return [t.requires_grad_() for t in (x, dt, A, B, C, torch.randn(b, h, p, n, device=device))]


# ----------------------------------------------------------------------------------------------------------------------
# --compile: let the wrapper run with kernels that write down how they are called, then build what they were called with
# ----------------------------------------------------------------------------------------------------------------------


class Recorder:
    """Stands in for a kernel: kernel[grid](*args, **options) is written down and not run."""

    def __init__(self, kernel, calls):
        self.kernel, self.fn, self.calls = kernel, kernel.fn, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, grid, args, kwargs))


def record(shape, dtype, b=1, l=2048):
    """The launches of one forward and backward pass, as (kernel, grid, args, kwargs)."""
    calls, (h, p, g, n, chunk) = [], shape
    with mock.patch.multiple(scan_kernel, **{k: Recorder(getattr(scan_kernel, k), calls) for k in KERNELS}):
        inputs = make_inputs(b, l, h, p, g, n, dtype)
        outputs = scan_kernel.ssd_triton(*inputs, chunk=chunk)
        torch.autograd.grad(outputs, inputs, [torch.zeros_like(t) for t in outputs])
    return calls


def build(call, target):
    """Compiles a recorded launch for a target as the launch itself would, with the same specialisation."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, _, args, kwargs = call
    values = dict(zip(kernel.arg_names, args)) | {k: v for k, v in kwargs.items() if k in kernel.arg_names}
    signature, constants, attrs = {}, {}, {}
    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        elif kernel.params[i].is_constexpr or value is None or value == 1:
            signature[name], constants[i,] = "constexpr", value
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attrs[i,] = [["tt.divisibility", 16]]
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    source = ASTSource(kernel, signature, constants, attrs)
    return triton.compile(source, target=GPUTarget(*TARGETS[target][:3]), options=options)


def resources(compiled, target, warps):
    """Registers a thread, spilled bytes a thread, shared memory, matrix instructions, warps that fit: one build."""
    backend, _, _, max_warps, shared_kb, reserved_kb = TARGETS[target]
    shared = compiled.metadata.shared
    if backend == "hip":
        text = compiled.asm["amdgcn"]
        number = lambda key: int(re.search(rf"{key}:?\s+(\d+)", text).group(1))
        registers, spilled = number(r"\.vgpr_count"), 4 * number(r"\.vgpr_spill_count")
        spilled = max(spilled, number(r"\.private_segment_fixed_size"))
        tensor_ops, tf32 = len(re.findall("v_mfma", text)), len(re.findall("v_mfma.*xf32", text))
        per_simd = 512 // max(8, -(-registers // 8) * 8)
        by_registers = 4 * min(per_simd, 8) // warps
    else:
        import triton

        tool = Path(triton.__file__).parent / "backends/nvidia/bin" / ("cuobjdump" + ".exe" * (os.name == "nt"))
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            text = subprocess.check_output([tool, "-res-usage", f"{folder}/kernel.cubin"], text=True)
        registers, stack, local = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK", "LOCAL"))
        spilled, ptx = stack + local, compiled.asm["ptx"]
        tensor_ops = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx))
        tf32 = len(re.findall(r"mma.*\.tf32", ptx))
        by_registers = 65536 // (-(-registers // 8) * 8 * 32) // warps
    by_shared = int(shared_kb * 1024 // max(1, shared + reserved_kb * 1024))
    fits = min(by_registers, by_shared, max_warps // warps)
    return {"registers": registers, "spilled": spilled, "shared": shared, "tensor_ops": tensor_ops, "tf32": tf32,
            "occupancy": round(fits * warps / max_warps, 2)}  # fmt: skip


def traffic(call):
    """Bytes that the programs of a launch load and store together, and the least: each tensor once."""
    kernel, grid, args, kw = call
    q, p, n, n_all = kw["Q"], kw["P"], kw["N"], kw["N_ALL"]
    e, f = args[0].element_size(), 4
    programs, chunks = grid[0], args[kernel.arg_names.index("chunks")]
    per_program = {
        "walk_kernel": chunks * ((q * p + q * n + p * n) * e + q * f) + 2 * p * n * f,
        "output_kernel": (2 * q * p + 2 * q * n_all + p * n_all) * e + q * f,
        "inputs_grad_kernel": (3 * q * p + 2 * q * n_all + 2 * p * n_all) * e + 2 * q * f,
        "group_grad_kernel": kw["H"] // kw["G"] * kw["P_ALL"] * 2 * (2 * q + n) * e + 4 * q * n * e,
    }[kernel.fn.__name__]
    least = sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
    return programs * per_program, least


def compile_report(args):
    """Prints a row for each kernel, shape, type and target; returns the rows."""
    print(HEAD.format(scan_kernel.triton.__version__))
    rows = []
    for name, dtype in itertools.product(args.shapes, args.dtypes):
        for call, target in itertools.product(record(SHAPES[name], DTYPES[dtype]), args.targets):
            kernel, kw, (moved, least) = call[0], call[3], traffic(call)
            row = {"shape": name, "dtype": dtype, "target": target, "kernel": kernel.fn.__name__}
            if row["kernel"] == "walk_kernel":
                row["kernel"] += " back" * kw["REVERSE"]
            row |= {"P": kw["P"], "N": kw["N"], "warps": kw["num_warps"], "products": kernel.src.count("tl.dot(")}
            row |= resources(build(call, target), target, kw["num_warps"]) | {"bytes": round(moved / least, 2)}
            rows.append(row)
            print("{shape:12}{dtype:6}{target:8}{kernel:19}{P:3}{N:4}{warps:6}{registers:11}{spilled:8}{shared:8,}"
                  "{tensor_ops:10} /{products:2}{occupancy:10.0%}{bytes:7.2f}x".format(**row), flush=True)  # fmt: skip
    return {"triton": scan_kernel.triton.__version__, "kernels": rows}


# ----------------------------------------------------------------------------------------------------------------------
# Times. On a GPU none of this has to wait for a build: every function is called before it is timed
# ----------------------------------------------------------------------------------------------------------------------


def median_ms(function, device, seconds=0.5):
    """Median time of a call, after two that do not count."""
    for _ in range(2):
        function()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            function()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        else:
            t = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - t))
    return statistics.median(times)


def scan_ms(scan, inputs, device):
    """ms forward, ms forward and backward."""
    weights = [torch.randn_like(t) for t in scan(*inputs)]
    with torch.no_grad():
        forward = median_ms(lambda: scan(*inputs), device)
    return forward, median_ms(lambda: torch.autograd.grad(scan(*inputs), inputs, weights), device)


def others():
    """The same scan by mamba_ssm and by fla, where they are installed (fla takes B and C for every head, and S^T)."""
    found = {}
    with contextlib.suppress(ImportError):
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as mamba

        options = {"chunk_size": 256, "return_final_states": True}
        found["mamba_ssm"] = lambda x, dt, A, B, C, S: mamba(x, dt, A, B, C, initial_states=S, **options)
    with contextlib.suppress(ImportError):
        from fla.ops.simple_gla import chunk_simple_gla as gla

        heads = lambda t, x: t.repeat_interleave(x.shape[2] // t.shape[2], 2)
        found["fla"] = lambda x, dt, A, B, C, S: gla(heads(C, x), heads(B, x), x * dt[..., None].to(x.dtype), dt * A,
            scale=1.0, initial_state=S.mT.contiguous(), output_final_state=True)  # fmt: skip
    return found


def benchmark(args):
    """Times of the scan from l = 256 on, with b l constant where that is possible."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h, p, g, n, chunk = SHAPES[args.shapes[0]]
    dtype = args.dtypes[0]
    scans = {k: functools.partial(scan_kernel.ssd, chunk=chunk, backend=k) for k in ("triton", "torch")}
    if device == "cpu":
        scans = {"torch": scans["torch"], "loop": scan_kernel.ssd_loop}
    else:
        scans |= others()
    where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    square, big = torch.randn(2048, 2048, device=device).to(DTYPES[dtype]), torch.empty(2**24, device=device)
    report = {"device": where, "shape": args.shapes[0], "dtype": dtype}
    report["matmul_tflops"] = 2 * 2048**3 / median_ms(lambda: square @ square, device) / 1e9
    report["copy_gbs"] = 8 * big.numel() / median_ms(big.clone, device) / 1e6
    print(", ".join(f"{key} {value:.1f}" if isinstance(value, float) else value for key, value in report.items()))
    print("      b       l  scan         forward ms   and backward ms   GB/s forward (least bytes)   TFLOP/s (both)")
    # bytes a token: x, B twice, C, y, and the states once written, once read
    least = DTYPES[dtype].itemsize * (3 * h * p + 3 * g * n + 2 * h * p * n / chunk)
    # products a token: C B^T, W u, u^T B and C S^T; then these again, and twice each of them for the gradients
    flops = 2 * h * ((chunk * n + chunk * p + 2 * n * p) + (chunk * n + 3 * chunk * p + 5 * n * p))
    report["times"] = []
    for l in args.lengths:
        b = max(1, args.tokens // l)
        inputs = make_inputs(b, l, h, p, g, n, DTYPES[dtype], device)
        for name, scan in scans.items():
            if name == "loop" and l > 512:
                continue  # minutes
            forward, both = scan_ms(scan, inputs, device)
            row = {"b": b, "l": l, "scan": name, "forward_ms": forward, "both_ms": both}
            row |= {"gbs": least * b * l / forward / 1e6, "tflops": flops * b * l / both / 1e9}
            report["times"].append(row)
            print("{b:7}{l:8}  {scan:10}{forward_ms:13.3f}{both_ms:18.3f}{gbs:29.1f}{tflops:17.2f}".format(**row))
    return report


def sweep(args):
    """Times of other launch settings, one kernel after the other, and the table to paste into scan_kernel.py."""
    assert torch.cuda.is_available(), "--sweep times kernels: it needs a GPU"
    h, p, g, n, chunk = SHAPES[args.shapes[0]]
    scan = functools.partial(scan_kernel.ssd, chunk=chunk, backend="triton")
    report = {"device": torch.cuda.get_device_name(), "shape": args.shapes[0]}
    for dtype, name in itertools.product(args.dtypes, KERNELS):
        column = int(dtype == "fp32")
        inputs = make_inputs(max(1, args.tokens // 2048), 2048, h, p, g, n, DTYPES[dtype], "cuda")
        before, times = scan_kernel.SETTINGS[name], {}
        for setting in {before[column], *itertools.product((32, 64), (32, 64), (4, 8), (1, 2, 3))}:
            scan_kernel.SETTINGS[name] = (setting, setting)
            try:
                times[setting] = scan_ms(scan, inputs, "cuda")[1]
            except RuntimeError as error:  # more shared memory than there is
                print(f"{dtype} {name} {setting}: {type(error).__name__}")
        best = min(times, key=times.get)
        print(f"{dtype} {name}: {times[before[column]]:.3f} ms with {before[column]}, {times[best]:.3f} ms with {best}")
        scan_kernel.SETTINGS[name] = tuple(best if i == column else before[i] for i in range(2))
    print("\nSETTINGS = " + repr(scan_kernel.SETTINGS))
    return report | {"settings": scan_kernel.SETTINGS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="build every kernel and report; needs Triton, no GPU")
    parser.add_argument("--sweep", action="store_true", help="time other launch settings; needs a GPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="all for --compile, else small (only one counts)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="bf16 and fp32; for times on a CPU fp32, else bf16")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="GPUs of --compile; all")
    parser.add_argument("--tokens", type=int, help="b l of the times, if l is not more (65536 on a GPU, 2048 on a CPU)")
    parser.add_argument("--lengths", type=int, nargs="+", help="l of the times, in tokens (256 to 131072, or to 4096)")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    args.shapes = args.shapes or (list(SHAPES) if args.compile else ["small"])
    args.dtypes = args.dtypes or (["bf16", "fp32"] if args.compile or args.sweep else ["bf16" if gpu else "fp32"])
    args.tokens = args.tokens or (65536 if gpu else 2048)
    args.lengths = args.lengths or [256, 512, 1024, 2048, 4096] + [8192, 16384, 32768, 65536, 131072] * gpu
    print(json.dumps((compile_report if args.compile else sweep if args.sweep else benchmark)(args)))
