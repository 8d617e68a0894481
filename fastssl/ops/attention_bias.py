"""Attention with an additive bias [H, L, M] or [B, H, L, M], causal attention, and the plain-torch bodies of both."""

import torch
from torch import Tensor

from . import check
from .dispatch import Function, acc_dtype, fake, first_order, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import attention_bias

    return attention_bias


@check.once_a_signature
def check_bias(op_name: str, q: Tensor, k: Tensor, bias: Tensor | None, causal: bool) -> None:
    """The checks of a bias, or of `causal`, for queries [B, L, H, E] and keys [B, M, H, E]."""
    (batch, queries, heads, _), keys = q.shape, k.shape[1]
    if causal and bias is not None:
        check.fail(op_name, "causal must be False with a bias, got True: put −∞ above the bias's diagonal")
    if causal and queries != keys:
        check.fail(op_name, f"causal needs as many keys as queries, L={queries}, got {keys}")
    if bias is None:
        return
    check.is_tensor(op_name, "bias", bias)
    sizes = {"H": heads, "L": queries, "M": keys}
    if bias.dim() == 4:
        check.tensor(op_name, "bias", bias, "B H L M", B=batch, **sizes)
    else:
        check.tensor(op_name, "bias", bias, "H L M", **sizes)
    check.floating(op_name, bias=bias)
    if bias.device != q.device:
        check.fail(op_name, f"bias must be on {q.device} like q, got {bias.device}")


def plain_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, E], log-sum-exp of the scores [B, H, L])."""
    scores = _scores(q, k, bias, scale)
    weights = scores.softmax(-1)
    out = torch.einsum("bhlm,bmhe->blhe", weights, v.to(weights.dtype)).to(q.dtype)
    return out.contiguous(), scores.logsumexp(-1)


def plain_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, gradient of the scores [B, H, L, M])."""
    dtype = lse.dtype
    dout = dout.to(dtype)
    weights = _scores(q, k, bias, scale).softmax(-1)  # scores less a rounded lse of 10⁹ would be no weights
    dv = torch.einsum("bhlm,blhe->bmhe", weights, dout)
    dweights = torch.einsum("blhe,bmhe->bhlm", dout, v.to(dtype))
    row_dot = (dout * out.to(dtype)).sum(-1).transpose(1, 2).unsqueeze(-1)  # [B, H, L, 1]
    dscores = weights * (dweights - row_dot)
    dproducts = dscores * scale
    dq = torch.einsum("bhlm,bmhe->blhe", dproducts, k.to(dtype))
    dk = torch.einsum("bhlm,blhe->bmhe", dproducts, q.to(dtype))
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), dscores


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Scaled scores [B, H, L, M] plus the bias, in float32 or wider."""
    dtype = acc_dtype(q)
    scores = torch.einsum("blhe,bmhe->bhlm", q.to(dtype), k.to(dtype)) * scale
    return scores if bias is None else scores + bias.to(dtype)


@op("attention_bias_fwd")
def _attention_bias_fwd(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attention_fwd` with a bias [H, L, M] or [B, H, L, M]; lse is that of the biased scores."""
    return plain_forward(q, k, v, bias, scale)


@fake(_attention_bias_fwd)
def _(q, k, v, bias, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=acc_dtype(q))


register_triton(_attention_bias_fwd, lambda: _kernels().attention_bias_fwd)


@op("attention_bias_bwd")
def _attention_bias_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    with_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dbias contiguous in bias's dtype and shape, or empty without `with_dbias`)."""
    dq, dk, dv, dscores = plain_backward(dout, q, k, v, bias, out, lse, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), _dbias(dscores, bias, with_dbias)


@fake(_attention_bias_bwd)
def _(dout, q, k, v, bias, out, lse, scale, with_dbias):
    dbias = bias.new_empty(bias.shape if with_dbias else (0,))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


register_triton(_attention_bias_bwd, lambda: _kernels().attention_bias_bwd)


@op("attention_packed_bias_fwd")
def _attention_packed_bias_fwd(qkv: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attention_bias_fwd` of qkv [B, L, 3, H, E]."""
    q, k, v = qkv.unbind(2)
    return plain_forward(q, k, v, bias, scale)


@fake(_attention_packed_bias_fwd)
def _(qkv, bias, scale):
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty(batch, length, heads, width), qkv.new_empty(batch, heads, length, dtype=acc_dtype(qkv))


register_triton(_attention_packed_bias_fwd, lambda: _kernels().attention_packed_bias_fwd)


@op("attention_packed_bias_bwd")
def _attention_packed_bias_bwd(
    dout: Tensor, qkv: Tensor, bias: Tensor, out: Tensor, lse: Tensor, scale: float, with_dbias: bool
) -> tuple[Tensor, Tensor]:
    """(the gradient of qkv, [B, L, 3, H, E] contiguous, and that of the bias, as `_attention_bias_bwd`)."""
    q, k, v = qkv.unbind(2)
    *gradients, dscores = plain_backward(dout, q, k, v, bias, out, lse, scale)
    return torch.stack(gradients, 2), _dbias(dscores, bias, with_dbias)


@fake(_attention_packed_bias_bwd)
def _(dout, qkv, bias, out, lse, scale, with_dbias):
    return qkv.new_empty(qkv.shape), bias.new_empty(bias.shape if with_dbias else (0,))


register_triton(_attention_packed_bias_bwd, lambda: _kernels().attention_packed_bias_bwd)


def _dbias(dscores: Tensor, bias: Tensor, wanted: bool) -> Tensor:
    """Gradient of a bias from that of the scores [B, H, L, M]."""
    if not wanted:
        return bias.new_empty(0)
    return (dscores if bias.dim() == 4 else dscores.sum(0)).to(bias.dtype).contiguous()


@op("attention_causal_fwd")
def _attention_causal_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attention_fwd` where query i sees the keys 0 to i."""
    return plain_forward(q, k, v, _causal_bias(q), scale)


@fake(_attention_causal_fwd)
def _(q, k, v, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=acc_dtype(q))


@op("attention_causal_bwd")
def _attention_causal_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in q's dtype."""
    dq, dk, dv, _ = plain_backward(dout, q, k, v, _causal_bias(q), out, lse, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@fake(_attention_causal_bwd)
def _(dout, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _causal_bias(q: Tensor) -> Tensor:
    length = q.shape[1]
    return torch.full((length, length), float("-inf"), dtype=acc_dtype(q), device=q.device).triu(1)


class AttentionBias(Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        out, lse = _attention_bias_fwd(q, k, v, bias, scale)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_order("attention")
    def backward(ctx, dout):
        with_dbias = ctx.needs_input_grad[3]
        *gradients, dbias = _attention_bias_bwd(dout, *ctx.saved_tensors, ctx.scale, with_dbias)
        return *gradients, dbias if with_dbias else None, None


class AttentionPackedBias(Function):
    @staticmethod
    def forward(ctx, qkv, bias, scale):
        out, lse = _attention_packed_bias_fwd(qkv, bias, scale)
        ctx.save_for_backward(qkv, bias, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_order("attention_packed")
    def backward(ctx, dout):
        with_dbias = ctx.needs_input_grad[1]
        dqkv, dbias = _attention_packed_bias_bwd(dout, *ctx.saved_tensors, ctx.scale, with_dbias)
        return dqkv, dbias if with_dbias else None, None


class AttentionCausal(Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = _attention_causal_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_order("attention")
    def backward(ctx, dout):
        return *_attention_causal_bwd(dout, *ctx.saved_tensors, ctx.scale), None
