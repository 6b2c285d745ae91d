"""The scan of Mamba-2 (SSD, "state space duality"): one recurrence, several ways to compute it.

Each head carries a state S, a matrix of p x n numbers, along the sequence (arXiv 2405.21060):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        forget a little, then write x_t under the address B_t
    y_t = S_t C_t                                     read at the address C_t

x_t (p numbers), B_t, C_t (n numbers) and the time step dt_t > 0 come from token t (model.py, in_proj); A < 0 is one learnt
number a head. The heads of a group share B and C.

S_{-1} is the *initial state*, the subject of this project; S_{l-1}, the *final state*, is what the next segment or
the next batch starts from. Here the first is an argument and the second a result like any other, both with gradients.

    ssd_loop      the two lines above, token by token: slow and obvious, the reference of every test
    ssd_chunked   the same numbers from matrix products over chunks of tokens, in plain torch: the path of a CPU
    ssd_triton    the same again, in kernels written here: the path of a GPU
    ssd           what the model calls: checks its arguments and picks one

Dimensions, the same letters in every file:
    b batch · l length · c chunk · q, s place in a chunk (row, column) · h head · p head dim
    g group of B, C · r head within its group (h = g r) · n state dim · d model width
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # Windows, macOS: torch alone
    triton = None
jit = triton.jit if triton else lambda kernel: None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels as Python, on a CPU: slow, for tests


def ssd_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, init_state: Tensor | None = None,
             chunk: int = 0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is defined; chunk is ignored. Arguments and results of `ssd`, gradients by autograd."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    B, C = (t.to(dt.dtype).repeat_interleave(h // g, dim=2) for t in (B, C))  # (b, l, h, n)
    S = dt.new_zeros(b, h, p, n) if init_state is None else init_state
    y = []
    for x_t, dt_t, B_t, C_t in zip(*(t.unbind(1) for t in (x.to(dt.dtype), dt, B, C))):
        S = torch.exp(dt_t * A)[:, :, None, None] * S + torch.einsum("bh,bhp,bhn->bhpn", dt_t, x_t, B_t)  # (b, h, p, n)
        y.append(torch.einsum("bhpn,bhn->bhp", S, C_t))
    return torch.stack(y, dim=1).to(x.dtype), S


# ----------------------------------------------------------------------------------------------------------------------
# The chunked scan. Unrolled over a chunk of c tokens that starts from the state S, the recurrence says, with
# u_s = dt_s x_s, a_t = dt_t A, and the running sum cs_q = a_0 + ... + a_q within the chunk,
#
#     y_q   = sum_{s <= q} exp(cs_q - cs_s) (C_q . B_s) u_s  +  exp(cs_q) S C_q
#     S_new = sum_s exp(cs_last - cs_s) u_s B_s^T  +  exp(cs_last) S
#
# which is matrix products, c tokens at a time. Four steps (o: element by element):
#
#     1 inside the chunk   y     = W u,  W = (C B^T) o L,  L[q, s] = exp(cs_q - cs_s) for s <= q, else 0
#     2 from the past      y    += exp(cs) C S^T
#     3 written            S_new = (exp(cs_last - cs) u)^T B
#     4 carried over       S_new += exp(cs_last) S
#
#     x, dt, B, C         chunk 0             chunk 1             chunk 2
#                         |     |             |     |             |     |
#                         1     3             1     3             1     3
#                         v     |             v     |             v     |
#     y               --> y     |         --> y     |         --> y     |
#                    2          v        2          v        2          v
#     init_state  ---+----4---> + ---S---+----4---> + ---S---+----4---> + --->  final_state
#
# Backward, chunk by chunk from the last one. A prime marks the gradient of the loss with respect to what it follows;
# S_new' is final_state' in the last chunk, S' is init_state' in the first:
#
#     W'  = y' u^T                                         and E = W' o L is the gradient of C B^T
#     u'  = W^T y' + exp(cs_last - cs) B S_new'^T          so x' = dt u',  dt' = x . u' + A a',  A' = sum of dt a'
#     B'  = E^T C  + exp(cs_last - cs) u S_new'            summed over the heads of a group
#     C'  = E B    + exp(cs) y' S                          summed over the heads of a group
#     S'  = (exp(cs) y')^T C + exp(cs_last) S_new'
#
# a_t decays whatever is written before t and read at t or later, so a'_t sums what flows along each of these paths:
#
#     a'_t = sum_{q >= t} (sum_s W'_qs W_qs - sum_s W'_sq W_sq)      from s < t to q >= t, inside the chunk
#          + sum_{q >= t} y'_q . exp(cs_q) S C_q                     from S to q >= t
#          + sum_{s < t} u_s . exp(cs_last - cs_s) S_new' B_s        from s < t to S_new
#          + exp(cs_last) <S_new', S>                                from S to S_new
#
# (The first line: pairs with both ends at t or later appear twice, with opposite signs, and cancel. A shorter formula,
# a'_t = sum_{q >= t} (y'_q . y_q - u'_q . u_q), does not cancel as well once the products are rounded to bf16.)


def _decays_and_scores(dt, A, B, C):
    """cs (b, c, g, r), L (b, g, r, q, s) and C B^T (b, g, 1, q, s) of one chunk. Decays are exp(min(difference, 0)):
    a difference of two sums can round to just above zero, and exp of what the mask hides must not overflow."""
    cs = torch.cumsum(dt * A, dim=1)  # (b, c, g, r)
    cs_head = cs.permute(0, 2, 3, 1)  # (b, g, r, c)
    L = (cs_head[..., :, None] - cs_head[..., None, :]).clamp_(max=0).exp_().tril_()
    return cs, L, torch.einsum("bqgn,bsgn->bgqs", C, B).to(cs.dtype)[:, :, None]


def _exp(exponent, like):
    """Decays in the dtype of `like`, with one more dimension, to multiply (..., p) by; given (..., 1), (..., p, n)."""
    return torch.exp(exponent.clamp(max=0))[..., None].to(like.dtype)


class ChunkedSSD(torch.autograd.Function):
    """`ssd_chunked`, heads split into (g, r), with the backward above written out. Autograd would keep every (c, c)
    matrix and pass over each many times more; here they are made again, and only what crosses a border is kept. Large
    matrices are changed in place where their old content has been used: L becomes W, E becomes W' o W."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, S, chunk):
        y, kept = torch.empty_like(x), []
        for x_c, dt_c, B_c, C_c, y_c in zip(*(t.split(chunk, dim=1) for t in (x, dt, B, C, y))):
            cs, L, CB = _decays_and_scores(dt_c, A, B_c, C_c)
            u = x_c * dt_c[..., None].to(x.dtype)  # (b, c, g, r, p)
            W = L.mul_(CB).to(x.dtype)  # (b, g, r, q, s)
            y_c.copy_(torch.einsum("bgrqs,bsgrp->bqgrp", W, u))  # 1
            y_past = None
            if S is not None:
                y_past = _exp(cs, x) * torch.einsum("bqgn,bgrpn->bqgrp", C_c, S.to(x.dtype))
                y_c += y_past  # 2
            kept += [S, y_past]
            S_new = torch.einsum("bsgrp,bsgn->bgrpn", u * _exp(cs[:, -1:] - cs, x), B_c).to(cs.dtype)  # 3
            S = S_new if S is None else S_new.addcmul_(_exp(cs[:, -1, ..., None], cs), S)  # 4
        ctx.save_for_backward(x, dt, A, B, C, *kept)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return y, S

    @staticmethod
    def backward(ctx, dy, dS):
        x, dt, A, B, C, *kept = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, ddt, dB, dC, da = (torch.empty_like(t) for t in (x, dt, B, C, dt))
        tensors = [t.split(ctx.chunk, dim=1) for t in (x, dt, B, C, dy, dx, ddt, dB, dC, da)]
        chunks = list(enumerate(zip(*tensors, kept[::2], kept[1::2])))
        for i, (x_c, dt_c, B_c, C_c, dy_c, dx_c, ddt_c, dB_c, dC_c, da_c, S, y_past) in reversed(chunks):
            cs, L, CB = _decays_and_scores(dt_c, A, B_c, C_c)
            u = x_c * dt_c[..., None].to(x.dtype)
            E = torch.einsum("bqgrp,bsgrp->bgrqs", dy_c, u).to(cs.dtype).mul_(L)  # (b, g, r, q, s)
            W = L.mul_(CB).to(x.dtype)  # (b, g, r, q, s)
            du = torch.einsum("bgrqs,bqgrp->bsgrp", W, dy_c)
            E_sum = E.sum(2).to(x.dtype)  # (b, g, q, s)
            dB_c.copy_(torch.einsum("bgqs,bqgn->bsgn", E_sum, C_c))
            dC_c.copy_(torch.einsum("bgqs,bsgn->bqgn", E_sum, B_c))
            paths = E.mul_(CB)  # W' o W (b, g, r, q, s)
            da_c.copy_((paths.sum(-1) - paths.sum(-2)).permute(0, 3, 1, 2))
            if S is not None:
                read = dy_c * _exp(cs, x)
                dC_c += torch.einsum("bqgrp,bgrpn->bqgn", read, S.to(x.dtype))
                da_c += (dy_c * y_past).sum(-1, dtype=da.dtype)
            da_c.copy_(da_c.flip(1).cumsum(1).flip(1))  # sum over q >= t
            if dS is not None:
                to_end = _exp(cs[:, -1:] - cs, x)
                du_end = to_end * torch.einsum("bsgn,bgrpn->bsgrp", B_c, dS.to(x.dtype))
                dB_c += torch.einsum("bsgrp,bgrpn->bsgn", u * to_end, dS.to(x.dtype))
                written = (u * du_end).sum(-1, dtype=da.dtype)
                da_c += written.cumsum(1) - written  # sum over s < t
                du += du_end
                dS = _exp(cs[:, -1, ..., None], cs) * dS
                if S is not None:
                    da_c += (dS * S).sum((-2, -1))[:, None]
            if i > 0 or ctx.needs_input_grad[5]:  # then there was an S
                dS_read = torch.einsum("bqgrp,bqgn->bgrpn", read, C_c).to(cs.dtype)
                dS = dS_read if dS is None else dS_read.add_(dS)
            torch.mul(du, dt_c[..., None].to(x.dtype), out=dx_c)
            torch.sum(x_c * du, -1, dtype=ddt.dtype, out=ddt_c)
        ddt.addcmul_(da, A)
        return dx, ddt, (dt * da).sum((0, 1)), dB, dC, dS if ctx.needs_input_grad[5] else None, None


def ssd_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, init_state: Tensor | None = None,
                chunk: int = 64) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked scan in plain torch, on any device. Arguments and results of `ssd`."""
    heads, wide = (B.shape[2], x.shape[2] // B.shape[2]), torch.promote_types(x.dtype, torch.float32)  # (g, r)
    x, dt, A = x.unflatten(2, heads), dt.to(wide).unflatten(2, heads), A.to(wide).unflatten(0, heads)
    S = None if init_state is None else init_state.unflatten(1, heads)
    with torch.autocast(x.device.type, enabled=False):  # the products are in x's dtype, decays and states stay wide
        y, S = ChunkedSSD.apply(x, dt, A, B, C, S, chunk)
    return y.flatten(2, 3), S.flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The chunked scan on a GPU, in Triton: the four steps and their gradients, cut into four kernels and five launches.
#
#     walk          steps 3 and 4. A program carries a tile of one head's state from chunk to chunk, in registers; its
#                   first load is init_state, its last store final_state. It leaves the state before every chunk.
#     output        steps 1 and 2. Now each chunk knows its state: all chunks, heads and tiles of p in parallel.
#     walk          backward: S' = (exp(cs) y')^T C + exp(cs_last) S_new' is steps 3 and 4 in reverse, with y' for x and
#                   C for B. It starts from final_state', leaves every chunk's S_new', and ends with init_state'.
#     inputs_grad   x', dt', A' and all of a', in parallel like output.
#     group_grad    B' and C'. Each program sums over the heads of its group, in a fixed order: no atomics, equal bits.
#
# C B^T and L are made again where they are needed. The states between chunks are kept for the backward pass (a fourth
# launch otherwise), in x's dtype, as matrix products read them; what is carried along stays float32, like all sums. The
# gradients are two kernels, one of them in two loops, because all at once they need more registers than there are.
# To a kernel x is a matrix of b l rows and h p columns, B and C have g n columns, a state has h p rows and n columns.
# Q is a chunk, P and N are tiles of p and n. Rows past the end load as zeros: with dt = 0 they neither decay nor write.
# Program ids are 64 bits wide before they are multiplied, so no offset wraps around at 2^31 elements.


@jit
def _load(ptr, stride, rows, cols, inside):
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=inside[:, None], other=0.0)


@jit
def _decays(dt_ptr, A_ptr, rows, head, inside, H: tl.constexpr, Q: tl.constexpr):
    """Of one head in one chunk: dt, and the decays since its start exp(cs), until its end exp(cs_last - cs), across it
    exp(cs_last), and L; the minima as in _decays_and_scores."""
    dt = tl.load(dt_ptr + rows * H + head, mask=inside, other=0.0)  # [Q]
    a = dt * tl.load(A_ptr + head)
    cs, cs_last = tl.cumsum(a, 0), tl.sum(a, 0)
    L = tl.exp(tl.minimum(cs[:, None] - cs[None, :], 0.0))  # [Q, Q]
    L = tl.where(tl.arange(0, Q)[:, None] >= tl.arange(0, Q)[None, :], L, 0.0)
    return dt, tl.exp(tl.minimum(cs, 0.0)), tl.exp(tl.minimum(cs_last - cs, 0.0)), tl.exp(tl.minimum(cs_last, 0.0)), L


@jit
def _where_am_i(l, chunks, HEADS: tl.constexpr, TILES: tl.constexpr, Q: tl.constexpr):
    """This program's tile, head (or group), chunk (counted on through the batch), and that chunk's rows."""
    pid = tl.program_id(0).to(tl.int64)  # neighbours are heads of one chunk, so B and C come from the cache
    chunk = pid // (TILES * HEADS)
    places = chunk % chunks * Q + tl.arange(0, Q)  # [Q]
    return pid % TILES, pid // TILES % HEADS, chunk, chunk // chunks * l + places, places < l


@jit
def walk_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, states_ptr, first_ptr, last_ptr, l, chunks, stride_x, stride_B,
        REVERSE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
        Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile, head, batch, rows, inside = _where_am_i(l, 1, H, P_ALL // P * (N_ALL // N), Q)  # one "chunk": the batch row
    cols_x = head * P_ALL + tile // (N_ALL // N) * P + tl.arange(0, P)  # [P]
    cols_n = tile % (N_ALL // N) * N + tl.arange(0, N)  # [N]
    offs_state = cols_x[:, None] * N_ALL + cols_n[None, :]  # [P, N]
    S = tl.zeros((P, N), tl.float32)
    if first_ptr is not None:
        S = tl.load(first_ptr + batch * (H * P_ALL * N_ALL) + offs_state)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        tl.store(states_ptr + (batch * chunks + chunk) * (H * P_ALL * N_ALL) + offs_state, S)
        places = chunk * Q + tl.arange(0, Q)  # [Q]
        rows, inside = batch * l + places, places < l
        dt, since, until, across, _ = _decays(dt_ptr, A_ptr, rows, head, inside, H, Q)
        x = _load(x_ptr, stride_x, rows, cols_x, inside)  # [Q, P]
        B = _load(B_ptr, stride_B, rows, head // (H // G) * N_ALL + cols_n, inside)  # [Q, N]
        x = (x * (since if REVERSE else until * dt)[:, None]).to(x.dtype)
        S = tl.dot(tl.trans(x), B, S * across, input_precision=PRECISION)  # 3, 4
    tl.store(last_ptr + batch * (H * P_ALL * N_ALL) + offs_state, S)


@jit
def output_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, y_ptr, l, chunks, stride_x, stride_B,
        H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
        Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile, head, chunk, rows, inside = _where_am_i(l, chunks, H, P_ALL // P, Q)
    cols_x = head * P_ALL + tile * P + tl.arange(0, P)  # [P]
    CB, y = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, P), tl.float32)
    for n in range(0, N_ALL, N):
        cols_n = n + tl.arange(0, N)  # [N]
        B = _load(B_ptr, stride_B, rows, head // (H // G) * N_ALL + cols_n, inside)  # [Q, N]
        C = _load(C_ptr, stride_B, rows, head // (H // G) * N_ALL + cols_n, inside)  # [Q, N]
        S = tl.load(states_ptr + (chunk * (H * P_ALL) + cols_x)[:, None] * N_ALL + cols_n[None, :])  # [P, N]
        CB = tl.dot(C, tl.trans(B), CB, input_precision=PRECISION)
        y = tl.dot(C, tl.trans(S), y, input_precision=PRECISION)
    dt, since, _, _, L = _decays(dt_ptr, A_ptr, rows, head, inside, H, Q)
    x = _load(x_ptr, stride_x, rows, cols_x, inside)  # [Q, P]
    W = (CB * L * dt[None, :]).to(x.dtype)  # [Q, Q]; with the dt of u = dt x, so that x enters the product as it is
    y = tl.dot(W, x, y * since[:, None], input_precision=PRECISION)  # 1, 2
    tl.store(y_ptr + rows[:, None] * (H * P_ALL) + cols_x[None, :], y, mask=inside[:, None])


@jit
def inputs_grad_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, dx_ptr, ddt_ptr, dA_ptr,
        l, chunks, stride_x, stride_B, H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
        Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile, head, chunk, rows, inside = _where_am_i(l, chunks, H, P_ALL // P, Q)
    cols_x = head * P_ALL + tile * P + tl.arange(0, P)  # [P]
    rows_state = chunk * (H * P_ALL) + cols_x  # [P]
    dy = _load(dy_ptr, H * P_ALL, rows, cols_x, inside)  # [Q, P]
    CB, du = tl.zeros((Q, Q), tl.float32), tl.zeros((Q, P), tl.float32)
    from_past, carried = tl.zeros((Q,), tl.float32), tl.zeros((P,), tl.float32)
    for n in range(0, N_ALL, N):
        cols_n = n + tl.arange(0, N)  # [N]
        B = _load(B_ptr, stride_B, rows, head // (H // G) * N_ALL + cols_n, inside)  # [Q, N]
        C = _load(C_ptr, stride_B, rows, head // (H // G) * N_ALL + cols_n, inside)  # [Q, N]
        S = tl.load(states_ptr + rows_state[:, None] * N_ALL + cols_n[None, :])  # [P, N]
        dS = tl.load(dstates_ptr + rows_state[:, None] * N_ALL + cols_n[None, :])  # [P, N]
        CB = tl.dot(C, tl.trans(B), CB, input_precision=PRECISION)
        du = tl.dot(B, tl.trans(dS), du, input_precision=PRECISION)
        from_past += tl.sum(tl.dot(dy, S, input_precision=PRECISION) * C, 1)  # y' . S C, without keeping S C
        carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    dt, since, until, across, L = _decays(dt_ptr, A_ptr, rows, head, inside, H, Q)
    x = _load(x_ptr, stride_x, rows, cols_x, inside)  # [Q, P]
    W = CB * L  # [Q, Q]
    paths = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * dt[None, :] * W  # W' o W [Q, Q]
    du *= until[:, None]
    written = tl.sum(x * du, 1) * dt  # [Q]
    du = tl.dot(tl.trans(W.to(x.dtype)), dy, du, input_precision=PRECISION)
    # the sums of a' in the order of the derivation; all are linear in x and y', so that tiles of p just add up
    da = tl.cumsum(tl.sum(paths, 1) - tl.sum(paths, 0) + from_past * since, 0, reverse=True)  # [Q]
    da += tl.cumsum(written, 0) - written + across * tl.sum(carried, 0)
    tl.store(dx_ptr + rows[:, None] * (H * P_ALL) + cols_x[None, :], du * dt[:, None], mask=inside[:, None])
    ddt = tl.sum(x * du, 1) + tl.load(A_ptr + head) * da  # [Q]
    tl.store(ddt_ptr + (rows * H + head) * (P_ALL // P) + tile, ddt, mask=inside)
    tl.store(dA_ptr + (chunk * H + head) * (P_ALL // P) + tile, tl.sum(dt * da, 0))


@jit
def group_grad_kernel(x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, dB_ptr, dC_ptr,
        l, chunks, stride_x, stride_B, H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
        Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    tile, group, chunk, rows, inside = _where_am_i(l, chunks, G, N_ALL // N, Q)
    cols_n = tile * N + tl.arange(0, N)  # [N]
    # inside the chunk: E, summed over the heads and the tiles of p, then one product for all of them
    E = tl.zeros((Q, Q), tl.float32)  # [Q, Q]
    for p in range(0, H // G * P_ALL, P):
        cols_x = group * (H // G * P_ALL) + p + tl.arange(0, P)  # [P]
        dt, since, until, _, L = _decays(dt_ptr, A_ptr, rows, group * (H // G) + p // P_ALL, inside, H, Q)
        x = _load(x_ptr, stride_x, rows, cols_x, inside)  # [Q, P]
        dy = _load(dy_ptr, H * P_ALL, rows, cols_x, inside)  # [Q, P]
        E += tl.dot(dy, tl.trans(x), input_precision=PRECISION) * dt[None, :] * L
    B = _load(B_ptr, stride_B, rows, group * N_ALL + cols_n, inside)  # [Q, N]
    C = _load(C_ptr, stride_B, rows, group * N_ALL + cols_n, inside)  # [Q, N]
    dC = tl.dot(E.to(B.dtype), B, input_precision=PRECISION)  # [Q, N]
    dB = tl.dot(tl.trans(E.to(B.dtype)), C, input_precision=PRECISION)  # [Q, N]
    for p in range(0, H // G * P_ALL, P):
        cols_x = group * (H // G * P_ALL) + p + tl.arange(0, P)  # [P]
        dt, since, until, _, L = _decays(dt_ptr, A_ptr, rows, group * (H // G) + p // P_ALL, inside, H, Q)
        x = _load(x_ptr, stride_x, rows, cols_x, inside)  # [Q, P]
        dy = _load(dy_ptr, H * P_ALL, rows, cols_x, inside)  # [Q, P]
        offs = (chunk * (H * P_ALL) + cols_x)[:, None] * N_ALL + cols_n[None, :]  # [P, N]
        dC = tl.dot((dy * since[:, None]).to(dy.dtype), tl.load(states_ptr + offs), dC, input_precision=PRECISION)
        dB = tl.dot((x * (until * dt)[:, None]).to(x.dtype), tl.load(dstates_ptr + offs), dB, input_precision=PRECISION)
    offs_out = rows[:, None] * (G * N_ALL) + group * N_ALL + cols_n[None, :]  # [Q, N]
    tl.store(dB_ptr + offs_out, dB, mask=inside[:, None])
    tl.store(dC_ptr + offs_out, dC, mask=inside[:, None])


# Launch settings for bf16 and fp16, then for fp32: tile of p, tile of n (at most), warps (at least), pipeline stages.
# Chosen from results/kernel_report.py --compile. Try others with SSD_SETTINGS="walk_kernel=32,64,4,2 output_kernel=...".
SETTINGS = {
    "walk_kernel": ((32, 64, 4, 2), (32, 32, 4, 1)), "output_kernel": ((64, 64, 4, 2), (32, 32, 8, 1)),
    "inputs_grad_kernel": ((32, 64, 8, 2), (32, 32, 8, 1)), "group_grad_kernel": ((64, 64, 8, 1), (32, 16, 8, 1)),
}  # fmt: skip
for name, _, setting in (item.partition("=") for item in os.environ.get("SSD_SETTINGS", "").split()):
    SETTINGS[name] = (tuple(map(int, setting.split(","))),) * 2


def _launch(kernel, programs, x, B, chunk, *args, **flags):
    """programs(tiles of p, tiles of n) -> how many programs a batch row needs"""
    (b, l, h, p), (g, n) = x.shape, B.shape[2:]
    tile_p, tile_n, warps, stages = SETTINGS[kernel.fn.__name__][x.element_size() // 4]  # 0: 16 bits, 1: 32
    tile_p, tile_n, warps = min(tile_p, p), min(tile_n, n), max(warps, chunk // 16)
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32  # only products of float32 could use it
    with torch.cuda.device_of(x):
        kernel[(b * programs(p // tile_p, n // tile_n),)](
            *args, l, -(-l // chunk), x.stride(1), B.stride(1), H=h, G=g, P_ALL=p, N_ALL=n, Q=chunk, P=tile_p, N=tile_n,
            PRECISION="tf32" if tf32 else "ieee", num_warps=warps, num_stages=stages, **flags)  # fmt: skip


def _walk(x, dt, A, B, first, chunk, reverse=False):
    (b, l, h, p), n = x.shape, B.shape[3]
    states, last = x.new_empty(b, -(-l // chunk), h, p, n), dt.new_empty(b, h, p, n)
    args = (x, dt, A, B, states, first if first is None else first.contiguous(), last)
    _launch(walk_kernel, lambda tiles_p, tiles_n: h * tiles_p * tiles_n, x, B, chunk, *args, REVERSE=reverse)
    return states, last


def _as_matrices(*tensors):
    """The same numbers, all with one distance between rows, and no gaps within a row or between batch rows."""
    (_, l, _, width), strides = tensors[0].shape, tensors[0].stride()
    fits = strides[2:] == (width, 1) and strides[0] == l * strides[1] and all(t.stride() == strides for t in tensors)
    return tensors if fits else tuple(t.contiguous() for t in tensors)


@torch.library.custom_op("ssd::forward", mutates_args=())  # what torch.compile and autograd do not look into
def _forward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, init_state: Tensor | None,
             chunk: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, final_state, and the state before each chunk."""
    (x,), (B, C), dt = _as_matrices(x), _as_matrices(B, C), dt.contiguous()
    states, final_state = _walk(x, dt, A, B, init_state, chunk)
    y, (chunks, h) = x.new_empty(x.shape), states.shape[1:3]
    _launch(output_kernel, lambda tiles_p, _: chunks * h * tiles_p, x, B, chunk, x, dt, A, B, C, states, y)
    return y, final_state, states


@torch.library.custom_op("ssd::backward", mutates_args=())
def _backward(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, states: Tensor, dy: Tensor | None,
              dS: Tensor | None, chunk: int) -> list[Tensor]:  # fmt: skip
    """The gradients of x, dt, A, B, C and init_state."""
    (x,), (B, C), dt = _as_matrices(x), _as_matrices(B, C), dt.contiguous()
    dy = x.new_zeros(x.shape) if dy is None else dy.contiguous()
    dstates, dinit_state = _walk(dy, dt, A, C, dS, chunk, reverse=True)
    (b, chunks, h, p, _), g = states.shape, B.shape[2]
    parts = p // min(p, SETTINGS["inputs_grad_kernel"][x.element_size() // 4][0])  # of dt' and A': one a tile of p
    ddt, dA = dt.new_empty(*dt.shape, parts), dt.new_empty(b, chunks, h, parts)
    dx, dB, dC = (t.new_empty(t.shape) for t in (x, B, C))
    args = (x, dt, A, B, C, states, dstates, dy)
    _launch(inputs_grad_kernel, lambda tiles_p, _: chunks * h * tiles_p, x, B, chunk, *args, dx, ddt, dA)
    _launch(group_grad_kernel, lambda _, tiles_n: chunks * g * tiles_n, x, B, chunk, *args, dB, dC)
    return [dx, ddt.sum(3), dA.sum((0, 1, 3)), dB, dC, dinit_state]


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.has_init, ctx.chunk = inputs[5] is not None, inputs[6]
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx, dy, dfinal_state, _):
    *grads, dinit_state = _backward(*ctx.saved_tensors, dy, dfinal_state, ctx.chunk)
    return *grads, dinit_state if ctx.has_init else None, None


def ssd_triton(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, init_state: Tensor | None = None,
               chunk: int = 64) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked scan in Triton. Arguments and results of `ssd`, within what `why_not_triton` allows."""
    chunk = max(16, min(chunk, 64 if x.dtype == torch.float32 else 128))  # what products need, what registers hold
    return _forward(x, dt.float(), A.float(), B, C, init_state, chunk)[:2]


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
# for torch.compile: the shapes and dtypes of what comes back
_forward.register_fake(lambda x, dt, A, B, C, init_state, chunk: (
    x.new_empty(x.shape), dt.new_empty(x[:, 0].shape + B.shape[3:]),
    x.new_empty(x.shape[0], -(-x.shape[1] // chunk), *x.shape[2:], B.shape[3])))  # fmt: skip
_backward.register_fake(lambda x, dt, A, B, C, S, *_: [t.new_empty(t.shape) for t in (x, dt, A, B, C, S[:, 0].float())])
BACKENDS = {"triton": ssd_triton, "torch": ssd_chunked}


def why_not_triton(x, B):
    """The first thing that keeps the kernels from these arguments: (argument, what it should be, what it is), or None."""
    able = torch.cuda.get_device_capability(x.device) >= (8, 0) if x.is_cuda else INTERPRETED and x.device.type == "cpu"
    checks = (
        (triton and able, "backend", "'torch': kernels need Triton and a GPU (8.0) or TRITON_INTERPRET=1", "'triton'"),
        (x.dtype in (torch.float32, torch.bfloat16, torch.float16), "x", "32 or 16 bits wide for 'triton'", x.dtype),
        (x.shape[3] in (16, 32, 64, 128), "p of x", "16, 32, 64 or 128 for 'triton'", x.shape[3]),
        (B.shape[3] in (16, 32, 64, 128, 256), "n of B", "16, 32, 64, 128 or 256 for 'triton'", B.shape[3]),
    )
    return next((reason for fine, *reason in checks if not fine), None)


def ssd(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, init_state: Tensor | None = None, chunk: int = 64,
        backend: str | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The scan: y_t = S_t C_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, for each head.

    Arguments
        x           (b, l, h, p)  float32, bfloat16, float16 or float64; any l >= 1
        dt          (b, l, h)     >= 0, the step sizes, after softplus
        A           (h)           < 0
        B, C        (b, l, g, n)  in x's dtype; head i uses group i // (h // g)
        init_state  (b, h, p, n)  float32 (float64 if x is), the state before token 0; None = zeros
        chunk       tokens a chunk, a power of two
        backend     "triton", "torch", or None: Triton on a GPU, if it takes these sizes, torch elsewhere
    Returns
        y           (b, l, h, p)  in x's dtype
        final_state (b, h, p, n)  as init_state, the state after the last token
    Gradients reach all six tensors, from both results. Raises ValueError naming the argument that does not fit."""

    def check(ok, name, expected, got):
        if not ok:
            raise ValueError(f"ssd: {name} should be {expected}, not {got}")

    wide = torch.promote_types(x.dtype, torch.float32)
    check(x.dim() == 4 and x.shape[1] > 0, "x", "of shape (b, l, h, p) with l >= 1", tuple(x.shape))
    b, l, h, p = x.shape
    check(B.dim() == 4 and B.shape[2] > 0 and h % B.shape[2] == 0, "B", f"(b, l, g, n), {h} % g == 0", tuple(B.shape))
    g, n = B.shape[2:]
    shapes = {"dt": (dt, b, l, h), "A": (A, h), "B": (B, b, l, g, n), "C": (C, b, l, g, n)}
    dtypes = x.dtype, B.dtype, C.dtype
    check(x.dtype.is_floating_point and len({*dtypes}) == 1, "x, B, C", "of one float dtype", dtypes)
    if init_state is not None:
        shapes["init_state"] = (init_state, b, h, p, n)
        check(init_state.dtype == wide, "init_state", wide, init_state.dtype)
    for name, (tensor, *shape) in shapes.items():
        check([*tensor.shape] == shape, name, f"of shape {tuple(shape)}", tuple(tensor.shape))
    check(chunk > 0 and chunk & (chunk - 1) == 0, "chunk", "a power of two", chunk)
    why_not = why_not_triton(x, B)
    backend = backend or ("triton" if x.is_cuda and why_not is None else "torch")
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    check(backend != "triton" or why_not is None, *(why_not or ("", "", "")))
    return BACKENDS[backend](x, dt, A, B, C, init_state, chunk)


if __name__ == "__main__":  # every backend that this machine can run, against the recurrence in float64
    torch.manual_seed(0)
    device, worst = "cuda" if torch.cuda.is_available() else "cpu", 0
    shapes = (2, 131, 4, 64), (2, 131, 4), (4,), (2, 131, 2, 128), (2, 131, 2, 128), (2, 4, 64, 128)
    x, dt, A, B, C, S = (torch.randn(shape, device=device) for shape in shapes)
    dt, A = dt.sigmoid() / 10, -16 * A.sigmoid()
    print("relative errors of     y        final    x'       dt'      A'       B'       C'       init'")
    for backend in ["torch"] + ["triton"] * (why_not_triton(x, B) is None):
        for dtype, limit in ((torch.float32, 2e-5), (torch.float16, 5e-3)):
            rounded, found = [x.to(dtype), dt, A, B.to(dtype), C.to(dtype), S], []
            for scan, inputs in ((ssd_loop, [t.double() for t in rounded]), (BACKENDS[backend], rounded)):
                inputs = [t.detach().requires_grad_() for t in inputs]
                out = scan(*inputs)
                found.append((*out, *torch.autograd.grad(out, inputs, [torch.ones_like(t) for t in out])))
            errors = [((b - a).norm() / a.norm()).item() for a, b in zip(*found)]
            print(f"{backend:7} {str(dtype)[6:]:15}" + "  ".join(f"{error:.1e}" for error in errors))
            worst = max(worst, max(errors) / limit)
    raise SystemExit(None if worst < 1 else f"{worst:.1f} times as large as is allowed")
