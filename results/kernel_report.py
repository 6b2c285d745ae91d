"""What the kernels of the scan cost: built for GPUs that are not here, or timed on the one that is.

    python results/kernel_report.py --compile    registers, spills, shared memory, ... of each; needs no GPU
    python results/kernel_report.py --sweep      times other launch settings, prints the table to paste

The last line of each is one JSON object. results/kernel_compile.txt is the output of the first.
"""

import argparse
import functools
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path
from unittest import mock

import torch
import triton

sys.path.insert(0, str(Path(__file__).parent.parent))
import scan_kernel

KERNELS = {name: getattr(scan_kernel, name) for name in scan_kernel.SETTINGS}
SHAPES = {  # h, p, n, chunk
    "tiny": (8, 32, 128, 64),
    "small": (16, 64, 128, 64),
    "mamba2-130m": (24, 64, 128, 64),
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CASES = [(2048, 5), (32, 4)]  # l, and how many of u, a, B, C, init_state

# Of a multiprocessor: warps, shared memory, and what each program takes of it beyond its own.
Target = namedtuple("Target", "backend arch warp_size most_warps shared_kb reserved_kb")
TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 164, 1),
    "sm_89": Target("cuda", 89, 32, 48, 100, 1),
    "sm_90": Target("cuda", 90, 32, 64, 228, 1),
    "sm_120": Target("cuda", 120, 32, 48, 100, 1),
    "gfx942": Target("hip", "gfx942", 64, 32, 64, 0),
}

# ------------------------------------------------------------------------------------------------------------
# The launches of a scan, written down instead of run
Launch = namedtuple("Launch", "kernel grid args kwargs")


class Recorder(namedtuple("Recorder", "kernel fn launches")):
    """Stands in for a kernel: what kernel[grid](*args, **kwargs) would launch is appended to `launches`."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append(Launch(self.kernel, grid, args, kwargs))


def make_inputs(dtype, b, l, h, p, n):
    """u, a, B, C, init_state"""
    u, B, C = (torch.randn(shape, dtype=DTYPES[dtype]) for shape in ((b, l, h, p), (b, l, n), (b, l, n)))
    return [u, -torch.rand(b, l, h), B, C, torch.randn(b, h, p, n)]


def record(inputs, chunk):
    """-> the launches of a forward and a backward pass; run in this order, they compute it."""
    launches = []
    recorders = {name: Recorder(kernel, kernel.fn, launches) for name, kernel in KERNELS.items()}
    with mock.patch.multiple(scan_kernel, **recorders):
        outputs = scan_kernel.ssd_triton(*inputs, chunk=chunk)
        outputs = outputs[: len(inputs) - 3]  # without an initial state, no gradient of the final one either
        torch.autograd.grad(outputs, inputs, outputs)  # the outputs serve as their own gradients
    return launches


# ------------------------------------------------------------------------------------------------------------
# --compile


def build(launch, target):
    """Compiles what the launch would compile on the target, with the same specialisation."""
    kernel, _, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args)) | kwargs
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        value = values[name]
        if isinstance(value, torch.Tensor):
            signature[name] = pointers[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif kernel.params[i].is_constexpr or value is None or value == 1:
            signature[name] = "constexpr"
            constants[i,] = value
        else:
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
    options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    gpu = triton.backends.compiler.GPUTarget(target.backend, target.arch, target.warp_size)
    return triton.compile(source, target=gpu, options=options)


def read_nvidia(compiled):
    """-> of a thread: registers, bytes spilled; in the code: tensor-core instructions, those that are tf32"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.check_output(command, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", usage)
    registers, stack, local = map(int, found.groups())
    products = re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b.*", compiled.asm["ptx"])
    return registers, stack + local, len(products), sum(".tf32" in line for line in products)


def read_amd(compiled):
    """The same. What has no register may be counted as spilled or as private memory."""
    code = compiled.asm["amdgcn"]
    names = (r"\.vgpr_count", r"\.vgpr_spill_count", r"\.private_segment_fixed_size")
    registers, spilled, private = (int(re.search(rf"{name}:?\s+(\d+)", code)[1]) for name in names)
    products = re.findall("v_mfma.*", code)
    return registers, max(4 * spilled, private), len(products), sum("xf32" in line for line in products)


def occupancy(target, warps, registers, shared):
    """Warps on a multiprocessor over the most there can be: as many as registers and shared memory allow."""
    registers = max(8, -(-registers // 8) * 8)  # handed out in eights
    by_registers = 4 * (512 // registers) // warps  # each quarter of a multiprocessor has 512 a lane
    by_shared = target.shared_kb * 1024 // max(1, shared + target.reserved_kb * 1024)
    programs = min(by_registers, by_shared, target.most_warps // warps)
    return round(programs * warps / target.most_warps, 2)


HEAD = """Kernels of triton {}, forward and backward. l = 2048: with an initial state and a gradient of the
final state; l = 32: with neither. P, N: tiles. Of a thread: registers, bytes spilled. Of a program: bytes of
shared memory. In the code: tensor-core instructions / products. filled: warps over the most, estimated.

shape       dtype target     l kernel                  P   N warps registers spilled  shared  tensor filled"""
ROW = "{shape:12}{dtype:6}{target:7}{l:5} {kernel:22}{P:3}{N:4}{warps:6}{registers:10}{spilled:8}{shared:8,}"
ROW += "{tensor_ops:4} / {products}{occupancy:7.0%}"


def compile_report(args):
    print(HEAD.format(triton.__version__))
    rows = []
    for shape, dtype, (l, count) in itertools.product(args.shapes, args.dtypes, CASES):
        *sizes, chunk = SHAPES[shape]
        inputs = [t.requires_grad_() for t in make_inputs(dtype, 1, l, *sizes)[:count]]
        for launch, name in itertools.product(record(inputs, min(chunk, l)), args.targets):
            target = TARGETS[name]
            kernel = launch.kernel.fn.__name__ + (" back" if launch.kwargs.get("REVERSE") else "")
            row = {"shape": shape, "dtype": dtype, "target": name, "l": l, "kernel": kernel}
            row |= {"P": launch.kwargs["P"], "N": launch.kwargs["N"], "warps": launch.kwargs["num_warps"]}
            row["products"] = launch.kernel.src.count("_dot(")
            compiled = build(launch, target)
            read = read_amd if target.backend == "hip" else read_nvidia
            row["registers"], row["spilled"], row["tensor_ops"], row["tf32"] = read(compiled)
            row["shared"] = compiled.metadata.shared
            row["occupancy"] = occupancy(target, row["warps"], row["registers"], row["shared"])
            rows.append(row)
            print(ROW.format(**row), flush=True)
    return {"triton": triton.__version__, "kernels": rows}


# ------------------------------------------------------------------------------------------------------------
# --sweep


def median_ms(function):
    """Of the GPU alone: it empties its cache before each call, and Python launches the call meanwhile."""
    return triton.testing.do_bench(function, return_mode="median")


def time_kernel(name, inputs, chunk):
    """-> ms of all launches of this kernel in a step, and the bytes of their tensors, each once"""
    ms, size = 0, 0
    for kernel, grid, args, kwargs in record(inputs, chunk):
        run = functools.partial(kernel[grid], *args, **kwargs)
        run()
        if kernel.fn.__name__ == name:
            ms += median_ms(run)
            size += sum(t.nbytes for t in args if isinstance(t, torch.Tensor))
    return ms, size


def sweep(args):
    """One kernel after the other."""
    if not torch.cuda.is_available():
        sys.exit("kernel_report.py: --sweep times kernels, so it needs a GPU")
    *sizes, chunk = SHAPES[args.shapes[0]]
    gib = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    square = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    report = {"device": torch.cuda.get_device_name(), "shape": args.shapes[0]}
    report["copy_gb_s"] = round(2 * gib.nbytes / median_ms(gib.clone) / 1e6)
    report["product_tflops"] = round(2 * 8192**3 / median_ms(lambda: torch.mm(square, square)) / 1e9)
    print(", ".join(f"{key} {value}" for key, value in report.items()), flush=True)
    report["times"] = {}
    settings = scan_kernel.SETTINGS
    for dtype, name in itertools.product(args.dtypes, KERNELS):
        inputs = [t.cuda().requires_grad_() for t in make_inputs(dtype, 32, 2048, *sizes)]
        present = settings[name]
        column = DTYPES[dtype].itemsize // 4
        others = itertools.product((32, 64), (32, 64), (4, 8), (1, 2, 3))
        times = {}
        for setting in dict.fromkeys([present[column], *others]):
            settings[name] = (setting, setting)
            try:
                ms, size = time_kernel(name, inputs, chunk)
            except (triton.errors.TritonError, RuntimeError) as error:
                print(f"{name:22} {dtype} {setting} does not run: {type(error).__name__}", flush=True)
                continue
            times[setting] = ms
            print(f"{name:22} {dtype} {setting}  {ms:.3f} ms, {size / ms / 1e6:,.0f} GB/s", flush=True)
        report["times"][f"{name} {dtype}"] = [[*setting, ms] for setting, ms in times.items()]
        best = min(times, key=times.get, default=present[column])
        settings[name] = (best, present[1]) if column == 0 else (present[0], best)
    print(f"\nSETTINGS = {settings}  # kernel: (for 16 bits, for 32 bits)")
    return report | {"settings": settings}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--compile", action="store_true", help="build each kernel for all targets")
    what.add_argument("--sweep", action="store_true", help="time other launch settings on this GPU")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, help="[all; --sweep takes one: small]")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="[bf16 fp32; --sweep: bf16]")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="of --compile")
    args = parser.parse_args()
    args.shapes = args.shapes or (list(SHAPES) if args.compile else ["small"])
    args.dtypes = args.dtypes or (["bf16", "fp32"] if args.compile else ["bf16"])
    print(json.dumps(compile_report(args) if args.compile else sweep(args)))
