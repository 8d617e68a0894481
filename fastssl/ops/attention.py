"""Softmax attention on [B, L, H, E], which may be strided views of one packed qkv tensor, with or without a bias."""

import functools
import importlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import check
from .attention_bias import (
    AttentionBias,
    AttentionCausal,
    AttentionPackedBias,
    check_bias,
    plain_backward,
    plain_forward,
)
from .dispatch import Function, acc_dtype, autocast_dtype, fake, first_order, has_kernel, op, register_triton


def _kernels():
    """The Triton kernels, imported at the first call on a GPU."""
    from fastssl.kernels import attention

    return attention


LONGEST = 512  # largest number of tokens for which our kernels run
LONGEST_BIASED, LONGEST_CAUSAL = 1024, 2304  # the same on CPUs, where torch's kernels with a mask are slower
# On processors with AMX, torch's fused CPU kernel for 16-bit tensors packs its operands with an AVX-512 function. Where
# ATEN_CPU_CAPABILITY limits torch to a lower level, it raises "pack_vnni2 is only supported when avx512 is supported":
# there torch's unfused formula runs instead.
FUSED_16_BIT = "AVX512" in torch.backends.cpu.get_cpu_capability() or not torch.cpu._is_amx_tile_supported()
CUDNN_FIRST = [  # torch takes the first that supports a call
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
WIDEST = {2: 128, 4: 64, 8: 64}  # {bytes of an element: widest head of the GPU kernels}; the C++ kernel takes any


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, bias: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Softmax attention of every query over the keys, without dropout.

    Equals ``F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias, is_causal=causal,
    scale=scale).transpose(1, 2)``, computed by our kernels for up to 512 tokens, on CPUs for up to
    1,024 with a bias and 2,304 of causal attention, which on GPUs is torch's.
    Longer sequences, and heads too wide for a GPU kernel (over 128, over 64 in float32 and float64), go to xformers
    where it is installed and supports the call, else to torch. cuDNN's forward pass runs in place of our kernel where
    it was measured to be faster and there is no gradient (`cudnn_is_faster`). `backend` returns which one runs.
    The kernels take all four dtypes and any strides, and give the same bits every time, on any number of threads.
    Where ATEN_CPU_CAPABILITY keeps torch below AVX-512 on a processor with AMX, torch's fused kernel for 16-bit tensors
    raises, and its unfused formula (with all scores in memory) runs in its place.

    Args:
        q, k, v: [B, L, H, E] of one floating dtype and any strides: views ``qkv.unbind(2)`` of a packed
            [B, L, 3, H, E] need no copy. Keys and values may have another length than the queries, at least 1.
            Gradient to all three. Under autocast they are first converted to its dtype, as by torch, except float64.
        scale: factor of the scores, E^-0.5 if None.
        bias: [H, L, M], or [B, H, L, M] for M keys, of any floating dtype and strides, is added to the scaled scores:
            relative positions, or a mask of zeros and −∞. Gradient, for [H, L, M] summed over the batch. Autocast
            leaves its dtype. A query whose biases are all −∞ gives NaN (0 where torch computes it).
            One whose biases are all the lowest number of float32 (float64 for float64) gives the mean of the values.
            Its gradient, and any of a query whose biases all lie below about −10⁶, is wrong on GPUs, whose kernels
            compute the weights again from a log-sum-exp that has no digits left for them: leave such queries out of the
            loss.
        causal: True lets query i see the keys 0 to i only; L must be M then, and bias None.

    Returns: [B, L, H, E] contiguous, in that dtype. Scores and softmax in float32 (float64 for float64).

    Raises:
        ValueError: a shape or device does not fit, scale is not in −1e30 … 1e30, or causal is given with a bias.
            TypeError: dtypes differ or are not floating.

    Memory: the C++ kernel holds the scores of 96 queries of one head at a time, for each thread, forward and backward;
        a GPU kernel holds no scores in global memory. Both keep one number a query for the gradient. No kernel holds a
        [B, H, L, M] tensor for a bias [H, L, M]; torch, for longer sequences, does.

    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1; Dosovitskiy et al., 2021 (ViT).
    """
    _check(q, k, v, scale)
    width = q.shape[3]
    if dtype := autocast_dtype(q):
        q, k, v = (x.to(dtype) for x in (q, k, v))
    if not q.dtype == k.dtype == v.dtype:
        check.fail("attention", f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}", TypeError)
    if k.shape[1] == 0 or width == 0:
        check.fail("attention", f"k must have at least one token and E at least 1, got {list(k.shape)}")
    scale = width**-0.5 if scale is None else scale
    if bias is not None or causal:
        check_bias("attention", q, k, bias, causal)
    name = backend(q, k, v, bias, causal)
    if name == "kernel":
        if causal:
            return AttentionCausal.apply(q, k, v, scale)
        if bias is None:
            return _Attention.apply(q, k, v, scale)
        return AttentionBias.apply(q, k, v, bias, scale)
    if name == "xformers":
        return _fmha().memory_efficient_attention(q, k, v, scale=scale).contiguous()
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None if bias is None else bias.to(q.dtype).expand(q.shape[0], -1, -1, -1)
    call = functools.partial(F.scaled_dot_product_attention, q, k, v, bias, is_causal=causal, scale=scale)
    if name == "cudnn":
        with sdpa_kernel(CUDNN_FIRST, set_priority=True):
            out = call()
    elif q.device.type == "cpu" and q.element_size() == 2 and not FUSED_16_BIT:
        with sdpa_kernel(SDPBackend.MATH):
            out = call()
    else:
        out = call()
    return out.transpose(1, 2).contiguous()


@check.once_a_signature
def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    check.tensor("attention", "q", q, "B L H E")
    batch, _, heads, width = q.shape
    check.tensor("attention", "k", k, "B L H E", B=batch, H=heads, E=width)
    check.tensor("attention", "v", v, "B L H E", B=batch, L=k.shape[1], H=heads, E=width)
    check.floating("attention", q=q, k=k, v=v)
    check.same_device("attention", q=q, k=k, v=v)
    if scale is not None:
        _check_scale("attention", scale)


def _check_scale(op_name: str, scale: float) -> None:
    check.number(op_name, scale=scale)
    if not abs(scale) <= 1e30:
        check.fail(op_name, f"scale must be between -1e30 and 1e30, got {scale}")


def attention_packed(qkv: Tensor, scale: float | None = None, bias: Tensor | None = None) -> Tensor:
    """`attention` of the queries, keys and values in one tensor, whose gradient is one tensor too.

    Equals ``attention(*qkv.unbind(2), scale, bias)``, with the same choice of backend. There autograd stacks the
    gradients of q, k and v into that of qkv; here the kernels on CPUs and GPUs write them into it.

    Args:
        qkv: [B, L, 3, H, E] of any floating dtype and strides, L at least 1. Gradient. Under autocast it is first
            converted to its dtype, except float64.
        scale: factor of the scores, E^-0.5 if None.
        bias: [H, L, L] or [B, H, L, L], added to the scaled scores, as by `attention`. Gradient.

    Returns: [B, L, H, E] contiguous, in that dtype.

    Raises:
        ValueError: a shape does not fit. TypeError: a dtype is not floating.

    Memory and source: as `attention`.
    """
    _check_packed(qkv, scale)
    qkv = qkv.to(autocast_dtype(qkv) or qkv.dtype)
    scale = qkv.shape[4] ** -0.5 if scale is None else scale
    q, k, v = qkv.unbind(2)
    if bias is not None:
        check_bias("attention_packed", q, k, bias, False)
    if backend(q, k, v, bias) == "kernel":
        if bias is None:
            return _AttentionPacked.apply(qkv, scale)
        return AttentionPackedBias.apply(qkv, bias, scale)
    return attention(q, k, v, scale, bias)


@check.once_a_signature
def _check_packed(qkv: Tensor, scale: float | None) -> None:
    check.tensor("attention_packed", "qkv", qkv, "B L 3 H E", **{"3": 3})
    check.floating("attention_packed", qkv=qkv)
    if scale is not None:
        _check_scale("attention_packed", scale)
    if qkv.shape[1] == 0 or qkv.shape[4] == 0:
        check.fail("attention_packed", f"qkv must have at least one token and E at least 1, got {list(qkv.shape)}")


def backend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, causal: bool = False) -> str:
    """The implementation that `attention` uses for these tensors: "kernel", "cudnn", "xformers" or "torch"."""
    kernel = "attention_causal_fwd" if causal else "attention_fwd" if bias is None else "attention_bias_fwd"
    plain = bias is None and not causal
    if q.is_cuda and plain and has_kernel(kernel, "cuda"):
        with_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        if not with_grad and cudnn_is_faster(q, k) and _capability(q.device.index or 0) == (9, 0):
            return "cudnn"
    fits = q.device.type == "cpu" or q.shape[3] <= WIDEST[q.element_size()]
    longest = LONGEST if plain or q.is_cuda else LONGEST_CAUSAL if causal else LONGEST_BIASED
    if has_kernel(kernel, q.device.type) and max(q.shape[1], k.shape[1]) <= longest and fits:
        return "kernel"
    if q.is_cuda and plain and not torch.compiler.is_compiling() and _fmha() is not None:
        call = _fmha().Inputs(query=q, key=k, value=v)
        directions = (_fmha().ALL_FW_OPS, _fmha().ALL_BW_OPS if torch.is_grad_enabled() else _fmha().ALL_FW_OPS)
        if all(any(operator.supports(call) for operator in operators) for operators in directions):
            return "xformers"
    return "torch"


def cudnn_is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether cuDNN's forward pass is faster than our kernel on a GPU of compute capability 9.0.

    Measured on an H200 in bf16, µs, cuDNN beside ours (docs/measurements.md): 171 beside 219 with 197 tokens and
    heads of 64, but 57 beside 38 with 50 tokens, and 222 beside 210 with heads of 32. With the backward pass, which
    joins three gradients, ours is as fast in the first case and faster in the others.
    """
    long = min(q.shape[1], k.shape[1]) >= 128
    return q.dtype.itemsize == 2 and q.shape[3] == 64 and long


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    """Compute capability of a GPU; (0, 0) for a build of torch for AMD's GPUs."""
    return (0, 0) if torch.version.hip else torch.cuda.get_device_capability(index)


@functools.cache
def _fmha() -> Any:
    """xformers' attention, or None where it is not installed; an installation that fails to import raises."""
    return importlib.import_module("xformers.ops.fmha") if importlib.util.find_spec("xformers") else None


@op("attention_fwd")
def _attention_fwd(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out [B, L, H, E], lse [B, H, L] of the scaled scores, float32 or wider)."""
    return plain_forward(q, k, v, None, scale)


@fake(_attention_fwd)
def _(q, k, v, scale):
    batch, length, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(batch, heads, length, dtype=acc_dtype(q))


register_triton(_attention_fwd, lambda: _kernels().attention_fwd)


@op("attention_bwd")
def _attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in q's dtype; the softmax is recomputed from q and k, on GPUs also from lse."""
    dq, dk, dv, _ = plain_backward(dout, q, k, v, None, out, lse, scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@fake(_attention_bwd)
def _(dout, q, k, v, out, lse, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


register_triton(_attention_bwd, lambda: _kernels().attention_bwd)


@op("attention_packed_fwd")
def _attention_packed_fwd(qkv: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_attention_fwd` of qkv [B, L, 3, H, E]."""
    q, k, v = qkv.unbind(2)
    return plain_forward(q, k, v, None, scale)


@fake(_attention_packed_fwd)
def _(qkv, scale):
    batch, length, _, heads, width = qkv.shape
    return qkv.new_empty(batch, length, heads, width), qkv.new_empty(batch, heads, length, dtype=acc_dtype(qkv))


register_triton(_attention_packed_fwd, lambda: _kernels().attention_packed_fwd)


@op("attention_packed_bwd")
def _attention_packed_bwd(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The gradient of qkv, [B, L, 3, H, E] contiguous."""
    q, k, v = qkv.unbind(2)
    return torch.stack(plain_backward(dout, q, k, v, None, out, lse, scale)[:3], 2)


@fake(_attention_packed_bwd)
def _(dout, qkv, out, lse, scale):
    return qkv.new_empty(qkv.shape)


register_triton(_attention_packed_bwd, lambda: _kernels().attention_packed_bwd)


class _Attention(Function):
    @staticmethod
    def forward(ctx, q, k, v, scale):
        out, lse = _attention_fwd(q, k, v, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_order("attention")
    def backward(ctx, dout):
        return *_attention_bwd(dout, *ctx.saved_tensors, ctx.scale), None


class _AttentionPacked(Function):
    @staticmethod
    def forward(ctx, qkv, scale):
        out, lse = _attention_packed_fwd(qkv, scale)
        ctx.save_for_backward(qkv, out, lse)
        ctx.scale = scale
        return out

    @staticmethod
    @first_order("attention_packed")
    def backward(ctx, dout):
        return _attention_packed_bwd(dout, *ctx.saved_tensors, ctx.scale), None
