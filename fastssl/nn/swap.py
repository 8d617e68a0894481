"""Replacement of the attention in models of timm, torchvision and others by the engine's, in place."""

import copy
import inspect
import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Attention, TorchvisionAttention
from .biased_attention import BiasedAttention

TIMM_MODULES = ("timm.layers.attention", "timm.models.vision_transformer")  # where timm defines its plain `Attention`
NAMES = ("Attention", "MemEffAttention")  # of classes like timm's: those of the official MAE and DINOv2
ARGUMENTS = {"attn_mask", "is_causal", "attn_bias"}  # of `Attention.forward`, beside the tokens
TIMM_PARTS = {"qkv", "attn_drop", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"}  # its submodules
BIASED_NAMES = ("Attention", "RelPosAttention", "WindowAttention")  # of timm's classes with an additive bias
BIAS_ARGUMENTS = {"shared_rel_pos_bias", "shared_rel_pos", "mask"}  # of `BiasedAttention.forward`
BIAS_PARTS = {"q_bias", "k_bias", "v_bias", "relative_position_bias_table", "relative_position_index", "rel_pos"}
OPEN_CLIP_BLOCKS = {("open_clip.transformer", "ResidualAttentionBlock")}
POOLING = ("AttentionPoolLatent",)  # timm's class whose few queries are no tokens: it stays as it is
HOOKS = (  # attributes in which a module keeps its hooks
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def accelerate(model: nn.Module, leave: Collection[str] = ()) -> list[str]:
    """Replaces the attention of a vision transformer by the engine's, in place: same parameters, same results to
    rounding.

    Supported are timm's `Attention`, the self-attention of torchvision's `EncoderBlock` and of open_clip's
    `ResidualAttentionBlock`, and any module named `Attention` or `MemEffAttention` with the parts and names of timm's,
    as in the official MAE and DINOv2, or one with an additive bias with those of timm's BEiT, Swin or relative-position
    ViT, if a copy of it gives the same results as the engine's on random tokens. Any other attention is refused by
    name, and nothing is
    replaced then. Optimizers and state dicts are not affected: parameters, their names and order stay. Afterwards the
    model can be compiled and exported, but not scripted or traced, nor differentiated twice. Batches with a mask, such
    as padded ones of timm's NaFlexViT, are computed by torch, as before; so is the causal mask of open_clip's texts on
    GPUs. SigLIP's pooling by one query (timm's `AttentionPoolLatent`) stays as it is.

    Args:
        model: a model of timm or torchvision, or a module that contains such blocks.
        leave: names of modules inside which nothing is replaced, for models that also have another kind of attention.

    Returns: names of the modules that were replaced; none if all were replaced before.

    Raises:
        ValueError: an attention is not supported, or the model has none at all.
    """
    leave = [leave] if isinstance(leave, str) else leave
    for name in set(leave) - set(dict(model.named_modules(remove_duplicate=False))):
        raise ValueError(f"accelerate: leave must name modules of the model, got {name!r}")
    swaps: dict[str, nn.Module] = {}
    replacements: dict[nn.Module, nn.Module] = {}  # one for each module, which may have several names
    refusals: list[str] = []
    has_engine_attention = False
    for name, module in _find_attention(model, leave):
        if isinstance(module, Attention | BiasedAttention | TorchvisionAttention):
            has_engine_attention = True
            continue
        if not name:
            raise ValueError("accelerate: the model itself is an attention, and can't be swapped inside itself")
        reason = _refusal(module, model.get_submodule(name.rpartition(".")[0]))
        if reason:
            refusals.append(f"{name} ({type(module).__module__}.{type(module).__name__}) {reason}")
            continue
        if module not in replacements:
            if isinstance(module, nn.MultiheadAttention):
                replacements[module] = TorchvisionAttention(module)
            else:
                replacements[module] = _engine_class(module).from_module(module)
        swaps[name] = replacements[module]
    if refusals:
        more = f", and {len(refusals) - 1} more" if len(refusals) > 1 else ""
        remedy = "(accelerate(model, leave=[…]) leaves modules by name)"
        raise ValueError(f"accelerate: {refusals[0]}{more}; nothing was swapped {remedy}")
    if not swaps and not has_engine_attention:
        raise ValueError(
            f"accelerate: {type(model).__name__} has no attention of a supported kind; nothing was swapped"
        )
    for name, module in swaps.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, module)
    return list(swaps)


def _find_attention(model: nn.Module, leave: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of the outermost modules that look like attention; a shared module is given under each name."""
    names: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name == outer or name.startswith(f"{outer}.") for outer in (*leave, *names))
        if not inside and _is_attention(name.rpartition(".")[2], module):
            names.append(name)
            yield name, module


def _is_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.Identity | nn.Dropout | nn.Linear):
        return False
    cls = type(module)
    if cls.__name__ in POOLING or (cls.__module__, cls.__name__) in OPEN_CLIP_BLOCKS:
        return False
    has_attention_name = name in ("attn", "attention", "self_attn", "self_attention")
    return has_attention_name or bool(re.search("attn|attention", type(module).__name__, re.IGNORECASE))


def _refusal(module: nn.Module, parent: nn.Module) -> str | None:
    """Why the module can't be replaced, or None if it can."""
    dropout = getattr(module, "attn_drop", None)
    for part in (module, *([dropout] if isinstance(dropout, nn.Module) else [])):
        if any(vars(part)[hooks] for hooks in HOOKS):
            return "has hooks, which a swap would lose"
    if "forward" in vars(module):
        return "has a forward method that replaces that of its class"
    if type(module) is nn.MultiheadAttention:
        return _torchvision_refusal(module, parent)
    parameters = inspect.signature(module.forward).parameters
    if "rope" in parameters:
        return "takes rotary positions, which the kernels do not apply"
    parts = {name.split(".")[0] for name, _ in module.named_parameters()} | set(dict(module.named_children()))
    parts |= {name.split(".")[0] for name, _ in module.named_buffers()}
    biased = _engine_class(module) is BiasedAttention
    names, known = (BIASED_NAMES, TIMM_PARTS | BIAS_PARTS | {"softmax"}) if biased else (NAMES, TIMM_PARTS)
    plain = type(module).__name__ in names and {"qkv", "proj"} <= parts <= known
    if not plain or not isinstance(module.qkv, nn.Linear) or not {"num_heads", "scale"} <= set(vars(module)):
        return "is not a supported kind of attention"
    rate = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if isinstance(rate, int | float) and rate:
        return f"drops attention weights (attn_drop={rate}), which the kernels do not"
    if not isinstance(rate, int | float | nn.Identity | None):
        return f"changes its attention weights (attn_drop is a {type(dropout).__name__})"
    arguments = BIAS_ARGUMENTS if biased else ARGUMENTS
    unknown = [name for name, p in list(parameters.items())[1:] if name not in arguments and p.kind != p.VAR_KEYWORD]
    if unknown:
        return f"takes the argument {unknown[0]}, which the engine's attention does not"
    plain_timm = type(module).__module__ in TIMM_MODULES and type(module).forward.__module__ in TIMM_MODULES
    return None if plain_timm else _difference(module, module.qkv, arguments & set(parameters))


def _engine_class(module: nn.Module) -> type[Attention] | type[BiasedAttention]:
    """What replaces a module: `BiasedAttention` where it has parts of a bias, or takes one."""
    arguments = inspect.signature(module.forward).parameters
    has_bias = any(getattr(module, part, None) is not None for part in BIAS_PARTS)
    return BiasedAttention if has_bias or BIAS_ARGUMENTS & set(arguments) else Attention


def _torchvision_refusal(module: nn.MultiheadAttention, parent: nn.Module) -> str | None:
    kind = type(parent).__module__, type(parent).__name__
    crosses = hasattr(parent, "ln_1_kv")  # of CoCa's decoder
    if kind[0] != "torchvision.models.vision_transformer" and (kind not in OPEN_CLIP_BLOCKS or crosses):
        return (
            "is called in an unsupported way: torchvision's EncoderBlock and open_clip's ResidualAttentionBlock are "
            "supported"
        )
    if module.dropout:
        return f"drops attention weights (dropout={module.dropout}), which the kernels do not"
    plain = module.batch_first and module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    return None if plain else "is not plain self-attention with the batch first"


@torch.no_grad()
def _difference(module: nn.Module, qkv: nn.Linear, arguments: set[str]) -> str | None:
    """Compares a module of unknown code with `Attention`, with random weights and tokens; None if equal.

    It compares few tokens and many, because few would not reveal windowed attention; evaluation and training mode, in
    which nothing but `proj_drop` may be random; a mask and causal attention, if the module takes them; and random
    weights, because initial ones are often zero. In float64, or in float32 if the module has no kernel for that.
    """
    if qkv.weight.is_meta:
        return "is not timm's, and on the meta device its results can't be compared"
    try:
        return _trial(module, qkv, arguments, torch.float64, 1e-9)
    except NotImplementedError:  # as xformers raises it for dtypes that it lacks
        pass
    except Exception as error:  # unknown code may fail in any way
        return f"could not be tried on tokens [B, L, D] ({type(error).__name__}: {error})"
    try:
        return _trial(module, qkv, arguments, torch.float32, 2e-5)
    except Exception as error:
        return f"could not be tried on tokens [B, L, D] ({type(error).__name__}: {str(error).splitlines()[0]})"


def _trial(module: nn.Module, qkv: nn.Linear, arguments: set[str], dtype: torch.dtype, bound: float) -> str | None:
    """`_difference` in one dtype; results may differ by `bound` times their largest element."""
    generator, device = torch.Generator().manual_seed(0), qkv.weight.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    reference: Any = copy.deepcopy(module).to(dtype)
    for parameter in reference.parameters():
        parameter.copy_(normal(*parameter.shape) * parameter.shape[-1] ** -0.5)
    if isinstance(getattr(reference, "proj_drop", None), nn.Dropout):
        reference.proj_drop.p = 0.0
    attention = _engine_class(module).from_module(reference)
    calls: list[tuple[bool, int, dict[str, Any]]] = [(False, 5, {}), (False, 300, {}), (True, 60, {})]
    if isinstance(attention, BiasedAttention):
        if (own := attention.position_bias()) is not None:  # for one number of tokens
            calls = [(False, own.shape[2], {}), (True, own.shape[2], {})]
        length = calls[0][1]
        for name in arguments:
            shape = (2, length, length) if name == "mask" else (1, reference.num_heads, length, length)
            calls.append((False, length, {name: normal(*shape)}))
    if "attn_mask" in arguments:
        mask = (normal(2, 1, 9, 9) > 0) | torch.eye(9, dtype=torch.bool, device=device)
        calls.append((False, 9, {"attn_mask": mask}))
    if "is_causal" in arguments:
        calls.append((False, 9, {"is_causal": True}))
    for training, length, options in calls:
        tokens = normal(2, length, qkv.in_features)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            expected = reference.train(training)(tokens, **options)
        out = attention.train(training)(tokens, **options)
        comparable = isinstance(expected, Tensor) and expected.shape == out.shape
        if not comparable or not (out - expected).abs().max() <= bound * out.abs().max():
            return "gives other results than multi-head attention" + "".join(f" with {name}" for name in options)
    return None
