"""End-to-end fine-tuning of an encoder with timm's model, augmentations and losses, on the engine's attention."""

import contextlib
import functools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD
from fastssl.data.decoding import open_image
from fastssl.data.samples import fill_in_rows
from fastssl.data.source import BadImage, Source
from fastssl.data.workers import Workers
from fastssl.extras import need
from fastssl.nn import accelerate
from fastssl.nn.backbones import ForeignNetwork, build_backbone
from fastssl.nn.beit import TABLE, Beit
from fastssl.nn.block import Block, SwiGLU, gelu_tanh, quick_gelu
from fastssl.nn.linear import Linear
from fastssl.nn.vit import ConvStem, ViT
from fastssl.train.schedule import learning_rate

from .features import extract
from .labels import Accuracy, accuracy
from .progress import Progress
from .protocols import Finetune


def need_timm(what: str = "eval finetune") -> None:
    """Checks that timm is installed, which `what` needs.

    Raises:
        MissingExtra: timm is not installed.
    """
    need("timm", what=what, extra="finetune")


def build_classifier(
    method: nn.Module, backbone: str, classes: int, drop_path: float = 0.0, small_images: bool = False
) -> nn.Module:
    """The method's encoder with a new classifier: timm's VisionTransformer with our attention, our ResNet, or the
    network of timm or torchvision that the method was trained with.

    The ViT's classifier `head` takes the mean of the patch tokens, normalised by a new layer `fc_norm`, as in MAE's and
    BEiT's code; its initial weights are normal(0, 2e-5). The encoder's own last norm, pooling and head are left out. A
    `Beit` becomes timm's; where its blocks share a table of relative positions, each gets a copy. The classifier of the
    others is `fc`.

    Args:
        method: a method whose `encoder` is a `ViT`, a ResNet in torchvision's names, or a `ForeignNetwork`.
        backbone: name of the network; the sizes of a ViT are those of the encoder.
        classes: number of classes.
        drop_path: largest probability of skipping a block of a ViT.
        small_images: whether the ResNet was pretrained with the stem for small images.

    Raises:
        ValueError: the encoder is neither a ViT nor the network of that name.
    """
    encoder = method.encoder
    state = encoder.timm_state() if isinstance(encoder, ViT) else encoder.state_dict()
    if isinstance(encoder, ViT):
        build, new = _beit if isinstance(encoder, Beit) else _vit, {"head.weight", "head.bias"}
        model, new = build(encoder, classes, drop_path), new | {"fc_norm.weight", "fc_norm.bias"}
        if (table := state.pop(f"rel_pos_bias.{TABLE}", None)) is not None:
            state |= {f"blocks.{i}.attn.{TABLE}": table for i in range(len(encoder.blocks))}
        left_out = ("norm.", "fc_norm.", "head.", "attn_pool.")
        state = {name: x for name, x in state.items() if not name.startswith(left_out)}
    elif backbone.startswith("resnet") or isinstance(encoder, ForeignNetwork):
        model = build_backbone(backbone, classes, small_images, image_size=getattr(encoder, "image_size", None))
        new = {f"fc.{name}" for name in model.fc.state_dict()}
    else:
        raise ValueError(
            f"eval: finetune is for ViTs, ResNets and networks of timm and torchvision, and the encoder of "
            f"{type(method).__name__} is a {type(encoder).__name__}: train run.encoder() in a loop of yours"
        )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if set(missing) != new or unexpected:
        wrong = sorted({*missing, *unexpected} - new)[0]
        raise ValueError(
            f"eval: finetune builds the backbone alone, and the encoder of {type(method).__name__} does not fit "
            f"{type(model).__name__}: {wrong}; train run.encoder() in a loop of yours"
        )
    return model


def _vit(vit: ViT, classes: int, drop_path: float) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    width = vit.embed_dim
    model = VisionTransformer(
        img_size=vit.img_size,
        patch_size=vit.patch_size,
        in_chans=vit.in_chans,
        num_classes=classes,
        global_pool="avg",
        embed_dim=width,
        depth=len(vit.blocks),
        class_token=vit.cls_token is not None,
        reg_tokens=0 if vit.reg_token is None else vit.reg_token.shape[1],
        no_embed_class=vit.num_prefix_tokens > 0 and (vit.pos_prefix == 0 or vit.no_embed_reg),
        pos_embed="none" if vit.pos_embed is None else "learn",
        pre_norm=vit.norm_pre is not None,
        dynamic_img_size=vit.dynamic_img_size,
        drop_path_rate=drop_path,
        **_block_options(vit.blocks[0], width),
    )
    if isinstance(vit.patch_embed, ConvStem):
        model.patch_embed = ConvStem(vit.in_chans, width)
    nn.init.trunc_normal_(model.head.weight, std=2e-5)
    nn.init.zeros_(model.head.bias)
    _accelerate(model)
    return model


def _beit(vit: Beit, classes: int, drop_path: float) -> nn.Module:
    """timm's `Beit` with a table of relative positions for each block, if `vit` has any."""
    from timm.models.beit import Beit as TimmBeit

    block = vit.blocks[0]
    model = TimmBeit(
        img_size=vit.img_size,
        patch_size=vit.patch_size,
        in_chans=vit.in_chans,
        num_classes=classes,
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        num_heads=block.attn.num_heads,
        mlp_ratio=block.mlp.fc1.out_features / vit.embed_dim,
        drop_path_rate=drop_path,
        norm_layer=functools.partial(nn.LayerNorm, eps=block.norm1.eps),
        init_values=None if block.gamma_1 is None else 1.0,  # LayerScale, whose factors come from the state dict
        use_abs_pos_emb=vit.pos_embed is not None,
        use_rel_pos_bias=vit.rel_pos_bias is not None or block.attn.has_table,
        head_init_scale=0.001,
    )
    _accelerate(model)
    return model


def _accelerate(model: nn.Module) -> None:
    """Replaces attention and linear layers by the engine's, in place, with the same parameters: `F.linear` is slow on
    some CPUs."""
    accelerate(model)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                swapped = Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
                swapped.weight, swapped.bias = layer.weight, layer.bias
                setattr(parent, name, swapped)


def _block_options(block: Block, width: int) -> dict[str, Any]:
    """Arguments of timm's VisionTransformer for blocks like this one."""
    from timm.layers import GELUTanh, Mlp, QuickGELU, SwiGLUPacked

    layers = {gelu_tanh: GELUTanh, quick_gelu: QuickGELU}  # of the activations of `block.Mlp` that are not exact GELU
    activation = nn.SiLU if isinstance(block.mlp, SwiGLU) else layers.get(block.mlp.activation, nn.GELU)
    return {
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / width,
        "mlp_layer": SwiGLUPacked if isinstance(block.mlp, SwiGLU) else Mlp,
        "act_layer": activation,
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "init_values": None if block.ls1 is None else 1.0,  # LayerScale, whose factors come from the state dict
        "norm_layer": functools.partial(nn.LayerNorm, eps=block.norm1.eps),
    }


def parameter_groups(model: nn.Module, config: Finetune) -> list[dict]:
    """Parameter groups with `weight_decay` and `lr_scale`.

    The scale is layer_decay^(depth + 1 − i) for block i = 1 … depth of a ViT, i = 0 for class token, positions and
    patch embedding, and i = depth + 1 for what follows the blocks; times `head_lr` for the classifier. Tables of
    relative positions are decayed, as in BEiT's code and not in timm's.

    Source: Clark et al., 2020 (ELECTRA); Bao et al., 2021 (BEiT), whose code MAE uses; computed here by timm.
    """
    head = model.head if hasattr(model, "head") else model.fc
    head_ids = set(map(id, head.parameters()))
    if hasattr(model, "head"):
        from timm.optim import param_groups_layer_decay

        kept = {name for name in model.no_weight_decay() if not name.endswith(TABLE)}
        groups = param_groups_layer_decay(model, config.weight_decay, kept, layer_decay=config.layer_decay)
    else:
        decayed = [p for p in model.parameters() if p.ndim > 1]
        vectors = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay, "lr_scale": 1.0},
            {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
        ]
    split = []
    for group in groups:
        for inside, scale in ((False, 1.0), (True, config.head_lr)):
            params = [p for p in group["params"] if (id(p) in head_ids) == inside]
            split += [{**group, "params": params, "lr_scale": group["lr_scale"] * scale}] if params else []
    return split


def finetune(
    model: nn.Module, train: Source, test: Source, config: Finetune, size: tuple[int, int], seed: int = 0, **loading
) -> Accuracy:
    """Trains all of `model`, in place, and returns its accuracy on `test` after the last epoch.

    Images that cannot be decoded are replaced by others of their batch, and their number is printed.

    Args:
        model: a model of `build_classifier`.
        train, test: sources with labels; images of classes that only `test` has count as errors.
        config: optimizer, schedule and augmentation.
        size: (height, width) in pixels.
        seed: random seed of order, augmentation and drop path; global generators are left unchanged.
        loading: `mean`, `std`, `device`, `workers` and `engine`, as for `evaluation_loader`.

    Raises:
        MissingExtra: timm is not installed.
        ValueError: the batch is larger than the data, or odd with mixup, or none of the images can be decoded.
    """
    need_timm()
    batch, micro = config.batch_size, config.batch_size // config.accumulate
    if batch > len(train):
        raise ValueError(f"eval: --batch-size must be at most the {len(train)} labelled images, got {batch}")
    if (config.mixup or config.cutmix) and micro % 2:
        raise ValueError(f"eval: mixup and cutmix take pairs: --batch-size over --accumulate must be even, got {micro}")
    colours = {name: loading[name] for name in ("mean", "std") if name in loading}
    device, pictures = torch.device(loading.get("device", "cpu")), Pictures(train, _transform(config, size, **colours))
    with _seed_generators(seed, device):
        loader = Workers(
            pictures,
            workers=loading.get("workers", 0),
            collate=_collate,
            batch_bytes=micro * 3 * size[0] * size[1] * 4,
            batch_size=micro,
            shuffle=True,
            drop_last=True,
            persistent_workers=loading.get("workers", 0) > 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator().manual_seed(seed),
        )
        bad = _train(model.to(device).train(), loader, config, len(train.classes), device)
    if bad:
        print(f"{len(bad)} of {len(train)} images could not be decoded and were replaced by others", flush=True)
    logits, labels, _ = extract(model.eval(), test, size, **loading)
    return accuracy(logits, labels)


def _train(model: nn.Module, loader: Workers, config: Finetune, classes: int, device: torch.device) -> set[int]:
    """Trains the model; returns the indices of the images that could not be decoded."""
    groups, steps = parameter_groups(model, config), len(loader) // config.accumulate
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)
    else:
        optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, fused=True)
    objective, progress, bad = _Objective(config, classes), Progress("finetune", config.epochs), set()
    for epoch in range(config.epochs):
        batches, counted = iter(loader), 0
        for step in range(steps):
            lr = learning_rate_at(config, epoch + step / steps)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            for _ in range(config.accumulate):
                batch = next(batches)
                bad |= set(batch.bad)
                if batch.images is None:
                    continue
                images, labels = (x.to(device, non_blocking=True) for x in (batch.images, batch.labels))
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    loss = objective(model, images, labels)
                (loss / config.accumulate).backward()
                counted += 1
                progress(epoch + (step + 1) / steps, loss.detach())
            optimizer.step()
            optimizer.zero_grad()
        if not counted:
            raise ValueError("eval: none of the labelled images can be decoded")
    return bad


def learning_rate_at(config: Finetune, epoch: float) -> float:
    """Learning rate: warm-up from 0, then half a cosine to `min_lr`, or a tenth at each of `lr_drops`."""
    lr = learning_rate(config.training, epoch)
    if epoch < config.warmup_epochs or config.lr_drops:
        return lr
    peak = config.lr * config.batch_size / 256
    return config.min_lr + (peak - config.min_lr) * lr / peak


class _Objective:
    """Cross entropy with the soft labels of mixup and cutmix, or with label smoothing."""

    def __init__(self, config: Finetune, classes: int):
        from timm.data import Mixup
        from timm.loss import SoftTargetCrossEntropy

        mixing = config.mixup > 0 or config.cutmix > 0
        self.smoothing, self.soft = config.label_smoothing, SoftTargetCrossEntropy()
        self.mixup = Mixup(config.mixup, config.cutmix, label_smoothing=self.smoothing, num_classes=classes)
        self.mixup = self.mixup if mixing else None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if self.mixup is None:
            return F.cross_entropy(model(images).float(), labels, label_smoothing=self.smoothing)
        images, soft = self.mixup(images, labels)
        return self.soft(model(images).float(), soft)


class _Batch(NamedTuple):
    images: Tensor | None  # [B, 3, H, W] float32, normalised; None if none can be decoded
    labels: Tensor | None  # [B] int64
    bad: list[int]  # indices of images that cannot be decoded


class Pictures(Dataset):
    """Images of a source through a transform of PIL images.

    An item is (image, label), or the index of an image that cannot be decoded.
    """

    def __init__(self, source: Source, transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Tensor, int] | int:
        try:
            pixels = open_image(self.source, index).pixels()
        except BadImage:
            return index
        return self.transform(Image.fromarray(pixels.permute(1, 2, 0).numpy())), self.source.label(index)


def _collate(samples: list[tuple[Tensor, int] | int]) -> _Batch:
    good = [sample for sample in samples if not isinstance(sample, int)]
    bad = [sample for sample in samples if isinstance(sample, int)]
    if not good:
        return _Batch(None, None, bad)
    images, labels = zip(*(good[row] for row in fill_in_rows(list(range(len(good))), len(samples))))
    return _Batch(torch.stack(images), torch.tensor(labels), bad)


def _transform(
    config: Finetune,
    size: tuple[int, int],
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
):
    from timm.data import create_transform

    return create_transform(
        (3, *size),
        is_training=True,
        scale=(config.crop_min, 1.0),
        hflip=config.flip_p,
        color_jitter=None,
        auto_augment=None if config.randaugment == "none" else config.randaugment,
        interpolation="bicubic",
        mean=mean,
        std=std,
        re_prob=config.erasing,
        re_mode="pixel",
        re_count=1,
    )


@contextlib.contextmanager
def _seed_generators(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators of Python, numpy and torch, which timm uses, and restores them afterwards."""
    saved = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(saved[0])
            np.random.set_state(saved[1])  # noqa: NPY002
