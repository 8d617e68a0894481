"""Copies of modules that share the parameters of the original, with some parts left out."""

from torch import nn


def shared_copy(module: nn.Module, cls: type[nn.Module] | None = None, without: tuple[str, ...] = ()) -> nn.Module:
    """A module that shares every parameter, buffer and child of `module` except those named in `without`.

    Args:
        module: is not changed.
        cls: class of the copy, that of `module` if None.
        without: names of children, parameters and buffers to leave out; a name that ends in "*" is a prefix.
    """

    def is_shared(name: str) -> bool:
        return not any(name.startswith(w[:-1]) if w.endswith("*") else name == w for w in without)

    copy = nn.Module.__new__(cls or type(module))
    copy.__dict__.update(module.__dict__)
    for members in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[members] = {name: x for name, x in module.__dict__[members].items() if is_shared(name)}
    return copy


def save_child_as(module: nn.Module, child: str, name: str) -> None:
    """From now on state dicts of `module` name its child `child` `name`, as a reference checkpoint does."""

    def rename(state: dict, prefix: str, old: str, new: str) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{old}.")]:
            state[f"{prefix}{new}.{key.removeprefix(f'{prefix}{old}.')}"] = state.pop(key)

    module.register_state_dict_post_hook(lambda _, state, prefix, metadata: rename(state, prefix, child, name))
    module.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: rename(state, prefix, name, child))


def save_child_unprefixed(module: nn.Module, child: str) -> None:
    """From now on state dicts of `module` name the parts of its child `child` without the child's name."""

    def strip(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}{child}.")]:
            state[prefix + key.removeprefix(f"{prefix}{child}.")] = state.pop(key)

    def add(module: nn.Module, state: dict, prefix: str, *rest) -> None:
        part = module.get_submodule(child)
        names = {key.partition(".")[0] for key in part.state_dict()}  # a child may give its parts other names
        for key in [key for key in state if key.startswith(prefix)]:
            name = key.removeprefix(prefix)
            if name.partition(".")[0] in names:
                state[f"{prefix}{child}.{name}"] = state.pop(key)

    module.register_state_dict_post_hook(strip)
    module.register_load_state_dict_pre_hook(add)


def save_as_scalar(module: nn.Module, name: str) -> None:
    """From now on state dicts of `module` hold its parameter `name`, of one element, as a scalar. Where FSDP shards it,
    all ranks must call `state_dict()` together."""

    def reshape(state: dict, prefix: str, shape: tuple[int, ...]) -> None:
        if (x := state.get(prefix + name)) is not None:
            state[prefix + name] = (x.full_tensor() if hasattr(x, "full_tensor") else x).reshape(shape)

    module.register_state_dict_post_hook(lambda _, state, prefix, metadata: reshape(state, prefix, ()))
    module.register_load_state_dict_pre_hook(lambda _, state, prefix, *rest: reshape(state, prefix, (1,)))


def headless(module: nn.Module, head: str) -> nn.Module:
    """A copy that shares everything with `module` except the child named `head`, which is replaced by the identity."""
    copy = shared_copy(module, without=(head,))
    setattr(copy, head, nn.Identity())
    return copy
