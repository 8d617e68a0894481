"""Puts the engine's attention into models of timm, torchvision and others, in place."""

import copy
import inspect
import re
from collections.abc import Collection, Iterator

import torch
from torch import Tensor, nn

from .attention import Attention, TorchvisionAttention

TIMM = ("timm.layers.attention", "timm.models.vision_transformer")  # homes of timm's plain `Attention`
PARTS = {"qkv", "attn_drop", "q_norm", "k_norm", "norm", "gate", "proj", "proj_drop"}  # what such a module is made of
HOOKS = (  # where a module keeps them
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
    """Swaps the attention of a vision transformer for ours, in place: same parameters, same results to rounding.

    Known are timm's `Attention`, the self-attention of torchvision's `EncoderBlock`, and any module named `Attention`
    with the parts and names of timm's, as in the official MAE, once a copy of it has given the same results as ours on
    random tokens. What looks like attention and is none of these is refused by name, and nothing is swapped then.
    Optimizers and state dicts are not affected: parameters, their names and order stay. Afterwards the model can be
    compiled and exported, but not scripted or traced, nor differentiated twice.

    Args:
        model: of timm or torchvision, or a module that contains such blocks.
        leave: names of modules inside which nothing is to be swapped, for models with some attention of another kind.

    Returns: names of the modules that were swapped; none where a second call finds ours.

    Raises:
        ValueError: an attention that is not known, or none at all.
    """
    leave = [leave] if isinstance(leave, str) else leave
    for name in set(leave) - set(dict(model.named_modules(remove_duplicate=False))):
        raise ValueError(f"accelerate: leave must name modules of the model, got {name!r}")
    swaps: dict[str, nn.Module] = {}
    made: dict[nn.Module, nn.Module] = {}  # one for each of theirs, wherever it stands
    refused: list[str] = []
    ours = False
    for name, module in _attention_in(model, leave):
        if isinstance(module, Attention | TorchvisionAttention):
            ours = True
            continue
        if not name:
            raise ValueError("accelerate: the model itself is an attention, and can't be swapped inside itself")
        reason = _unlike(module, model.get_submodule(name.rpartition(".")[0]))
        if reason:
            refused.append(f"{name} ({type(module).__module__}.{type(module).__name__}) {reason}")
            continue
        if module not in made:
            made[module] = TorchvisionAttention(module) if _of_torch(module) else Attention.of(module)
        swaps[name] = made[module]
    if refused:
        more = f", and {len(refused) - 1} more" if len(refused) > 1 else ""
        raise ValueError(
            f"accelerate: {refused[0]}{more}; nothing was swapped (accelerate(model, leave=[…]) leaves modules by name)"
        )
    if not swaps and not ours:
        raise ValueError(f"accelerate: found no attention that it knows in {type(model).__name__}; nothing was swapped")
    for name, module in swaps.items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, module)
    return list(swaps)


def _attention_in(model: nn.Module, leave: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of everything that looks like attention, outermost only, shared modules under each name."""
    found: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name == other or name.startswith(f"{other}.") for other in (*leave, *found))
        if not inside and _looks_like_attention(name.rpartition(".")[2], module):
            found.append(name)
            yield name, module


def _looks_like_attention(name: str, module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.Identity | nn.Dropout | nn.Linear):
        return False
    named = name in ("attn", "attention", "self_attn", "self_attention")
    return named or bool(re.search("attn|attention", type(module).__name__, re.IGNORECASE))


def _of_torch(module: nn.Module) -> bool:
    return type(module) is nn.MultiheadAttention


def _unlike(module: nn.Module, parent: nn.Module) -> str | None:
    """Why the module can't be swapped, or None if it can."""
    dropped = getattr(module, "attn_drop", None)
    for part in (module, *([dropped] if isinstance(dropped, nn.Module) else [])):
        if any(vars(part)[hooks] for hooks in HOOKS):
            return "has hooks, which a swap would lose"
    if "forward" in vars(module):
        return "has a forward of its own, put in the place of its class's"
    if _of_torch(module):
        return _unlike_torchvisions(module, parent)
    takes = inspect.signature(module.forward).parameters
    if "rope" in takes:
        return "takes rotary positions, which the kernels do not apply"
    names = {name.split(".")[0] for name, _ in module.named_parameters()} | set(dict(module.named_children()))
    names |= {name.split(".")[0] for name, _ in module.named_buffers()}
    plain = type(module).__name__ == "Attention" and {"qkv", "proj"} <= names <= PARTS
    if not plain or not isinstance(module.qkv, nn.Linear) or not {"num_heads", "scale"} <= set(vars(module)):
        return "is not a kind of attention that fastssl knows"
    if isinstance(dropped, nn.Dropout) and dropped.p:
        return f"drops attention weights (attn_drop={dropped.p}), which the kernels do not"
    if not isinstance(dropped, nn.Dropout | nn.Identity | None):
        return f"does something to its attention weights (attn_drop is a {type(dropped).__name__})"
    trusted = type(module).__module__ in TIMM and type(module).forward.__module__ in TIMM
    return None if trusted else _differs(module)


def _unlike_torchvisions(module: nn.MultiheadAttention, parent: nn.Module) -> str | None:
    if type(parent).__module__ != "torchvision.models.vision_transformer":
        return "is called in a way that fastssl does not know: only torchvision's EncoderBlock is known"
    if module.dropout:
        return f"drops attention weights (dropout={module.dropout}), which the kernels do not"
    plain = module.batch_first and module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
    return None if plain else "is not plain self-attention with the batch first"


@torch.no_grad()
def _differs(module: nn.Module) -> str | None:
    """Compares a module whose code is not known with ours, both with random weights of float64 and on random tokens.

    Short and long, since a window would not show in a few tokens; in training too, where nothing may be dropped but by
    `proj_drop`; and with weights of its own, since fresh ones are often zero.
    """
    if module.qkv.weight.is_meta:
        return "is not timm's, and on the meta device its results can't be compared with ours"
    generator = torch.Generator().manual_seed(0)

    def normal(like: Tensor, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device)

    try:
        theirs = copy.deepcopy(module).double()
        for parameter in theirs.parameters():
            parameter.copy_(normal(parameter, *parameter.shape) * parameter.shape[-1] ** -0.5)
        if isinstance(getattr(theirs, "proj_drop", None), nn.Dropout):
            theirs.proj_drop.p = 0.0
        ours, device = Attention.of(theirs), module.qkv.weight.device
        for training, length in ((False, 5), (False, 300), (True, 60)):
            tokens = normal(module.qkv.weight, 2, length, module.qkv.in_features)
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = theirs.train(training)(tokens)
            wanted = ours.train(training)(tokens)
            same = isinstance(found, Tensor) and found.shape == wanted.shape
            if not same or not (found - wanted).abs().max() <= 1e-9 * wanted.abs().max():
                return "gives other results than multi-head attention"
    except Exception as error:  # code of others may fail in any way
        return f"could not be tried on tokens [B, L, D] ({type(error).__name__}: {error})"
    return None
