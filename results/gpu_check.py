"""Does this GPU compute what it should, and how fast? The first thing to run on a new one; under 8 minutes.

    python results/gpu_check.py                  all groups of checks, each in a process of its own
    python results/gpu_check.py --group=scan     one of them
    python results/gpu_check.py --fault=all      the check of this check: breaks something on purpose

Each check prints one JSON line; one that failed says in "message" what is wrong, and where. The last line
sums up. Without a GPU, Triton's interpreter runs what it can, at small sizes, within 5 minutes."""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch

GPU = torch.cuda.is_available()
os.environ["TRITON_INTERPRET"] = "0" if GPU or "--group=builds" in sys.argv else "1"  # before it is imported

import triton
import triton.language as tl

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "results"))
import kernel_report
import speed

import model as model_file
import scan_kernel
import test_all
import train
from scan_kernel import ssd, ssd_chunked, ssd_loop
from test_all import random_inputs

DEVICE = torch.device("cuda" if GPU else "cpu")
SEED = 0
FAILED = []  # of this process
SOME_FAILED = 3  # exit code of a group; another one is a crash
here = sys.modules[__name__]


def attempt(check, case, function, *args):
    """One check, one line. function(*args) -> (what it measured, what is wrong or None)."""
    start = time.perf_counter()
    try:
        found, message = function(*args)
    except Exception as error:  # noqa: BLE001 (whatever goes wrong, the next check may still tell something)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        found, message = {}, f"{type(error).__name__}: {' '.join(lines[:2])[:300]}"
    row = {"check": check, "case": case, "ok": message is None}
    row |= {"message": message} if message else {}
    row |= found | {"seconds": round(time.perf_counter() - start, 1)}
    print(json.dumps(row), file=sys.__stdout__, flush=True)
    if message:
        FAILED.append(f"{check} {case}")


def skip(check, case):
    attempt(check, case, lambda: ({"skipped": "no GPU"}, None))


def relative_error(reference, result):
    """RMS(error) / RMS(reference), in float64"""
    reference, result = reference.double(), result.double()
    return ((result - reference).norm() / reference.norm()).item()


def error_of(expected, found):
    """Relative; of what should be all zeros, the largest"""
    return relative_error(expected, found) if expected.any() else found.abs().max().item()


def what_is_wrong(name, expected, found, limit):
    """In words, with the place where it is worst; None if the error is within the limit."""
    error = error_of(expected, found)
    if error <= limit:  # (NaN is not)
        return None
    difference = (found.double() - expected.double()).abs().nan_to_num(nan=math.inf)
    place = torch.unravel_index(difference.argmax(), found.shape)
    index = ", ".join(str(int(i)) for i in place)
    where = f"{name}[{index}]" if index else name
    message = f"{where} is {found[place]:.6g}, should be {expected[place]:.6g}"
    unknown = (~found.isfinite()).sum().item()
    if unknown:
        return f"{message}; {unknown:,} are not finite: left unwritten, or from beyond an input"
    return f"{message}; error {error:.1e} of all, limit {limit:.0e}"


def join(messages):
    messages = [message for message in messages if message]
    more = [f"and {len(messages) - 3} more"] if len(messages) > 3 else []
    return "; ".join(messages[:3] + more) or None


# ------------------------------------------------------------------------------------------------------------
# 1 The machine, and what it can do at best

NOMINAL_GB_S = {"H100 PCIe": 2000, "H100": 3350, "H200": 4800, "A100-SXM4-80": 2039, "A100": 1555}


@triton.jit
def empty_kernel(x_ptr):
    pass


def measure_floors():
    source, target = torch.empty(2, 2**30, dtype=torch.uint8, device=DEVICE)
    square = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    copy_ms = kernel_report.median_ms(lambda: target.copy_(source))
    product_ms = kernel_report.median_ms(lambda: torch.mm(square, square))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(1000):
        empty_kernel[(1,)](square)
    torch.cuda.synchronize()
    launch_us = 1000 * (time.perf_counter() - start)
    floors = {"copy_gb_s": 2 * 2**30 / copy_ms / 1e6, "product_tflops": 2 * 8192**3 / product_ms / 1e9}
    return {name: round(value, 1) for name, value in (floors | {"launch_us": launch_us}).items()}


def floors(name, found):
    nominal = next((gb_s for part, gb_s in NOMINAL_GB_S.items() if part in name), None)
    slow = nominal and found["copy_gb_s"] < 0.6 * nominal
    why = "the GPU is shared or throttled, all timings are void"
    return found, f"a copy runs at {found['copy_gb_s']:.0f} of {nominal} GB/s: {why}" if slow else None


def machine():
    query = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.limit"
    command = ["nvidia-smi", f"--query-gpu={query},utilization.gpu", "--format=csv"]
    found = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    with contextlib.suppress(OSError):  # not here
        smi = subprocess.run(command, capture_output=True, text=True, check=False)
        found["nvidia_smi"] = (smi.stdout or smi.stderr).splitlines()
    return found | {"python": platform.python_version()}, None


def environment():
    attempt("environment", "machine", machine)
    if GPU:
        attempt("environment", "floors", lambda: floors(torch.cuda.get_device_name(), measure_floors()))
    else:
        skip("environment", "floors")


# ------------------------------------------------------------------------------------------------------------
# 2 What the compiler makes of the kernels


def build(shape, dtype, target):
    which = SimpleNamespace(shapes=[shape], dtypes=[dtype], targets=[target])
    registers, messages = {}, []
    for row in kernel_report.compile_report(which)["kernels"]:
        name = f"{row['kernel']}, l = {row['l']}"
        registers[name] = row["registers"]
        messages += [f"{name} spills {row['spilled']} bytes a thread"] if row["spilled"] else []
    return {"target": target, "registers": registers}, join(messages)


def builds():
    """With and without states: kernel_report.CASES."""
    major, minor = torch.cuda.get_device_capability() if GPU else (9, 0)
    name = f"sm_{major}{minor}"
    kernel_report.TARGETS.setdefault(name, kernel_report.Target("cuda", 10 * major + minor, 32, 64, 228, 1))
    shapes, dtypes = (kernel_report.SHAPES, ("bf16", "fp32")) if GPU else (["small"], ["bf16"])
    for shape, dtype in itertools.product(shapes, dtypes):
        attempt("builds", f"{shape} {dtype}", build, shape, dtype, name)


# ------------------------------------------------------------------------------------------------------------
# 3 Sums from behind, as in inputs_grad_kernel: Triton had errors there (issue 4362)


@triton.jit
def reverse_cumsum_kernel(x_ptr, sums_ptr, Q: tl.constexpr):
    row = tl.program_id(0)
    places = tl.arange(0, Q)
    x = tl.load(x_ptr + (row * Q + places[:, None]) * Q + places[None, :])  # [Q, Q]
    tl.store(sums_ptr + row * Q + places, tl.cumsum(tl.sum(x, 1) - tl.sum(x, 0), 0, reverse=True))


def reverse_cumsum(x, warps):
    sums = torch.full(x.shape[:2], math.nan, device=DEVICE)
    reverse_cumsum_kernel[(len(x),)](x, sums, Q=x.shape[1], num_warps=warps)
    return sums


def cumsum_case(Q, warps):
    x = torch.randn(8, Q, Q, generator=torch.Generator().manual_seed(SEED)).to(DEVICE)
    expected = (x.double().sum(2) - x.double().sum(1)).flip(1).cumsum(1).flip(1)
    found = reverse_cumsum(x, warps)
    return {"error": relative_error(expected, found)}, what_is_wrong("sums", expected, found, 1e-6)


def cumsum():
    for Q, warps in itertools.product((16, 32, 64, 128), (4, 8)):
        attempt("cumsum", f"Q {Q}, {warps} warps", cumsum_case, Q, warps)


# ------------------------------------------------------------------------------------------------------------
# 4 - 6 The scan: against the recurrence in float64, amid NaN, and again and again

SHAPES = [(2, 131, 4, 64, 128, 64), (4, 32, 8, 32, 128, 32), (2, 33, 8, 32, 128, 32),
          (1, 1030, 8, 64, 128, 64), (1, 300, 4, 128, 256, 128), (1, 1, 2, 16, 16, 16)]  # fmt: skip
if not GPU:
    SHAPES = [(2, 37, 3, 16, 32, 16), (1, 66, 2, 64, 16, 32), (1, 1, 2, 16, 16, 16)]
OUTPUTS = {"both": ["y", "final_state"], "y": ["y"], "state": ["final_state"]}  # of the scan, in the loss


def inputs_for(shape, dtype):
    return [t.to(DEVICE) for t in random_inputs(*shape[:5], kernel_report.DTYPES[dtype], SEED)]


def results(scan, inputs, loss="both"):
    """{name: tensor} of what the loss is on, and of all gradients, for random gradients coming in."""
    names = OUTPUTS[loss] + [f"{name}'" for name in ("u", "a", "B", "C", "init_state")[: len(inputs)]]
    return dict(zip(names, test_all.results(scan, inputs, loss), strict=True))


def triton_results(inputs, chunk, loss="both", gap=None):
    def scan(*args):
        outputs = ssd(*args, chunk=chunk, backend="triton")
        if gap:
            for output in outputs:
                output.register_hook(lambda gradient: amid_nan(gradient, gap))
        return outputs

    return results(scan, [amid_nan(t, gap) for t in inputs] if gap else inputs, loss)


def amid_nan(t, gap):
    """The same numbers between NaN; or contiguous, after so many (1: at an odd address) and before many"""
    if gap == "between":
        return torch.stack([t, torch.full_like(t, math.nan)], dim=-1)[..., 0]
    buffer = t.new_full((gap + t.numel() + 2**16,), math.nan)
    return buffer[gap : gap + t.numel()].view(t.shape).copy_(t)


def limit_of(dtype, name, l):
    if dtype == "bf16" and name == "a'":
        return 2e-2  # a small difference of large sums
    return 2e-5 if dtype == "fp32" and l > 1000 else {"fp32": 1e-5, "fp16": 5e-3, "bf16": 1e-2}[dtype]


def scan_case(shape, dtype, loss="both", init=True, gap=None):
    l, chunk = shape[1], shape[5]
    inputs = inputs_for(shape, dtype)[: 5 if init else 4]
    expected = results(ssd_loop, [t.double() for t in inputs], loss)
    in_torch = results(functools.partial(ssd_chunked, chunk=chunk), inputs, loss)
    found = triton_results(inputs, chunk, loss, gap)
    errors, messages = {}, []
    for name in expected:
        errors[name] = error = float(f"{error_of(expected[name], found[name]):.1e}")
        theirs = error_of(expected[name], in_torch[name])
        message = what_is_wrong(name, expected[name], found[name], limit_of(dtype, name, l))
        if message is None and dtype != "fp32" and error > max(2 * theirs, 5e-4):
            message = f"{name}: error {error:.1e}, more than twice ssd_chunked's {theirs:.1e}"
        messages.append(message)
    return {"errors": errors}, join(messages)


DTYPES = ("fp32", "fp16", "bf16") if GPU else ("fp32", "fp16")  # the interpreter cannot do bf16


def scan():
    cases = [(shape, dtype, "both", True) for shape in SHAPES for dtype in DTYPES]
    cases += itertools.product(SHAPES[:1], DTYPES, OUTPUTS, (True, False))
    for case in dict.fromkeys(cases):
        what = "{} {}, loss on {}, init_state {}".format(*case)
        attempt("scan", what, scan_case, *case)


def poison():
    """A GPU's outputs are allocated where NaN has been, and torch.empty is filled with NaN, too."""
    for shape, dtype, gap in itertools.product(SHAPES[:3], DTYPES[::2], ("between", 2**16, 1)):
        torch.full((2**28 if GPU else 2**16,), math.nan, device=DEVICE)
        torch.use_deterministic_algorithms(True, warn_only=True)
        attempt("poison", f"{shape} {dtype}, NaN {gap}", scan_case, shape, dtype, "both", True, gap)
        torch.use_deterministic_algorithms(False)


REPEATED = (SHAPES[0], "bf16" if GPU else "fp32")


def bits():
    """Of all results, {name: the bytes as a tensor}."""
    found = triton_results(inputs_for(*REPEATED), REPEATED[0][5])
    return {name: t.detach().cpu().contiguous().flatten().view(torch.uint8) for name, t in found.items()}


def digest(found=None):
    """Printed, if it is that of another process"""
    content = torch.cat(list((found or bits()).values())).numpy()
    digest = hashlib.sha256(content).hexdigest()[:16]
    if found is None:
        print(digest, file=sys.__stdout__)
    return digest


def repeat_case():
    first, messages = bits(), []
    square = torch.randn(4096, 4096, device=DEVICE) if GPU else None
    stream = torch.cuda.Stream() if GPU else None
    for i in range(1, 20 if GPU else 3):
        with torch.cuda.stream(stream):  # does nothing on a CPU
            for _ in range(20 if GPU else 0):
                torch.mm(square, square)  # keeps the GPU busy
        for name, found in bits().items():
            where = (found != first[name]).nonzero()
            if len(where):
                messages.append(f"run {i}: {len(where):,} bytes of {name} differ, first {where[0].item()}")
    command = [sys.executable, __file__, "--group=digest", *sys.argv[2:]]
    other = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if other != digest(first):
        messages.append(f"another process gives other bits: {other or 'none'}, not {digest(first)}")
    return {"digest": digest(first)}, join(messages)


def determinism():
    attempt("determinism", "20 runs" if GPU else "3 runs", repeat_case)


# ------------------------------------------------------------------------------------------------------------
# 7 The model, and a run that is resumed


def preset_args(preset, **changes):
    """train.py's flags for it, as speed.py wants them. 130m: the sizes of state-spaces/mamba2-130m."""
    parser = train.make_parser()
    parser.set_defaults(init_state="prev")
    official = {"d_model": 768, "n_layer": 24, "headdim": 64, "seq_len": 2048, "batch_size": 8}
    parser.set_defaults(**(train.PRESETS | {"130m": official})[preset] | changes)
    args = parser.parse_args([])
    args.device = DEVICE
    args.dtype = train.choose_dtype("auto", DEVICE) if GPU else "float32"  # what the interpreter can do
    args.autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    return args


def pass_through(args, how):
    """-> {name: tensor}, of the loss and all its gradients"""
    torch.manual_seed(SEED)
    model = speed.make_model(args)
    model.config.backend = "torch" if how == "torch" else "triton"
    if how == "compiled":
        for block in model.backbone.layers:
            block.compile(fullgraph=True, dynamic=False, backend="inductor" if GPU else "aot_eager")
    idx, targets = torch.randint(speed.VOCAB, (2, args.batch_size, args.seq_len)).to(DEVICE)
    state = [(conv, torch.randn(ssm.shape).to(DEVICE)) for conv, ssm in model.zero_state(args.batch_size)]
    with args.autocast:
        _, loss, _ = model(idx, targets, state)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def model_case(expected, args, how):
    found = pass_through(args, how)
    errors = {name: error_of(expected[name], found[name]) for name in expected}
    worst = max(errors, key=errors.get)
    in_a_row = [torch.cat([t.flatten() for t in list(side.values())[1:]]) for side in (expected, found)]
    numbers = {"loss": errors["loss"], "gradients": error_of(*in_a_row), "worst": [worst, errors[worst]]}
    messages = [what_is_wrong("loss", expected["loss"], found["loss"], 1e-3)]
    messages.append(what_is_wrong("all gradients in a row", *in_a_row, 2e-2))
    # a small one does not show there; some are small differences of large sums
    messages.append(what_is_wrong(f"gradient of {worst}", expected[worst], found[worst], 5e-2))
    return numbers, join(messages)


def model():
    small = {} if GPU else {"batch_size": 1, "seq_len": 34}
    for preset in ("tiny", "small"):
        args = preset_args(preset, n_layer=2 if GPU or preset == "tiny" else 1, **small)
        expected = pass_through(args, "torch")
        for how in ("triton", "compiled"):
            attempt("model", f"{preset}, {how} against torch", model_case, expected, args, how)


def resume_case():
    """30 steps in one go, against 15, an interruption, and 15 more"""
    sizes = "--preset=tiny --steps=30 --save_every=15 --tokenizer=byte"
    flags = [*sizes.split(), f"--dataset={ROOT / 'test_all.py'}", "--init_state=prev", "--out"]
    save = train.save

    def save_and_stop(args, step, *rest):
        save(args, step, *rest)
        if step == 15:
            raise KeyboardInterrupt

    train.main([*flags, "whole"])
    train.save = save_and_stop
    with contextlib.suppress(KeyboardInterrupt):
        train.main([*flags, "parts"])
    train.save = save
    train.main(["--out=parts", "--resume"])
    whole, parts = (torch.load(f"{run}/ckpt.pt", map_location="cpu")["model"] for run in ("whole", "parts"))
    limit = 1e-3 if GPU else 0  # on a CPU, bit for bit
    messages = [what_is_wrong(f"resumed {name}", whole[name], parts[name], limit) for name in whole]
    return {"worst": max(error_of(whole[name], parts[name]) for name in whole)}, join(messages)


def resume():
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        attempt("resume", "tiny prev, 30 steps = 15 + 15", resume_case)
        os.chdir(ROOT)


# ------------------------------------------------------------------------------------------------------------
# 8 - 9 Speed

SPEED_SHAPES = {  # b, l, h, p, n, chunk
    "tiny": (128, 32, 8, 32, 128, 32),
    "small": (32, 512, 16, 64, 128, 64),
    "130m": (8, 2048, 24, 64, 128, 64),
}
VOCABS = {"tiny": 1024, "small": 4096, "130m": 50280}


def device_us(function, rounds=10):
    """{kernel: microseconds on the GPU of one call}, whose L2 cache is emptied before each call"""
    larger_than_l2 = torch.empty(2**28, dtype=torch.int8, device=DEVICE)
    function()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            larger_than_l2.zero_()
            function()
        torch.cuda.synchronize()
    times = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us() / rounds
    return times


def kernels_case(shape, gb_s):
    """Each launch alone; of_roofline: the time to copy as many bytes as its tensors have, over its own"""
    inputs = [t.requires_grad_() for t in inputs_for(shape, "bf16")]
    found, messages = {}, []
    for kernel, grid, args, kwargs in kernel_report.record(inputs, shape[5]):
        name = kernel.fn.__name__
        us = device_us(functools.partial(kernel[grid], *args, **kwargs))[name]
        mb = sum(t.nbytes for t in args if isinstance(t, torch.Tensor)) / 1e6
        messages += [] if us else [f"the profiler did not see {name}: may it use CUPTI?"]
        row = {"us": round(us, 1), "mb": round(mb), "of_roofline": us and round(1e3 * mb / gb_s / us, 2)}
        found[name + (" back" if kwargs.get("REVERSE") else "")] = row
    times = [row["us"] for row in found.values()]
    return {"forward_us": sum(times[:2]), "backward_us": sum(times[2:])} | found, join(messages)


def step_case(preset, how, tflops):
    args = preset_args(preset)
    speed.VOCAB = VOCABS[preset]
    model = speed.make_model(args)
    if how == "compiled":
        train.compile_layers(model, DEVICE)
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(speed.in_turn({"step": speed.make_step(model, args)}, 10)["step"])
    tokens = args.batch_size * args.seq_len
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    floor = 6 * weights * tokens / (1e12 * tflops)
    found = {"tokens_per_s": round(tokens / seconds), "ms": round(1000 * seconds, 2)}
    found |= {"of_product_floor": round(floor / seconds, 3)}
    return found | {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)}, None


def by_mamba_ssm(x, dt, u, B, C, S):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    B, C = B[:, :, None], C[:, :, None]  # one group
    how = {"chunk_size": 256, "initial_states": S, "return_final_states": True}
    return mamba_chunk_scan_combined(x, dt, -torch.ones_like(dt[0, 0]), B, C, **how)


def by_fla(x, dt, u, B, C, S):
    from fla.ops.simple_gla import chunk_simple_gla

    B, C = (t[:, :, None].expand(*dt.shape, -1).contiguous() for t in (B, C))
    how = {"scale": 1.0, "initial_state": S.mT.contiguous(), "output_final_state": True}
    y, S = chunk_simple_gla(C, B, u, -dt, **how)
    return y, S.mT


def by_us(x, dt, u, B, C, S):
    return ssd(u, -dt, B, C, S, chunk=64)


def peer_case(shape, peer):
    """First the same results, then the time of both ways, on the GPU and on the clock"""
    x, a, B, C, S = inputs_for(shape, "bf16")
    inputs = [x, -a, (x * -a[..., None]).to(x.dtype), B, C, S]  # a rate A of -1, so a = -dt
    try:
        found = peer(*inputs)
    except ImportError as error:
        return {"skipped": str(error)}, None
    messages = [what_is_wrong(*pair, 2e-2) for pair in zip(("y", "final_state"), by_us(*inputs), found)]

    def both_ways(scan):
        leaves = [t.detach().requires_grad_() for t in inputs]
        outputs = scan(*leaves)
        torch.autograd.grad(outputs, leaves, outputs, allow_unused=True)

    times = {}
    idle = device_us(lambda: None).total()  # what emptying the cache takes
    for scan in (by_us, peer):
        run = functools.partial(both_ways, scan)
        wall = 1e6 * statistics.median(speed.in_turn({"both": run}, 20)["both"])
        times[scan.__name__] = {"device_us": round(device_us(run).total() - idle), "wall_us": round(wall)}
    return times, join(messages)


def timings():
    if not GPU:
        return skip("timings", "all")
    limits = measure_floors()
    for name, shape in SPEED_SHAPES.items():
        attempt("timings", f"kernels {name} {shape}", kernels_case, shape, limits["copy_gb_s"])
    for name, peer in itertools.product(("small", "130m"), (by_mamba_ssm, by_fla)):
        attempt("timings", f"{name} {peer.__name__}", peer_case, SPEED_SHAPES[name], peer)
    for preset, how in itertools.product(SPEED_SHAPES, ("eager", "compiled")):
        attempt("timings", f"training step {preset} {how}", step_case, preset, how, limits["product_tflops"])


def sweep():
    """Other launch settings: as many as there is time for."""
    if not GPU:
        return skip("sweep", "all")
    kernel_report.print = lambda text, **_: attempt("sweep", text, lambda: ({}, None))
    kernel_report.sweep(SimpleNamespace(shapes=["small"], dtypes=["bf16"]))


# That a group may take, on a GPU; the last one takes what is left.
SECONDS = {"environment": 60, "builds": 120, "cumsum": 60, "scan": 180, "poison": 90, "determinism": 90}
SECONDS |= {"model": 150, "resume": 120, "timings": 180, "sweep": 480}

# ------------------------------------------------------------------------------------------------------------
# Deliberate faults, for a CPU: each should make its groups fail.


def spill(build, *args):
    scan_kernel.SETTINGS["inputs_grad_kernel"] = [(64, 128, 4, 1)] * 2
    return build(*args)


def lose_states(walk, *args, **kwargs):
    states, end = walk(*args, **kwargs)
    return states.zero_(), end


def load_without_mask(load, ptr, width, rows, cols, inside):
    return tl.load(ptr + rows[:, None] * width + cols[None, :])


def read_a_as_contiguous(scan, u, a, *rest):
    return scan(u, a.as_strided(a.shape, (a[0].numel(), a.shape[2], 1)), *rest)


def leave_out_a_kernel(launch, kernel, *args, **flags):
    if kernel is not scan_kernel.addresses_grad_kernel:
        launch(kernel, *args, **flags)


def sum_in_some_order(results, *args):
    return {name: t * (1 + 1e-6 * (time.time_ns() // 64 % 2)) for name, t in results(*args).items()}


def break_the_graph(scan, *args):
    torch._dynamo.graph_break()
    return scan(*args)


def see_no_kernels(timings):
    here.device_us = lambda function: Counter()
    attempt("timings", "kernels", kernels_case, SHAPES[0], 3000)


FAULTS = {  # name: (groups; module and function; what is called instead, with the function first)
    "slow_copy": ("environment", here, "environment",
        lambda _: attempt("environment", "floors", floors, "NVIDIA H100 80GB", {"copy_gb_s": 1500.0})),
    "spills": ("builds", here, "build", spill),
    "forward_sums": ("cumsum", here, "reverse_cumsum", lambda _, x, warps: (x.sum(2) - x.sum(1)).cumsum(1)),
    "lost_states": ("scan model", scan_kernel, "_walk", lose_states),
    "imprecise": ("scan", scan_kernel, "ssd_triton",
        lambda scan, *args: [t * (1 + 2e-3 * torch.randn_like(t)) for t in scan(*args)]),
    "no_mask": ("poison", scan_kernel, "_load", load_without_mask),
    "no_strides": ("poison", scan_kernel, "ssd_triton", read_a_as_contiguous),
    "unwritten": ("poison", scan_kernel, "_launch", leave_out_a_kernel),
    "any_order": ("determinism", here, "triton_results", sum_in_some_order),
    "other_seed": ("determinism", here, "random_inputs", lambda draw, *args: draw(*args[:-1], os.getpid())),
    "two_graphs": ("model", model_file, "ssd", break_the_graph),
    "forgotten_state": ("resume", train, "restore", lambda restore, *args: (restore(*args)[0], {}, [])),
    "blind_profiler": ("timings", here, "timings", see_no_kernels),
    "crash": ("cumsum", here, "cumsum", lambda _: os.abort()),
    "hang": ("cumsum", here, "cumsum", lambda _: time.sleep(1000)),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------


def run_group(group, fault, seconds):
    """In a process of its own: an error of CUDA spoils all that comes after it. -> what failed"""
    command = [sys.executable, __file__, f"--group={group}"] + ([f"--fault={fault}"] if fault else [])
    env = os.environ | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if fault or not GPU else {})
    failed = []
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "start_new_session": True}
        process = subprocess.Popen(command, env=env, **pipes)
        timer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
        timer.start()
        for line in process.stdout:
            print(line, end="", flush=True)
            row = json.loads(line) if line.startswith("{") else {"ok": True}
            failed += [] if row["ok"] else [f"{row['check']} {row['case']}"]
        code = process.wait()
        timer.cancel()
        errors.seek(0)
        last = (errors.read().strip().splitlines() or [""])[-1]
    late = code == -signal.SIGKILL
    if code not in (0, SOME_FAILED) and not (late and group == "sweep"):  # it takes what time is left
        message = f"not done after {seconds:.0f} s" if late else f"exit code {code}: {last}"
        print(json.dumps({"check": group, "case": "to its end", "ok": False, "message": message}), flush=True)
        failed.append(f"{group} to its end")
    return failed


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--group", choices=[*SECONDS, "digest"], help="one group, in this process")
    parser.add_argument("--fault", choices=[*FAULTS, "all"], help="break something; ok: it was noticed")
    args = parser.parse_args()
    if args.group:
        if args.fault:
            _, module, name, change = FAULTS[args.fault]
            setattr(module, name, functools.partial(change, getattr(module, name)))
        with contextlib.redirect_stdout(sys.stderr):
            getattr(here, args.group)()
        sys.exit(SOME_FAILED if FAILED else 0)
    start = time.perf_counter()
    failed, unnoticed = [], []
    for group, seconds in () if args.fault else SECONDS.items():
        left = 465 - (time.perf_counter() - start)
        failed += run_group(group, None, max(1, min(seconds, left)) if GPU else 3600)
    for name in FAULTS if args.fault == "all" else filter(None, [args.fault]):
        for group in FAULTS[name][0].split():
            found = run_group(group, name, 20 if name == "hang" else 3600)
            failed += found
            unnoticed += [] if found else [f"{name} by {group}"]
    row = {"ok": not (unnoticed if args.fault else failed)}
    row |= {"device": torch.cuda.get_device_name() if GPU else "none: interpreter", "failed": failed}
    row |= {"unnoticed": unnoticed} if args.fault else {}
    print(json.dumps(row | {"seconds": round(time.perf_counter() - start)}))
    sys.exit(not row["ok"])


if __name__ == "__main__":
    main()
