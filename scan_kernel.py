"""The scan of Mamba-2 (SSD, structured state space duality): one recurrence, three ways to compute it.

Each head carries a state S along the text, a matrix of p x n numbers (arXiv 2405.21060):

    S_t = exp(a_t) S_{t-1} + u_t B_t^T        forget a little, then write u_t at the address B_t
    y_t = S_t C_t                             read at the address C_t

u_t (p numbers), B_t, C_t (n numbers) and a_t <= 0 come from token t = 0 ... l - 1 (model.py makes them).
The heads share B and C. With a_t = 0 this is linear attention.

S_{-1} is the *initial state*, the subject of this project: an argument. S_{l-1} is the *final state*, which
the next piece of the text, or the next batch, can start from: a result. Both have gradients.

    ssd_loop      the two lines above, token by token: slow and obvious, the reference of every test
    ssd_chunked   the same by matrix products over chunks of tokens, in plain torch: for a CPU
    ssd_triton    the same again in kernels written here: for a GPU
    ssd           what the model calls: checks its arguments and picks one

Dimensions as in model.py, and: c chunk · q, s places in a chunk (q of what is read, s of what is written)
"""

from __future__ import annotations  # without Triton there is no tl.constexpr

import math
import os

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: torch alone
    triton = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels as Python on a CPU, for tests


def ssd_loop(u, a, B, C, init_state=None):
    """The recurrence as it is defined. Arguments and results of `ssd`."""
    b, l, h, p = u.shape
    S = a.new_zeros(b, h, p, B.shape[-1]) if init_state is None else init_state  # (b, h, p, n)
    y = []
    for t in range(l):
        written = torch.einsum("bhp,bn->bhpn", u[:, t].to(S.dtype), B[:, t].to(S.dtype))
        S = torch.exp(a[:, t])[..., None, None] * S + written
        y.append(torch.einsum("bhpn,bn->bhp", S, C[:, t].to(S.dtype)))
    return torch.stack(y, dim=1).to(u.dtype), S


# ---- The chunked scan
#
# The loop takes l steps. Chunks of c tokens take l / c, each a few matrix products, which is what hardware is
# good at. Take c tokens that start from the state S, and let cs_q = a_0 + ... + a_q be the running sum within
# them. What was written at s has decayed by exp(cs_q - cs_s) when it is read at q:
#
#     y_q   = sum_{s <= q} exp(cs_q - cs_s) (C_q . B_s) u_s  +  exp(cs_q) S C_q
#     S_new = sum_s exp(cs_last - cs_s) u_s B_s^T  +  exp(cs_last) S
#
# As matrix products, with a row for each of the c tokens (o: element by element; a vector before a matrix
# scales its rows):
#
#     1 inside the chunk   y     = W u,  W = (C B^T) o L,  L[q, s] = exp(cs_q - cs_s) for s <= q, else 0
#     2 from the past      y    += exp(cs) C S^T
#     3 written            S_new = (exp(cs_last - cs) u)^T B
#     4 carried over       S_new += exp(cs_last) S


def ssd_chunked(u, a, B, C, init_state=None, chunk=64):
    """The four steps in plain torch. Arguments and results of `ssd`, gradients by autograd. Decays and states
    are in a's dtype, products in u's."""
    S, y = init_state, []
    with torch.autocast(u.device.type, enabled=False):  # the dtypes are chosen by hand here
        for u_c, a_c, B_c, C_c in zip(*(t.split(chunk, dim=1) for t in (u, a, B, C))):
            cs = a_c.transpose(1, 2).cumsum(-1)  # (b, h, c)
            difference = cs[..., :, None] - cs[..., None, :]  # (b, h, q, s)
            # Above the diagonal exp could overflow. tril cuts that off, but not its gradient, 0 * inf: clamp.
            L = difference.clamp(max=0).exp().tril()  # (b, h, q, s)
            CB = torch.einsum("bqn,bsn->bqs", C_c, B_c)
            W = (CB[:, None] * L).to(u.dtype)  # (b, h, q, s)
            y_c = torch.einsum("bhqs,bshp->bqhp", W, u_c)  # 1
            if S is not None:
                since = cs.exp().transpose(1, 2)[..., None].to(u.dtype)  # (b, c, h, 1)
                y_c = y_c + since * torch.einsum("bqn,bhpn->bqhp", C_c, S.to(u.dtype))  # 2
            until = (cs[..., -1:] - cs).exp().transpose(1, 2)[..., None].to(u.dtype)  # (b, c, h, 1)
            S_new = torch.einsum("bshp,bsn->bhpn", u_c * until, B_c).to(a.dtype)  # 3
            if S is not None:
                across = cs[..., -1:, None].exp()  # (b, h, 1, 1)
                S_new = S_new + across * S  # 4
            S = S_new  # (b, h, p, n)
            y.append(y_c)
    return torch.cat(y, dim=1), S


def why_not_triton(u, B):
    """Why the kernels below cannot take these arguments, or None if they can."""
    gpu = u.is_cuda and torch.cuda.get_device_capability(u.device) >= (8, 0)
    if triton is None or not (gpu or INTERPRETED):
        return "the kernels need Triton, and a GPU of compute capability 8.0 or more, or TRITON_INTERPRET=1"
    if u.dtype == torch.float64 or (INTERPRETED and u.dtype == torch.bfloat16):
        return f"the kernels do not take {u.dtype}"
    p, n = u.shape[3], B.shape[2]
    if p not in (16, 32, 64, 128) or n not in (16, 32, 64, 128, 256):
        return f"p and n should be powers of two, 16 to 128 and 16 to 256, not {p} and {n}"
    return None


def ssd(u, a, B, C, init_state=None, chunk=64, backend=None):
    """The scan, by the backend that fits.

    Arguments
        u           (b, l, h, p)  what is written; float32, bfloat16, float16 or float64; any l >= 1
        a           (b, l, h)     <= 0, log of the decay; float32 (float64 if u is)
        B, C        (b, l, n)     where it is written and read, in u's dtype
        init_state  (b, h, p, n)  the state before token 0, in a's dtype; None = zeros
        chunk       tokens a chunk, a power of two; changes speed, not results
        backend     "triton", "torch", or None: Triton on a GPU where it can, torch elsewhere
    Returns
        y           (b, l, h, p)  in u's dtype
        final_state (b, h, p, n)  the state after the last token, in a's dtype
    Gradients reach u, a, B, C and init_state, from both results."""
    (b, l, h, p), n = u.shape, B.shape[-1]
    wide = torch.promote_types(u.dtype, torch.float32)
    fits = dict(a=((b, l, h), wide), B=((b, l, n), u.dtype), C=((b, l, n), u.dtype))
    fits["init_state"] = (b, h, p, n), wide
    for (name, expected), t in zip(fits.items(), (a, B, C, init_state)):
        if t is not None and (tuple(t.shape), t.dtype) != expected:
            raise ValueError(f"ssd: {name} should be {expected}, not {(tuple(t.shape), t.dtype)}")
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"ssd: chunk should be a power of two, not {chunk}")
    why_not = why_not_triton(u, B)
    if backend is None:
        backend = "triton" if u.is_cuda and not why_not else "torch"
    if backend == "triton" and why_not:
        raise ValueError(f"ssd: backend 'triton' does not work here: {why_not}")
    scan = {"triton": ssd_triton, "torch": ssd_chunked}[backend]
    return scan(u, a, B, C, init_state, chunk)


# ---- The scan on a GPU
#
# Autograd finds the gradients of `ssd_chunked`; kernels need them written down. A prime marks the gradient
# of the loss with respect to what it follows. Chunk by chunk from the last one, whose S_new is final_state:
#
#     W'  = y' u^T                                     and E = W' o L is the gradient of C B^T
#     u'  = W^T y' + exp(cs_last - cs) B S_new'^T
#     B'  = E^T C  + exp(cs_last - cs) u S_new'        summed over the heads
#     C'  = E B    + exp(cs) y' S                      summed over the heads
#     S'  = (exp(cs) y')^T C + exp(cs_last) S_new'     which is S_new' of the chunk before it
#
# a_t decays all that is written before t and read at t or later. a'_t sums what flows along such paths:
#
#     a'_t = sum_{q >= t} (sum_s W'_qs W_qs - sum_s W'_sq W_sq)      from s < t to q >= t, inside the chunk
#          + sum_{q >= t} y'_q . exp(cs_q) S C_q                     from S to q >= t      (from_past below)
#          + sum_{s < t} u_s . exp(cs_last - cs_s) S_new' B_s        from s < t to S_new   (written)
#          + exp(cs_last) <S_new', S>                                from S to S_new       (carried)
#
# (In the first line, W'_sq is for what is written at q and read at s; pairs with both at t or later cancel.)
#
# Four kernels, five launches:
#
#     walk             steps 3 and 4: carries a tile of a state from chunk to chunk, leaves that before each
#     output           steps 1 and 2, all chunks and heads in parallel
#     walk             in reverse, y' for u and C for B: from final_state' to init_state', S_new' of each
#     inputs_grad      u' and a', in parallel like output
#     addresses_grad   B' and C', summed over the heads in a fixed order: always the same bits
#
# The states between chunks are kept in u's dtype, as products read them; all sums are float32.
#
# To a kernel, u is a matrix of b l rows and h p columns, B and C have n columns, a state has h p rows and n
# columns. H, P_ALL and N_ALL are h, p and n; Q is the chunk, P and N are tiles of p and n: u, y and their
# gradients are [Q, P], B and C [Q, N], a state [P, N]. Rows past the end load as zeros: they neither decay
# nor write. Program ids have 64 bits, so that no offset wraps around at 2^31 elements.

jit = triton.jit if triton else lambda kernel: kernel


@jit
def _load(ptr, width, rows, cols, inside):
    return tl.load(ptr + rows[:, None] * width + cols[None, :], mask=inside[:, None], other=0.0)


@jit
def _dot(left, right, total=None):
    return tl.dot(left, right, total, input_precision="ieee")  # float32 is not rounded to TF32


@jit
def _decay(log):
    """A difference of two rounded sums can be just above zero: hence the minimum. NaN stays NaN."""
    return tl.exp(tl.minimum(log, 0.0, propagate_nan=tl.PropagateNan.ALL))


@jit
def _decays(a_ptr, rows, head, inside, H: tl.constexpr, Q: tl.constexpr):
    """Of one head in one chunk: the decays since its start exp(cs), until its end exp(cs_last - cs), across
    it exp(cs_last), and L."""
    a = tl.load(a_ptr + rows * H + head, mask=inside, other=0.0)  # [Q]
    cs = tl.cumsum(a, 0)  # [Q]
    cs_last = tl.sum(a, 0)
    L = tl.where(tl.arange(0, Q)[:, None] >= tl.arange(0, Q)[None, :], _decay(cs[:, None] - cs[None, :]), 0.0)
    return _decay(cs), _decay(cs_last - cs), _decay(cs_last), L  # [Q], [Q], [], [Q, Q]


@jit
def _where_am_i(l, chunks, HEADS: tl.constexpr, TILES: tl.constexpr, Q: tl.constexpr):
    """This program's tile, head, chunk (counted on through the batch), and the rows of that chunk."""
    pid = tl.program_id(0).to(tl.int64)  # neighbours are heads of one chunk: B and C come from the cache
    chunk = pid // (TILES * HEADS)
    places = chunk % chunks * Q + tl.arange(0, Q)  # [Q]
    return pid % TILES, pid // TILES % HEADS, chunk, chunk // chunks * l + places, places < l


@jit
def walk_kernel(u_ptr, a_ptr, B_ptr, states_ptr, start_ptr, end_ptr, l, chunks, REVERSE: tl.constexpr,
        H: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
        N: tl.constexpr):  # fmt: skip
    # which tile am I (with 1 chunk a row: a program takes a whole row of the batch)
    tile, head, batch, _rows, _inside = _where_am_i(l, 1, H, P_ALL // P * (N_ALL // N), Q)
    cols_u = head * P_ALL + tile // (N_ALL // N) * P + tl.arange(0, P)
    cols_n = tile % (N_ALL // N) * N + tl.arange(0, N)
    offs_state = cols_u[:, None] * N_ALL + cols_n[None, :]  # [P, N]
    S = tl.zeros((P, N), tl.float32)
    if start_ptr is not None:
        S = tl.load(start_ptr + batch * (H * P_ALL * N_ALL) + offs_state)
    # from chunk to chunk
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        # the state that this chunk starts from; in reverse, S_new'
        offs_chunk = (batch * chunks + chunk) * (H * P_ALL * N_ALL)
        tl.store(states_ptr + offs_chunk + offs_state, S)
        places = chunk * Q + tl.arange(0, Q)  # [Q]
        rows = batch * l + places
        inside = places < l
        since, until, across, _ = _decays(a_ptr, rows, head, inside, H, Q)
        u = _load(u_ptr, H * P_ALL, rows, cols_u, inside)
        B = _load(B_ptr, N_ALL, rows, cols_n, inside)
        u = (u * (since if REVERSE else until)[:, None]).to(u.dtype)
        S = _dot(tl.trans(u), B, S * across)  # 3, 4
    if end_ptr is not None:
        tl.store(end_ptr + batch * (H * P_ALL * N_ALL) + offs_state, S)


@jit
def output_kernel(u_ptr, a_ptr, B_ptr, C_ptr, states_ptr, y_ptr, l, chunks,
        H: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
        N: tl.constexpr):  # fmt: skip
    tile, head, chunk, rows, inside = _where_am_i(l, chunks, H, P_ALL // P, Q)
    cols_u = head * P_ALL + tile * P + tl.arange(0, P)
    rows_state = chunk * (H * P_ALL) + cols_u
    # products over n
    CB = tl.zeros((Q, Q), tl.float32)
    y = tl.zeros((Q, P), tl.float32)
    for n in range(0, N_ALL, N):
        cols_n = n + tl.arange(0, N)
        B = _load(B_ptr, N_ALL, rows, cols_n, inside)
        C = _load(C_ptr, N_ALL, rows, cols_n, inside)
        S = tl.load(states_ptr + rows_state[:, None] * N_ALL + cols_n[None, :])
        CB = _dot(C, tl.trans(B), CB)
        y = _dot(C, tl.trans(S), y)
    # the rest
    since, _, _, L = _decays(a_ptr, rows, head, inside, H, Q)
    u = _load(u_ptr, H * P_ALL, rows, cols_u, inside)
    W = (CB * L).to(u.dtype)
    y = _dot(W, u, y * since[:, None])  # 1, 2
    tl.store(y_ptr + rows[:, None] * (H * P_ALL) + cols_u[None, :], y, mask=inside[:, None])


@jit
def inputs_grad_kernel(u_ptr, a_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, du_ptr, da_ptr, l, chunks,
        H: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
        N: tl.constexpr):  # fmt: skip
    tile, head, chunk, rows, inside = _where_am_i(l, chunks, H, P_ALL // P, Q)
    cols_u = head * P_ALL + tile * P + tl.arange(0, P)
    rows_state = chunk * (H * P_ALL) + cols_u
    dy = _load(dy_ptr, H * P_ALL, rows, cols_u, inside)
    # products over n
    CB = tl.zeros((Q, Q), tl.float32)
    du = tl.zeros((Q, P), tl.float32)
    from_past = tl.zeros((Q,), tl.float32)
    carried = tl.zeros((P,), tl.float32)
    for n in range(0, N_ALL, N):
        cols_n = n + tl.arange(0, N)
        B = _load(B_ptr, N_ALL, rows, cols_n, inside)
        C = _load(C_ptr, N_ALL, rows, cols_n, inside)
        offs_state = rows_state[:, None] * N_ALL + cols_n[None, :]  # [P, N]
        S = tl.load(states_ptr + offs_state)
        dS = tl.load(dstates_ptr + offs_state)
        CB = _dot(C, tl.trans(B), CB)
        du = _dot(B, tl.trans(dS), du)
        from_past += tl.sum(_dot(dy, S) * C, 1)  # y' . S C, without keeping S C
        carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    # u'
    since, until, across, L = _decays(a_ptr, rows, head, inside, H, Q)
    u = _load(u_ptr, H * P_ALL, rows, cols_u, inside)
    W = CB * L
    du *= until[:, None]
    written = tl.sum(u * du, 1)  # [Q]
    du = _dot(tl.trans(W.to(u.dtype)), dy, du)
    tl.store(du_ptr + rows[:, None] * (H * P_ALL) + cols_u[None, :], du, mask=inside[:, None])
    # a', in the order of the derivation; the parts of all tiles of p add up
    paths = _dot(dy, tl.trans(u)) * W  # W' o W [Q, Q]
    da = tl.cumsum(tl.sum(paths, 1) - tl.sum(paths, 0) + from_past * since, 0, reverse=True)  # [Q]
    da += tl.cumsum(written, 0) - written + across * tl.sum(carried, 0)
    tl.store(da_ptr + (rows * H + head) * (P_ALL // P) + tile, da, mask=inside)


@jit
def addresses_grad_kernel(u_ptr, a_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, dB_ptr, dC_ptr, l,
        chunks, H: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr, Q: tl.constexpr, P: tl.constexpr,
        N: tl.constexpr):  # fmt: skip
    tile, _head, chunk, rows, inside = _where_am_i(l, chunks, 1, N_ALL // N, Q)
    cols_n = tile * N + tl.arange(0, N)
    # inside the chunk: E, summed over heads and tiles of p, then one product for all of them
    E = tl.zeros((Q, Q), tl.float32)
    for p in range(0, H * P_ALL, P):
        cols_u = p + tl.arange(0, P)
        _, _, _, L = _decays(a_ptr, rows, p // P_ALL, inside, H, Q)
        u = _load(u_ptr, H * P_ALL, rows, cols_u, inside)
        dy = _load(dy_ptr, H * P_ALL, rows, cols_u, inside)
        E += _dot(dy, tl.trans(u)) * L
    B = _load(B_ptr, N_ALL, rows, cols_n, inside)
    C = _load(C_ptr, N_ALL, rows, cols_n, inside)
    dC = _dot(E.to(B.dtype), B)
    dB = _dot(tl.trans(E.to(B.dtype)), C)
    # from the past, and to the future
    for p in range(0, H * P_ALL, P):
        cols_u = p + tl.arange(0, P)
        since, until, _, _ = _decays(a_ptr, rows, p // P_ALL, inside, H, Q)
        u = _load(u_ptr, H * P_ALL, rows, cols_u, inside)
        dy = _load(dy_ptr, H * P_ALL, rows, cols_u, inside)
        offs_state = (chunk * (H * P_ALL) + cols_u)[:, None] * N_ALL + cols_n[None, :]  # [P, N]
        S = tl.load(states_ptr + offs_state)
        dS = tl.load(dstates_ptr + offs_state)
        dC = _dot((dy * since[:, None]).to(dy.dtype), S, dC)
        dB = _dot((u * until[:, None]).to(u.dtype), dS, dB)
    offs_out = rows[:, None] * N_ALL + cols_n[None, :]  # [Q, N]
    tl.store(dB_ptr + offs_out, dB, mask=inside[:, None])
    tl.store(dC_ptr + offs_out, dC, mask=inside[:, None])


# Tile of p and of n (less where p or n is less), warps (more for long chunks), pipeline stages. Chosen by
# results/kernel_report.py: no spills, and all programs fit.
SETTINGS = {  # kernel: (for 16 bits, for 32 bits)
    "walk_kernel": ((32, 64, 4, 2), (32, 32, 4, 1)),
    "output_kernel": ((64, 64, 4, 2), (32, 32, 8, 1)),
    "inputs_grad_kernel": ((32, 64, 8, 2), (32, 32, 8, 1)),
    "addresses_grad_kernel": ((32, 64, 8, 2), (16, 16, 8, 1)),
}


def _tiles(kernel, u, B):
    """-> tile of p, tile of n, warps, stages"""
    tile_p, tile_n, warps, stages = SETTINGS[kernel.fn.__name__][u.element_size() // 4]  # 2 or 4 bytes
    return min(tile_p, u.shape[3]), min(tile_n, B.shape[2]), warps, stages


def _launch(kernel, axes, chunk, u, a, B, *more, **flags):
    """A program for each row of the batch and each place along the axes."""
    (b, l, h, p), n = u.shape, B.shape[2]
    tile_p, tile_n, warps, stages = _tiles(kernel, u, B)
    places = dict(chunk=-(-l // chunk), head=h, p=p // tile_p, n=n // tile_n)
    grid = (b * math.prod(places[axis] for axis in axes),)
    sizes = dict(H=h, P_ALL=p, N_ALL=n, Q=chunk, P=tile_p, N=tile_n)
    options = dict(num_warps=max(warps, chunk // 16), num_stages=stages)
    with torch.cuda.device_of(u):
        kernel[grid](u, a, B, *more, l, places["chunk"], **sizes, **options, **flags)


def _walk(u, a, B, start, chunk, reverse=False, wants_end=True):
    """-> the states before each chunk (b, chunks, h, p, n) in u's dtype, and that at the end if wanted"""
    (b, l, h, p), n = u.shape, B.shape[2]
    states = u.new_empty(b, -(-l // chunk), h, p, n)
    end = a.new_empty(b, h, p, n) if wants_end else None
    _launch(walk_kernel, ("head", "p", "n"), chunk, u, a, B, states, start, end, REVERSE=reverse)
    return states, end


# Wrapped as operators: torch.compile and autograd do not look inside. All tensors are contiguous.
INPUTS = "Tensor u, Tensor a, Tensor B, Tensor C"
FORWARD = f"({INPUTS}, Tensor? init_state, int chunk) -> (Tensor, Tensor, Tensor)"
BACKWARD = f"({INPUTS}, Tensor states, Tensor? dy, Tensor? dS, int chunk, bool wants_init) -> Tensor[]"


@torch.library.custom_op("ssd::forward", mutates_args=(), schema=FORWARD)
def _forward(u, a, B, C, init_state, chunk):
    """-> y, final_state, and the state before each chunk"""
    states, final_state = _walk(u, a, B, init_state, chunk)
    y = torch.empty_like(u)
    _launch(output_kernel, ("chunk", "head", "p"), chunk, u, a, B, C, states, y)
    return y, final_state, states


@torch.library.custom_op("ssd::backward", mutates_args=(), schema=BACKWARD)
def _backward(u, a, B, C, states, dy, dS, chunk, wants_init):
    """-> the gradients of u, a, B and C, and of init_state if it is wanted"""
    dy = torch.zeros_like(u) if dy is None else dy.contiguous()
    dS = None if dS is None else dS.contiguous()
    dstates, dinit_state = _walk(dy, a, C, dS, chunk, reverse=True, wants_end=wants_init)
    du = torch.empty_like(u)
    dB = torch.empty_like(B)
    dC = torch.empty_like(C)
    tiles = u.shape[3] // _tiles(inputs_grad_kernel, u, B)[0]
    da = a.new_empty(*a.shape, tiles)  # da[..., i]: from tile i of p
    tensors = (u, a, B, C, states, dstates, dy)
    _launch(inputs_grad_kernel, ("chunk", "head", "p"), chunk, *tensors, du, da)
    _launch(addresses_grad_kernel, ("chunk", "n"), chunk, *tensors, dB, dC)
    return [du, da.sum(3), dB, dC] + ([dinit_state] if wants_init else [])


@_forward.register_fake  # for torch.compile: shapes and dtypes of what comes back
def _(u, a, B, C, init_state, chunk):
    (b, l, h, p), n = u.shape, B.shape[2]
    return torch.empty_like(u), a.new_empty(b, h, p, n), u.new_empty(b, -(-l // chunk), h, p, n)


@_backward.register_fake
def _(u, a, B, C, states, dy, dS, chunk, wants_init):
    gradients = [torch.empty_like(t) for t in (u, a, B, C)]
    return gradients + ([torch.empty_like(states[:, 0], dtype=a.dtype)] if wants_init else [])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], output[2])  # u, a, B, C, the states
    ctx.chunk = inputs[5]
    ctx.set_materialize_grads(False)  # a result that the loss does not use has the gradient None


def _autograd_backward(ctx, dy, dS, _):
    gradients = _backward(*ctx.saved_tensors, dy, dS, ctx.chunk, ctx.needs_input_grad[4])
    return *gradients, *[None] * (6 - len(gradients))


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def ssd_triton(u, a, B, C, init_state=None, chunk=64):
    """The chunked scan in Triton. Arguments and results of `ssd`."""
    most = 64 if u.dtype == torch.float32 else 128  # what registers hold
    chunk = max(16, min(chunk, most))  # 16: what products need
    init_state = None if init_state is None else init_state.contiguous()
    u, a, B, C = (t.contiguous() for t in (u, a, B, C))
    return _forward(u, a, B, C, init_state, chunk)[:2]
