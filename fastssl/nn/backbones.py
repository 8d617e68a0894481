"""Encoders by name: our ResNets, and any classification network of timm or torchvision."""

import difflib
import functools
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.extras import need

from .norm import SplitBatchNorm2d
from .resnet import NAMES, build_resnet

LIBRARIES = ("timm", "torchvision")  # prefixes of names, as in timm:convnext_tiny
NEAR = 3  # number of similar names that an error shows
SIZE_OPTIONS = {"vit_": "image_size", "maxvit": "input_size"}  # torchvision's networks of a fixed input size
OWN_OPTIONS = {name: {"aux_logits": False, "init_weights": True} for name in ("googlenet", "inception_v3")}


def build_backbone(
    name: str,
    dim: int,
    small_images: bool = False,
    bn_splits: int = 1,
    zero_init_residual: bool = False,
    image_size: tuple[int, int] | None = None,
) -> Any:
    """An encoder whose last layer `fc` is linear and has `dim` outputs; a projector may take its place.

    Args:
        name: one of `resnet.NAMES`, or ``timm:NAME`` or ``torchvision:NAME`` for a network of these libraries with
            random weights.
        dim: number of outputs of `fc`.
        small_images: see `build_resnet`; for our ResNets alone.
        bn_splits: see `build_resnet`; plain batch norms of other networks are split too.
        zero_init_residual: see `build_resnet`; other networks start as their library initialises them.
        image_size: (height, width) in pixels. Networks of a fixed input size, such as ViTs, are built for it, and a
            network that does not take it is refused.

    Returns: a module; features are what `fc` is given. Its state dict has the network's own names.

    Raises:
        ValueError: the name is unknown, or an option or the image size does not fit the network.
        MissingExtra: timm is not installed.
    """
    library, colon, network_name = name.partition(":")
    if not colon and name in NAMES:
        return build_resnet(name, dim, small_images, bn_splits, zero_init_residual)
    if library not in LIBRARIES or not colon:
        near = ", ".join(_near(name, NAMES) or NAMES)
        raise ValueError(
            f"backbone: unknown name {name!r}: there are {near}, and timm:NAME or torchvision:NAME for the networks of "
            "these libraries"
        )
    if small_images:
        raise ValueError(f"backbone: small_images is for our ResNets, got {name}, which has the stem of its library")
    create = _from_timm if library == "timm" else _from_torchvision
    network = ForeignNetwork(create(network_name, dim, image_size), name, dim)
    if image_size is not None:
        network.check(image_size)
        network.image_size = image_size
    if bn_splits > 1:
        _split_batch_norms(network, name, bn_splits)
    return network.to(memory_format=torch.channels_last)


class ForeignNetwork(nn.Module):
    """A classification network whose last layer is taken out and is `fc`, behind it.

    State dicts have the network's own names, and `fc`.

    Args:
        network: its last linear layer with `outputs` outputs is replaced by the identity.
        name: library and name, for messages.
        outputs: number of outputs of the last layer.

    Raises:
        ValueError: the network does not end in one linear layer.
    """

    def __init__(self, network: nn.Module, name: str, outputs: int):
        super().__init__()
        last = _last_layer(network, outputs)
        if last is None:
            raise ValueError(f"backbone: {name} does not end in one linear layer, whose place the projector could take")
        fc = network.get_submodule(last)
        parent, _, child = last.rpartition(".")
        setattr(network.get_submodule(parent), child, nn.Identity())
        if taken := [key for key in network.state_dict() if key.startswith("fc.")]:
            raise ValueError(f"backbone: {name} has weights named {taken[0]} that are not those of its last layer")
        self.network, self.fc, self.width = network, fc, fc.in_features
        self.name, self.library = name, name.partition(":")[0]
        self.image_size: tuple[int, int] | None = None
        self.register_state_dict_post_hook(_to_own_names)
        self.register_load_state_dict_pre_hook(_from_own_names)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.network(images))

    def feature_map(self, images: Tensor) -> Tensor:
        """Features of all places [B, C, h, w], before they are pooled; C is the number that `fc` is given.

        Raises:
            ValueError: the network has no such map: it has tokens, or layers between pooling and its last one.
        """
        return self.features_and_map(images)[1]

    def features_and_map(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `fc` is given [B, C], and the map [B, C, h, w] that it was pooled from: see `feature_map`."""
        maps: list[Any] = []
        network: Any = self.network
        features: Any = None
        if self.library == "timm":
            maps.append(network.forward_features(images))
        elif pools := [part for part in self.network.modules() if isinstance(part, nn.AdaptiveAvgPool2d)]:
            with pools[-1].register_forward_pre_hook(lambda _, args: maps.append(args[0])):
                features = network(images)
        if not maps or maps[0].ndim != 4 or maps[0].shape[1] != self.width:
            raise ValueError(f"backbone: {self.name} has no map of {self.width} features before its last layer")
        return network.forward_head(maps[0]) if features is None else features, maps[0]

    @torch.no_grad()
    def check(self, size: tuple[int, int], flag: str = "--image-size") -> None:
        """Computes the features of one image of this (height, width) in pixels, which option `flag` sets.

        Raises:
            ValueError: the network fails, or its features are not what `fc` takes.
        """
        self.network.eval()
        remedy = f"choose another size ({flag}) or network (--backbone)"
        try:
            features = self.network(torch.zeros(1, 3, *size))
        except (RuntimeError, AssertionError, ValueError, IndexError) as error:
            raise ValueError(
                f"backbone: {self.name} takes no images of {size[0]} × {size[1]} pixels ({_first_line(error)}): "
                f"{remedy}"
            ) from error
        finally:
            self.network.train()
        if not isinstance(features, Tensor) or features.shape != (1, self.width):
            got = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise ValueError(
                f"backbone: {self.name} must give {self.width} features of an image of {size[0]} × {size[1]} pixels, "
                f"got {got}: {remedy}"
            )


def _from_timm(name: str, dim: int, size: tuple[int, int] | None) -> nn.Module:
    timm: Any = need("timm", what=f"--backbone timm:{name}", extra="finetune")
    if not timm.is_model(name):
        raise ValueError(f"backbone: timm has no network named {name!r}{_like(name, timm.list_models(), 'timm')}")
    options: dict[str, Any] = {"num_classes": dim, "pretrained": False}
    if size is not None and getattr(timm.get_pretrained_cfg(name), "fixed_input_size", False):
        options["img_size"] = size
    return _create(f"timm:{name}", size, functools.partial(timm.create_model, name, **options))


def _from_torchvision(name: str, dim: int, size: tuple[int, int] | None) -> nn.Module:
    what = f"--backbone torchvision:{name}"
    models: Any = need("torchvision.models", what=what, extra="train", distribution="torchvision")
    names = models.list_models(module=models)
    if name not in names:
        raise ValueError(f"backbone: torchvision has no network named {name!r}{_like(name, names, 'torchvision')}")
    options: dict[str, Any] = {"num_classes": dim, "weights": None, **OWN_OPTIONS.get(name, {})}
    for start, option in SIZE_OPTIONS.items():
        if size is not None and name.startswith(start):
            if option == "image_size" and size[0] != size[1]:
                raise ValueError(
                    f"backbone: torchvision:{name} takes square images, got {size[0]} × {size[1]} pixels: choose "
                    "another size (--image-size), or a network of timm"
                )
            options[option] = size[0] if option == "image_size" else size
    return _create(f"torchvision:{name}", size, functools.partial(models.get_model, name, **options))


def _create(name: str, size: tuple[int, int] | None, create: Any) -> nn.Module:
    """The network that `create` makes."""
    try:
        return create()
    except (AssertionError, ValueError, TypeError) as error:  # the sizes of patches and windows do not fit
        pixels = f" for images of {size[0]} × {size[1]} pixels" if size else ""
        raise ValueError(
            f"backbone: {name} can't be built{pixels} ({_first_line(error)}): choose another size (--image-size) or "
            "network (--backbone)"
        ) from error


def _last_layer(network: nn.Module, outputs: int) -> str | None:
    """Name of the linear layer that a classification network ends in, None if there isn't one."""
    get_classifier: Any = getattr(network, "get_classifier", None)  # timm's
    if get_classifier:  # a tuple in networks with two classifiers
        classifier = get_classifier()
        names = [name for name, part in network.named_modules() if part is classifier]
        return names[0] if names and isinstance(classifier, nn.Linear) else None
    linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
    return linear[-1] if linear and network.get_submodule(linear[-1]).out_features == outputs else None


def _split_batch_norms(module: nn.Module, name: str, splits: int) -> None:
    """Gives the batch norms statistics of parts of the batch, in place."""
    for child_name, child in module.named_children():
        if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats and child.momentum is not None:
            split = SplitBatchNorm2d(child.num_features, splits)
            split.eps, split.momentum = child.eps, child.momentum
            split._parameters, split._buffers = child._parameters, child._buffers
            setattr(module, child_name, split)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"backbone: {name} has batch norms of a kind that can't be split ({type(child).__name__}): use "
                "--bn-splits 1"
            )
        else:
            _split_batch_norms(child, name, splits)


def _to_own_names(module: nn.Module, state: dict, prefix: str, metadata: dict) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}network.")]:
        state[prefix + key.removeprefix(f"{prefix}network.")] = state.pop(key)


def _from_own_names(module: nn.Module, state: dict, prefix: str, *_) -> None:
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(f"{prefix}fc.")]:
        state[f"{prefix}network.{key.removeprefix(prefix)}"] = state.pop(key)


def _near(name: str, names: list[str] | tuple[str, ...]) -> list[str]:
    return difflib.get_close_matches(name, names, n=NEAR)


def _like(name: str, names: list[str], library: str) -> str:
    """The end of a sentence on an unknown name."""
    near = _near(name, names)
    return f": did you mean {' or '.join(near)}?" if near else f" ({library}.list_models() lists them)"


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
