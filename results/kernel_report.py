"""What the scan's kernels cost: compiled for GPUs that this machine does not have, or timed on the one it has.

    python results/kernel_report.py --compile    registers, spills, shared memory, ... of every kernel; needs no GPU
    python results/kernel_report.py --sweep      times other launch settings on this GPU, prints the table to paste
    python results/kernel_report.py              times the scan: the kernels on a GPU, the torch versions on a CPU

The last line of each is one JSON object. results/kernel_compile.txt is the output of the first.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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
        self.kernel, self.calls = kernel, calls

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.calls.append((self.kernel, grid, args, kwargs))


def record(shape, dtype, b=8, l=2048):
    """The launches of one forward and backward pass, as (kernel, grid, args, kwargs)."""
    calls, (h, p, g, n, chunk) = [], shape
    kernels = {name: getattr(scan_kernel, name) for name in KERNELS}
    try:
        for name, kernel in kernels.items():
            setattr(scan_kernel, name, Recorder(kernel, calls))
        inputs = make_inputs(b, l, h, p, g, n, dtype)
        y, final_state = scan_kernel.ssd_triton(*inputs, chunk=chunk)
        torch.autograd.grad((y, final_state), inputs, (torch.zeros_like(y), torch.zeros_like(final_state)))
    finally:
        for name, kernel in kernels.items():
            setattr(scan_kernel, name, kernel)
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
    programs, chunks = grid[0] * grid[1] * grid[2], args[kernel.arg_names.index("chunks")]
    per_program = {
        "walk_kernel": chunks * ((q * p + q * n + p * n) * e + q * f) + 2 * p * n * f,
        "output_kernel": (2 * q * p + 2 * q * n_all + p * n_all) * e + q * f,
        "inputs_grad_kernel": (3 * q * p + 2 * q * n_all + 2 * p * n_all) * e + 2 * q * f,
        "group_grad_kernel": kw["H"] // kw["G"] * kw["P_ALL"] * 2 * (q + n) * e + 4 * q * n * e,
    }[kernel.__name__]
    least = sum(t.numel() * t.element_size() for t in args if isinstance(t, torch.Tensor))
    return programs * per_program, least
