"""The scan of Mamba-2 (SSD, "state space duality"): one recurrence, several ways to compute it.

Each head carries a state S, a matrix of p x n numbers, along the sequence (arXiv 2405.21060):

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T        forget a little, then write x_t under the address B_t
    y_t = S_t C_t                                     read at the address C_t

S_{-1} is the *initial state*, the subject of this project; S_{l-1}, the *final state*, is what the next segment or
the next batch starts from. Both are arguments like any other here: gradients flow into the first, out of the second.

    ssd_loop      the two lines above, token by token: slow and obvious, the reference of every test
    ssd_chunked   the same numbers from matrix products over chunks of tokens, in plain torch: the path of a CPU
    ssd           what the model calls: checks its arguments and picks one

Dimensions, the same letters in every file:
    b batch · l length · c chunk · q, s place in a chunk (row, column) · h head · p head dim
    g group of B, C · r head within its group (h = g r) · n state dim · d model width
"""

from __future__ import annotations

import os
from typing import Optional

import torch

try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:  # Windows, macOS: torch alone

    def jit(kernel):
        return None

    triton = None


def ssd_loop(x, dt, A, B, C, init_state=None, chunk=64):
    """The recurrence as it is defined. Arguments and results of `ssd`, any float dtype, gradients by autograd."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    B, C = (t.to(dt.dtype).repeat_interleave(h // g, dim=2) for t in (B, C))  # (b, l, h, n)
    S = dt.new_zeros(b, h, p, n) if init_state is None else init_state
    y = []
    for t in range(l):
        decay = torch.exp(dt[:, t] * A)[:, :, None, None]  # (b, h, 1, 1)
        S = decay * S + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t].to(dt.dtype), B[:, t])  # (b, h, p, n)
        y.append(torch.einsum("bhpn,bhn->bhp", S, C[:, t]))
    return torch.stack(y, dim=1).to(x.dtype), S


# ----------------------------------------------------------------------------------------------------------------------
# The chunked scan. Unrolled over a chunk of c tokens that starts from the state S, the recurrence says, with
# u_s = dt_s x_s, a_t = dt_t A, and the running sum cs_q = a_0 + ... + a_q within the chunk,
#
#     y_q   = sum_{s <= q} exp(cs_q - cs_s) (C_q . B_s) u_s  +  exp(cs_q) S C_q
#     S_new = sum_s exp(cs_last - cs_s) u_s B_s^T  +  exp(cs_last) S
#
# which is matrix products, c tokens at a time. Four steps:
#
#     1 inside the chunk   y     = W u,  W = (C B^T) o L,  L[q, s] = exp(cs_q - cs_s) for s <= q, else 0
#     2 from the past      y    += exp(cs) C S^T
#     3 written            S_new = (exp(cs_last - cs) u)^T B
#     4 carried over       S_new += exp(cs_last) S
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
# ----------------------------------------------------------------------------------------------------------------------


def _decays_and_scores(dt, A, B, C):
    """cs (b, c, g, r), L (b, g, r, q, s) and C B^T (b, g, 1, q, s) of one chunk. Decays are exp(min(difference, 0)):
    a difference of two sums can round to just above zero, and exp of what the mask hides must not overflow."""
    cs = torch.cumsum(dt * A, dim=1)
    cs_head = cs.permute(0, 2, 3, 1)  # (b, g, r, c)
    L = (cs_head[..., :, None] - cs_head[..., None, :]).clamp_(max=0).exp_().tril_()
    return cs, L, torch.einsum("bqgn,bsgn->bgqs", C, B).to(cs.dtype)[:, :, None]


class ChunkedSSD(torch.autograd.Function):
    """`ssd_chunked`, heads split into (g, r), with the backward above written out. Autograd would keep every (c, c)
    matrix and pass over each many times more; here they are made again, and only what crosses a border is kept."""

    @staticmethod
    def forward(ctx, x, dt, A, B, C, S, chunk):
        y, states, y_pasts = torch.empty_like(x), [], []
        for x_c, dt_c, B_c, C_c, y_c in zip(*(t.split(chunk, dim=1) for t in (x, dt, B, C, y))):
            cs, L, CB = _decays_and_scores(dt_c, A, B_c, C_c)
            u = x_c * dt_c[..., None].to(x.dtype)  # (b, c, g, r, p)
            y_c.copy_(torch.einsum("bgrqs,bsgrp->bqgrp", L.mul_(CB).to(x.dtype), u))  # 1
            y_past = None
            if S is not None:
                y_past = _exp(cs, x) * torch.einsum("bqgn,bgrpn->bqgrp", C_c, S.to(x.dtype))
                y_c += y_past  # 2
            states.append(S)
            y_pasts.append(y_past)
            S_new = torch.einsum("bsgrp,bsgn->bgrpn", u * _exp(cs[:, -1:] - cs, x), B_c).to(cs.dtype)  # 3
            S = S_new if S is None else S_new.addcmul_(_exp(cs[:, -1, ..., None], cs), S)  # 4
        ctx.save_for_backward(x, dt, A, B, C, *states, *y_pasts)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        return y, S

    @staticmethod
    def backward(ctx, dy, dS):
        x, dt, A, B, C, *kept = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, ddt, dB, dC = (torch.empty_like(t) for t in (x, dt, B, C))
        da = torch.empty_like(dt)
        tensors = (x, dt, B, C, dy, dx, ddt, dB, dC, da)
        chunks = list(
            zip(*(t.split(ctx.chunk, dim=1) for t in tensors), kept[: len(kept) // 2], kept[len(kept) // 2 :])
        )
        for i in reversed(range(len(chunks))):
            x_c, dt_c, B_c, C_c, dy_c, dx_c, ddt_c, dB_c, dC_c, da_c, S, y_past = chunks[i]
            cs, L, CB = _decays_and_scores(dt_c, A, B_c, C_c)
            u = x_c * dt_c[..., None].to(x.dtype)
            E = torch.einsum("bqgrp,bsgrp->bgrqs", dy_c, u).to(cs.dtype).mul_(L)
            du = torch.einsum("bgrqs,bqgrp->bsgrp", L.mul_(CB).to(x.dtype), dy_c)
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
            if i > 0 or ctx.needs_input_grad[5]:
                dS_read = torch.einsum("bqgrp,bqgn->bgrpn", read, C_c).to(cs.dtype)
                dS = dS_read if dS is None else dS_read.add_(dS)
            torch.mul(du, dt_c[..., None].to(x.dtype), out=dx_c)
            torch.sum(x_c * du, -1, dtype=ddt.dtype, out=ddt_c)
        ddt.addcmul_(da, A)
        return dx, ddt, (dt * da).sum((0, 1)), dB, dC, dS if ctx.needs_input_grad[5] else None, None


def _exp(exponent, like):
    return torch.exp(exponent.clamp(max=0))[..., None].to(like.dtype)


def ssd_chunked(x, dt, A, B, C, init_state=None, chunk=64):
    """The chunked scan in plain torch, on any device. Arguments and results of `ssd`."""
    g, wide = B.shape[2], torch.promote_types(x.dtype, torch.float32)
    heads = (g, x.shape[2] // g)
    S = None if init_state is None else init_state.unflatten(1, heads)
    with torch.autocast(x.device.type, enabled=False):  # the products are in x's dtype, decays and states stay wide
        y, S = ChunkedSSD.apply(
            x.unflatten(2, heads), dt.to(wide).unflatten(2, heads), A.to(wide).unflatten(0, heads), B, C, S, chunk
        )
    return y.flatten(2, 3), S.flatten(1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The chunked scan on a GPU, in Triton: the four steps and their gradients as above, cut into four kernels.
#
#     walk     steps 3 and 4: a program carries one tile of one head's state along the chunks, in registers, and leaves
#              the state that each chunk starts from in memory. Its first load is init_state, its last store final_state.
#     output   steps 1 and 2: every chunk knows its state now, so all chunks, heads and tiles of p run in parallel.
#     walk     once more, backward: S' = (exp(cs) y')^T C + exp(cs_last) S_new' is step 3 and 4 with y' for x, C for B and
#              time reversed. It starts from final_state', leaves every chunk's S_new', and ends with init_state'.
#     inputs'  x', dt', A' and all of a', in parallel over chunks, heads and tiles of p.
#     group'   B' and C': a program adds up the heads of its group, in a fixed order, so that two runs give the same bits.
#
# Two launches forward, three backward. C B^T and L are made again wherever they are needed and never stored; the states
# between the chunks are kept from the forward pass (twice the bytes of x at n = 128, chunk = 64): making them again
# would be a fourth launch. They are kept in x's dtype, in which the matrix products read them; what is carried from
# chunk to chunk stays fp32, like every sum. (One kernel for all gradients would save loads, but spills registers.)
#
# Tiles are named by capitals in their tags: Q places in a chunk, P and N tiles of p and n. Sizes known at compile time are
# capitals as well. Places past the end of the sequence load as zeros: with dt = 0 they neither decay nor write.
# Program ids become 64-bit before they meet a stride, so offsets past 2^31 elements do not wrap around.
# ----------------------------------------------------------------------------------------------------------------------


@jit
def _rows(ptr, stride, offs_l, offs_d, l):
    """The tile of a matrix in memory at rows offs_l and columns offs_d, its rows `stride` apart; 0 past the end."""
    return tl.load(ptr + offs_l[:, None] * stride + offs_d[None, :], mask=offs_l[:, None] < l, other=0.0)


@jit
def _exp0(exponent):
    return tl.exp(tl.minimum(exponent, 0.0))  # decays only: see _decays_and_scores


@jit
def _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H: tl.constexpr):
    """dt, cs and cs_last of one head in one chunk."""
    dt = tl.load(dt_ptr + (pid_b * l + offs_l) * H + pid_h, mask=offs_l < l, other=0.0)  # [Q]
    a = dt * tl.load(A_ptr + pid_h)
    return dt, tl.cumsum(a, 0), tl.sum(a, 0)


@jit
def _lower(cs, Q: tl.constexpr):
    """L: exp(cs_q - cs_s) for s <= q, else 0."""
    offs_q = tl.arange(0, Q)
    return tl.where(offs_q[:, None] >= offs_q[None, :], _exp0(cs[:, None] - cs[None, :]), 0.0)  # [Q, Q]


@jit
def _tile_ids(H: tl.constexpr, Q: tl.constexpr, P: tl.constexpr):
    """Which chunk, head, batch row and tile of p is this program's? Heads are next to each other in the order of
    launch, so that those of one group find its B and C in the cache."""
    pid = tl.program_id(0).to(tl.int64)
    pid_c, pid_h = pid // H, pid % H
    offs_l = pid_c * Q + tl.arange(0, Q)  # [Q]
    offs_p = tl.program_id(1) * P + tl.arange(0, P)  # [P]
    return pid_c, pid_h, tl.program_id(2).to(tl.int64), offs_l, offs_p


@jit
def _walk_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, states_ptr, first_ptr, last_ptr,  # backward: y' for x, C for B; first: None = zeros
    l, chunks, stride_x_b, stride_x_l, stride_B_b, stride_B_l,
    REVERSE: tl.constexpr, H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # which tile of which state
    pid_h, pid_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    offs_p = tl.program_id(0) // (N_ALL // N) * P + tl.arange(0, P)  # [P]
    offs_n = tl.program_id(0) % (N_ALL // N) * N + tl.arange(0, N)  # [N]
    offs_s = offs_p[:, None] * N_ALL + offs_n[None, :]  # [P, N]
    x_ptr += pid_b * stride_x_b + pid_h * P_ALL
    B_ptr += pid_b * stride_B_b + pid_h // (H // G) * N_ALL
    S = tl.zeros((P, N), tl.float32)  # [P, N]
    if first_ptr is not None:
        S += tl.load(first_ptr + (pid_b * H + pid_h) * P_ALL * N_ALL + offs_s)
    # from chunk to chunk
    pid_c = pid_b * 0 + (chunks - 1 if REVERSE else 0)
    for _ in range(chunks):
        tl.store(states_ptr + ((pid_b * chunks + pid_c) * H + pid_h) * P_ALL * N_ALL + offs_s, S)
        offs_l = pid_c * Q + tl.arange(0, Q)  # [Q]
        dt, cs, cs_last = _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H)
        weight = _exp0(cs) if REVERSE else _exp0(cs_last - cs) * dt  # [Q]
        x = _rows(x_ptr, stride_x_l, offs_l, offs_p, l)  # [Q, P]
        B = _rows(B_ptr, stride_B_l, offs_l, offs_n, l)  # [Q, N]
        x = (x * weight[:, None]).to(x.dtype)
        S = tl.dot(tl.trans(x), B, S * _exp0(cs_last), input_precision=PRECISION)  # 3, 4
        pid_c += -1 if REVERSE else 1
    tl.store(last_ptr + (pid_b * H + pid_h) * P_ALL * N_ALL + offs_s, S)


@jit
def _output_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, y_ptr,
    l, chunks, stride_x_b, stride_x_l, stride_B_b, stride_B_l,
    H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # which tile of y
    pid_c, pid_h, pid_b, offs_l, offs_p = _tile_ids(H, Q, P)
    B_ptr += pid_b * stride_B_b + pid_h // (H // G) * N_ALL
    C_ptr += pid_b * stride_B_b + pid_h // (H // G) * N_ALL
    states_ptr += ((pid_b * chunks + pid_c) * H + pid_h) * P_ALL * N_ALL
    # what meets over n: C B^T and C S^T
    CB = tl.zeros((Q, Q), tl.float32)  # [Q, Q]
    y = tl.zeros((Q, P), tl.float32)  # [Q, P]
    for n in range(0, N_ALL, N):
        offs_n = n + tl.arange(0, N)  # [N]
        B = _rows(B_ptr, stride_B_l, offs_l, offs_n, l)  # [Q, N]
        C = _rows(C_ptr, stride_B_l, offs_l, offs_n, l)  # [Q, N]
        S = tl.load(states_ptr + offs_p[:, None] * N_ALL + offs_n[None, :])  # [P, N]
        CB = tl.dot(C, tl.trans(B), CB, input_precision=PRECISION)
        y = tl.dot(C, tl.trans(S), y, input_precision=PRECISION)
    # y = exp(cs) C S^T + W u; dt goes into W, so that x enters the product as it is
    dt, cs, _ = _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H)
    x = _rows(x_ptr + pid_b * stride_x_b + pid_h * P_ALL, stride_x_l, offs_l, offs_p, l)  # [Q, P]
    W = (CB * _lower(cs, Q) * dt[None, :]).to(x.dtype)  # [Q, Q]
    y = tl.dot(W, x, y * _exp0(cs)[:, None], input_precision=PRECISION)  # 1, 2
    y_ptrs = y_ptr + ((pid_b * l + offs_l) * H + pid_h)[:, None] * P_ALL + offs_p[None, :]
    tl.store(y_ptrs, y, mask=offs_l[:, None] < l)


@jit
def _inputs_grad_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, dx_ptr, ddt_ptr, dA_ptr,
    l, chunks, batch, stride_x_b, stride_x_l, stride_B_b, stride_B_l,
    H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # which tile of x'
    pid_c, pid_h, pid_b, offs_l, offs_p = _tile_ids(H, Q, P)
    B_ptr += pid_b * stride_B_b + pid_h // (H // G) * N_ALL
    C_ptr += pid_b * stride_B_b + pid_h // (H // G) * N_ALL
    offs_state = ((pid_b * chunks + pid_c) * H + pid_h) * P_ALL * N_ALL
    # what meets over n: C B^T, C S^T, B S_new'^T and <S_new', S>
    CB = tl.zeros((Q, Q), tl.float32)  # [Q, Q]
    du = tl.zeros((Q, P), tl.float32)  # [Q, P]
    carried = tl.zeros((P,), tl.float32)  # [P]
    read = tl.zeros((Q,), tl.float32)  # [Q]
    dy = _rows(dy_ptr + (pid_b * l * H + pid_h) * P_ALL, H * P_ALL, offs_l, offs_p, l)  # [Q, P]
    for n in range(0, N_ALL, N):
        offs_n = n + tl.arange(0, N)  # [N]
        B = _rows(B_ptr, stride_B_l, offs_l, offs_n, l)  # [Q, N]
        C = _rows(C_ptr, stride_B_l, offs_l, offs_n, l)  # [Q, N]
        offs_s = offs_state + offs_p[:, None] * N_ALL + offs_n[None, :]  # [P, N]
        S = tl.load(states_ptr + offs_s)  # [P, N]
        dS = tl.load(dstates_ptr + offs_s)  # [P, N]
        CB = tl.dot(C, tl.trans(B), CB, input_precision=PRECISION)
        read += tl.sum(tl.dot(dy, S, input_precision=PRECISION) * C, 1)
        du = tl.dot(B, tl.trans(dS), du, input_precision=PRECISION)
        carried += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    # u' = W^T y' + exp(cs_last - cs) B S_new'^T, and the four sums of a', in the order of the derivation
    dt, cs, cs_last = _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H)
    offs_out = (pid_b * l + offs_l) * H + pid_h  # [Q]
    x = _rows(x_ptr + pid_b * stride_x_b + pid_h * P_ALL, stride_x_l, offs_l, offs_p, l)  # [Q, P]
    W = CB * _lower(cs, Q)  # [Q, Q]
    du *= _exp0(cs_last - cs)[:, None]
    paths = tl.dot(dy, tl.trans(x), input_precision=PRECISION) * dt[None, :] * W  # W' o W [Q, Q]
    read *= _exp0(cs)  # [Q]
    written = tl.sum(x * du, 1) * dt  # [Q]
    da = tl.cumsum(tl.sum(paths, 1) - tl.sum(paths, 0) + read, 0, reverse=True)  # [Q]
    da += tl.cumsum(written, 0) - written + _exp0(cs_last) * tl.sum(carried, 0)
    du = tl.dot(tl.trans(W.to(x.dtype)), dy, du, input_precision=PRECISION)
    tl.store(dx_ptr + offs_out[:, None] * P_ALL + offs_p[None, :], du * dt[:, None], mask=offs_l[:, None] < l)
    # each tile of p adds its part to dt' and A': torch adds up the parts
    ddt = tl.sum(x * du, 1) + tl.load(A_ptr + pid_h) * da  # [Q]
    tl.store(ddt_ptr + tl.program_id(1) * batch * l * H + offs_out, ddt, mask=offs_l < l)
    part = (tl.program_id(1) * batch + pid_b) * chunks + pid_c
    tl.store(dA_ptr + part * H + pid_h, tl.sum(dt * da, 0))


@jit
def _group_grad_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, states_ptr, dstates_ptr, dy_ptr, dB_ptr, dC_ptr,
    l, chunks, stride_x_b, stride_x_l, stride_B_b, stride_B_l,
    H: tl.constexpr, G: tl.constexpr, P_ALL: tl.constexpr, N_ALL: tl.constexpr,
    Q: tl.constexpr, P: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # which tile of B' and C'
    pid = tl.program_id(0).to(tl.int64)
    pid_c, pid_g, pid_b = pid // G, pid % G, tl.program_id(2).to(tl.int64)
    offs_l = pid_c * Q + tl.arange(0, Q)  # [Q]
    offs_n = tl.program_id(1) * N + tl.arange(0, N)  # [N]
    # within the chunk: E summed over the heads of the group and the tiles of p, then one product for all of them
    E = tl.zeros((Q, Q), tl.float32)  # [Q, Q]
    for i in range(H // G * (P_ALL // P)):
        pid_h = pid_g * (H // G) + i // (P_ALL // P)
        offs_p = i % (P_ALL // P) * P + tl.arange(0, P)  # [P]
        dt, cs, cs_last = _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H)
        x = _rows(x_ptr + pid_b * stride_x_b + pid_h * P_ALL, stride_x_l, offs_l, offs_p, l)  # [Q, P]
        dy = _rows(dy_ptr + (pid_b * l * H + pid_h) * P_ALL, H * P_ALL, offs_l, offs_p, l)  # [Q, P]
        E += tl.dot(dy, tl.trans(x), input_precision=PRECISION) * dt[None, :] * _lower(cs, Q)
    B = _rows(B_ptr + pid_b * stride_B_b + pid_g * N_ALL, stride_B_l, offs_l, offs_n, l)  # [Q, N]
    C = _rows(C_ptr + pid_b * stride_B_b + pid_g * N_ALL, stride_B_l, offs_l, offs_n, l)  # [Q, N]
    dC = tl.dot(E.to(B.dtype), B, input_precision=PRECISION)  # [Q, N]
    dB = tl.dot(tl.trans(E.to(B.dtype)), C, input_precision=PRECISION)  # [Q, N]
    # from and to the states, head by head
    for i in range(H // G * (P_ALL // P)):
        pid_h = pid_g * (H // G) + i // (P_ALL // P)
        offs_p = i % (P_ALL // P) * P + tl.arange(0, P)  # [P]
        dt, cs, cs_last = _steps(dt_ptr, A_ptr, pid_b, pid_h, offs_l, l, H)
        x = _rows(x_ptr + pid_b * stride_x_b + pid_h * P_ALL, stride_x_l, offs_l, offs_p, l)  # [Q, P]
        dy = _rows(dy_ptr + (pid_b * l * H + pid_h) * P_ALL, H * P_ALL, offs_l, offs_p, l)  # [Q, P]
        offs_s = ((pid_b * chunks + pid_c) * H + pid_h) * P_ALL * N_ALL + offs_p[:, None] * N_ALL + offs_n[None, :]
        S = tl.load(states_ptr + offs_s)  # [P, N]
        dS = tl.load(dstates_ptr + offs_s)  # [P, N]
        dy = (dy * _exp0(cs)[:, None]).to(dy.dtype)
        x = (x * (_exp0(cs_last - cs) * dt)[:, None]).to(x.dtype)
        dC = tl.dot(dy, S, dC, input_precision=PRECISION)
        dB = tl.dot(x, dS, dB, input_precision=PRECISION)
    offs_out = ((pid_b * l + offs_l) * G + pid_g)[:, None] * N_ALL + offs_n[None, :]  # [Q, N]
    tl.store(dB_ptr + offs_out, dB, mask=offs_l[:, None] < l)
    tl.store(dC_ptr + offs_out, dC, mask=offs_l[:, None] < l)


# Launch settings, by kernel and bytes of an element of x: largest tile of p, largest tile of n, warps, pipeline stages.
# Chosen from results/kernel_report.py --compile; --sweep times others. SSD_SETTINGS="walk=32,64,4,2 output=..." overrides.
SETTINGS = {
    ("walk", 2): (32, 64, 4, 2), ("walk", 4): (32, 32, 4, 1),
    ("output", 2): (64, 64, 4, 2), ("output", 4): (32, 32, 4, 1),
    ("inputs_grad", 2): (64, 32, 8, 1), ("inputs_grad", 4): (32, 32, 8, 1),
    ("group_grad", 2): (64, 64, 8, 1), ("group_grad", 4): (32, 32, 8, 1),
}  # fmt: skip


def _setting(name, x, B):
    override = dict(item.split("=") for item in os.environ.get("SSD_SETTINGS", "").split())
    block_p, block_n, warps, stages = map(
        int, override[name].split(",") if name in override else SETTINGS[name, x.element_size()]
    )
    return min(block_p, x.shape[3]), min(block_n, B.shape[3]), warps, stages


def _launch(name, kernel, grid, args, x, B, chunk, **flags):
    """Runs `kernel` on the grid that `grid` makes of the number of tiles of p and of n."""
    block_p, block_n, warps, stages = _setting(name, x, B)
    (h, p), (g, n) = x.shape[2:], B.shape[2:]
    tf32 = x.is_cuda and torch.backends.cuda.matmul.allow_tf32  # only fp32 products could use it
    with torch.cuda.device_of(x):
        kernel[grid(p // block_p, n // block_n)](
            *args, **flags, H=h, G=g, P_ALL=p, N_ALL=n, Q=chunk, P=block_p, N=block_n,
            PRECISION="tf32" if tf32 else "ieee", num_warps=warps, num_stages=stages,
        )  # fmt: skip


def _packed(*tensors):
    """The same numbers, all with one set of strides, the last two dimensions without gaps."""
    strides = tensors[0].stride()
    fits = strides[2:] == (tensors[0].shape[3], 1) and all(t.stride() == strides for t in tensors)
    return tensors if fits else tuple(t.contiguous() for t in tensors)


def _walk(x, dt, A, B, first, chunk, reverse):
    """The state before each chunk (b, c, h, p, n) and the last one; `reverse`: the gradient after each chunk."""
    b, l, h, p = x.shape
    chunks, n = triton.cdiv(l, chunk), B.shape[3]
    states, last = x.new_empty(b, chunks, h, p, n), dt.new_empty(b, h, p, n)
    args = (x, dt, A, B, states, first, last, l, chunks, *x.stride()[:2], *B.stride()[:2])
    _launch("walk", _walk_kernel, lambda tp, tn: (tp * tn, h, b), args, x, B, chunk, REVERSE=reverse)
    return states, last


@torch.library.custom_op("ssd::forward", mutates_args=())
def _forward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    init_state: Optional[torch.Tensor], chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, final_state, and the state before each chunk."""
    (b, l, h, _), dt, (x,), (B, C) = x.shape, dt.contiguous(), _packed(x), _packed(B, C)
    init_state = None if init_state is None else init_state.contiguous()
    states, final_state = _walk(x, dt, A, B, init_state, chunk, reverse=False)
    y, chunks = x.new_empty(x.shape), states.shape[1]
    args = (x, dt, A, B, C, states, y, l, chunks, *x.stride()[:2], *B.stride()[:2])
    _launch("output", _output_kernel, lambda tp, tn: (chunks * h, tp, b), args, x, B, chunk)
    return y, final_state, states

@_forward.register_fake
def _(x, dt, A, B, C, init_state, chunk):
    (b, l, h, p), n = x.shape, B.shape[3]
    return x.new_empty(b, l, h, p), dt.new_empty(b, h, p, n), x.new_empty(b, -(-l // chunk), h, p, n)


@torch.library.custom_op("ssd::backward", mutates_args=())
def _backward(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, states: torch.Tensor,
    dy: Optional[torch.Tensor], dfinal_state: Optional[torch.Tensor], chunk: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of x, dt, A, B, C and init_state."""
    dy = torch.zeros_like(x) if dy is None else dy
    dt, dy, (x,), (B, C) = dt.contiguous(), dy.contiguous(), _packed(x), _packed(B, C)
    dfinal_state = None if dfinal_state is None else dfinal_state.contiguous()
    (b, l, h, _), g, chunks = x.shape, B.shape[2], states.shape[1]
    dstates, dinit_state = _walk(dy, dt, A, C, dfinal_state, chunk, reverse=True)
    inputs = (x, dt, A, B, C, states, dstates, dy)
    sizes = (l, chunks, *x.stride()[:2], *B.stride()[:2])
    dx, dB, dC = (t.new_empty(t.shape) for t in (x, B, C))
    parts = x.shape[3] // _setting("inputs_grad", x, B)[0]  # tiles of p
    ddt, dA = dt.new_empty(parts, b, l, h), dt.new_empty(parts, b, chunks, h)
    _launch("inputs_grad", _inputs_grad_kernel, lambda tp, tn: (chunks * h, tp, b), (*inputs, dx, ddt, dA, l, chunks, b, *sizes[2:]),
            x, B, chunk)  # fmt: skip
    _launch("group_grad", _group_grad_kernel, lambda tp, tn: (chunks * g, tn, b), (*inputs, dB, dC, *sizes),
            x, B, chunk)  # fmt: skip
    return dx, ddt.sum(0), dA.sum((0, 1, 2)), dB, dC, dinit_state


@_backward.register_fake
def _(x, dt, A, B, C, states, dy, dfinal_state, chunk):
    b, _, h, p, n = states.shape
    return *(t.new_empty(t.shape) for t in (x, dt, A, B, C)), dt.new_empty(b, h, p, n)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5], output[2])
    ctx.has_init, ctx.chunk = inputs[5] is not None, inputs[6]
    ctx.set_materialize_grads(False)


def _backprop(ctx, dy, dfinal_state, _):
    *grads, dinit_state = _backward(*ctx.saved_tensors, dy, dfinal_state, ctx.chunk)
    return *grads, dinit_state if ctx.has_init else None, None


_forward.register_autograd(_backprop, setup_context=_save)


def ssd_triton(x, dt, A, B, C, init_state=None, chunk=64):
    """The chunked scan in Triton. Arguments and results of `ssd`; `triton_needs` says what it can take."""
    chunk = min(max(chunk, 16), 128)
    y, final_state, _ = _forward(x, dt.float(), A.float(), B, C, init_state, chunk)
    return y, final_state


def triton_needs(x, B):
    """What keeps the kernels from these arguments, as (argument, what it should be, what it is); None if nothing."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if triton is None:
        return "backend", "'torch' where triton is not installed", "'triton'"
    if not (x.is_cuda or interpreted and x.device.type == "cpu"):
        return "backend", "'torch' without a GPU (or TRITON_INTERPRET=1)", f"'triton' for a tensor on {x.device}"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "backend", "'torch' on a GPU older than compute capability 8.0", "'triton'"
    if x.element_size() > 4:
        return "x", "float32, bfloat16 or float16 for backend 'triton'", x.dtype
    if x.shape[3] not in (16, 32, 64, 128):
        return "p of x", "16, 32, 64 or 128 for backend 'triton'", x.shape[3]
    if B.shape[3] not in (16, 32, 64, 128, 256):
        return "n of B, C", "16, 32, 64, 128 or 256 for backend 'triton'", B.shape[3]
    return None


BACKENDS = {"triton": ssd_triton, "torch": ssd_chunked}


def ssd(x, dt, A, B, C, init_state=None, chunk=64, backend=None):
    """The scan: y_t = S_t C_t with S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, for each head.

    Arguments
        x           (b, l, h, p)  float32, bfloat16, float16 or float64; any l >= 1
        dt          (b, l, h)     >= 0, the step sizes, after softplus
        A           (h)           < 0
        B, C        (b, l, g, n)  in x's dtype; head i uses group i // (h // g)
        init_state  (b, h, p, n)  float32 (float64 if x is), the state before token 0; None = zeros
        chunk       tokens a chunk, a power of two
        backend     "triton", "torch", or None: Triton on a GPU, torch elsewhere
    Returns
        y           (b, l, h, p)  in x's dtype
        final_state (b, h, p, n)  as init_state, the state after the last token
    Gradients reach all six tensors, from both results. Raises ValueError naming the argument that does not fit."""

    def check(ok, name, expected, got):
        if not ok:
            raise ValueError(f"ssd: {name} should be {expected}, not {got}")

    def check_shape(name, tensor, *shape):
        check(tuple(tensor.shape) == shape, name, f"of shape {shape}", tuple(tensor.shape))

    wide = torch.promote_types(x.dtype, torch.float32)
    check(x.dim() == 4 and x.shape[1] > 0, "x", "of shape (b, l, h, p) with l >= 1", tuple(x.shape))
    b, l, h, p = x.shape
    check(B.dim() == 4 and B.shape[2] > 0 and h % B.shape[2] == 0, "B", f"(b, l, g, n), {h} % g == 0", tuple(B.shape))
    check_shape("dt", dt, b, l, h)
    check_shape("A", A, h)
    check_shape("B", B, b, l, *B.shape[2:])
    check_shape("C", C, *B.shape)
    check(x.dtype.is_floating_point and B.dtype == C.dtype == x.dtype, "x, B, C", "of one float dtype",
          (x.dtype, B.dtype, C.dtype))  # fmt: skip
    if init_state is not None:
        check_shape("init_state", init_state, b, h, p, B.shape[3])
        check(init_state.dtype == wide, "init_state", wide, init_state.dtype)
    check(chunk > 0 and chunk & (chunk - 1) == 0, "chunk", "a power of two", chunk)
    needs = triton_needs(x, B)
    backend = backend or ("triton" if x.is_cuda and needs is None else "torch")
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    if backend == "triton" and needs:
        check(False, *needs)
    return BACKENDS[backend](x, dt, A, B, C, init_state, chunk)
