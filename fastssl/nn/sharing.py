"""Modules that share the parameters of another one, without some of its parts."""

from torch import nn


def shared_copy(module: nn.Module, cls: type[nn.Module] | None = None, without: tuple[str, ...] = ()) -> nn.Module:
    """A module that shares every parameter, buffer and child of `module` but those named in `without`.

    Args:
        module: left as it is.
        cls: class of the copy, that of `module` if None.
        without: names of children, parameters and buffers to leave out; a name that ends in "*" is a prefix.
    """

    def kept(name: str) -> bool:
        return not any(name.startswith(w[:-1]) if w.endswith("*") else name == w for w in without)

    copy = nn.Module.__new__(cls or type(module))
    copy.__dict__.update(module.__dict__)
    for members in ("_modules", "_parameters", "_buffers"):
        copy.__dict__[members] = {name: x for name, x in module.__dict__[members].items() if kept(name)}
    return copy


def headless(module: nn.Module, head: str) -> nn.Module:
    """A module that shares everything of `module`, with the child named `head` replaced by the identity."""
    copy = shared_copy(module, without=(head,))
    setattr(copy, head, nn.Identity())
    return copy
