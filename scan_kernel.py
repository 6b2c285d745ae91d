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

import torch


def ssd_loop(x, dt, A, B, C, init_state=None, chunk=64):
    """The recurrence as it is defined. Arguments and results of `ssd`, any float dtype, gradients by autograd."""
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


BACKENDS = {"torch": ssd_chunked}


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
    backend = backend or "torch"
    check(backend in BACKENDS, "backend", f"one of {', '.join(BACKENDS)}", backend)
    return BACKENDS[backend](x, dt, A, B, C, init_state, chunk)
