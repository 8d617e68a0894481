"""Cases of the step benchmark, and for each the steps to compare: ours, the official one, and faster variants in torch.

All shapes are arguments, so that tests can use small ones. `CASES` has the shapes of the papers; a batch is of a size
that takes seconds on two cores, or that fills a GPU.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.contract import Batch
from fastssl.methods import beit, dino, igpt, mae, moco_v2, moco_v3
from fastssl.nn import NTXentLoss
from fastssl.nn.beit import BEIT_SIZES
from fastssl.nn.dvae import Encoder
from fastssl.nn.masking import seeded_noise
from fastssl.nn.resnet import ResNetMini
from fastssl.nn.vit import MOCO_V3_SIZES, SIZES
from fastssl.ops import block_mask
from fastssl.train.config import Execution, Training
from fastssl.train.trainer import Trainer

from . import official, official_beit, official_dino, official_igpt
from .machine import DEVICE

TOTAL = 100_000  # steps of the run of which the first ones are measured
# Modes of torch.compile that are compared by default. On a GPU "reduce-overhead" runs the step as CUDA graphs.
COMPILED = ("default", "reduce-overhead") if DEVICE.type == "cuda" else ("default",)
MODES = {"default": "", "reduce-overhead": ", CUDA graphs", "max-autotune": ", max-autotune"}  # names in the tables
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclasses.dataclass
class Case:
    """A method, its official reimplementation, and a batch."""

    size: str  # method, backbone, shapes: first column of the table
    images: int  # per step, each counted once for any number of views
    training: Training
    ours: Callable[[], nn.Module]
    plain: Callable[[bool], nn.Module]  # (tuned) → the reimplementation, whose weights are loaded later
    inputs: Callable[[Batch, float], tuple]  # (batch, progress) → arguments of the reimplementation
    batch: Callable[[], Batch]
    backbone: str = "vit"  # vit, resnet or none: selects the variants in torch
    norm: bool = False  # the official loop computes the gradient norm
    compiled: tuple[str, ...] = ("",)  # modules to compile with torch.compile, "" for the whole model
    loop: type[official.Loop] = official.Loop
    groups: Callable[[nn.Module], list[dict]] | None = None  # groups of the method for the optimizer

    @property
    def lr(self) -> float:
        """The peak learning rate, so that the second step's loss depends visibly on the first update."""
        return self.training.lr * self.training.batch_size / 256


class Ours:
    """The step of the trainer, at the peak learning rate: ``loss = ours(batch, progress)``."""

    def __init__(self, case: Case, model: nn.Module, precision: str):
        self.model = model.to(DEVICE)
        # In the first epoch of a run that changes the learning rate once per epoch it is the peak.
        training = dataclasses.replace(case.training, epochs=1, warmup_epochs=0, lr_by_epoch=True, lr_drops=())
        execution = Execution(precision=precision)
        self.trainer = Trainer(self.model, training, execution, TOTAL, parameter_groups=case.groups)
        self.optimizer = self.trainer.optimizer

    def use_graph(self) -> None:
        """Run the following steps as with --graph."""
        self.trainer.use_graph()

    def __call__(self, batch: Batch, progress: float) -> Tensor:
        """`progress` is ignored: the trainer counts its steps."""
        return self.trainer.step(iter((batch,))).loss


def plain(case: Case, state: dict, autocast: torch.dtype | None, dtype: torch.dtype = torch.float32) -> official.Loop:
    """The official step as written, from the weights `state`."""
    return _loop(case, state, autocast, dtype, tuned=False)


def tuned(case: Case, state: dict, autocast: torch.dtype | None, plain_attention: bool = False) -> official.Loop:
    """The official step with faster alternatives in torch: fused optimizer, foreach momentum update, channels_last."""
    loop = _loop(case, state, autocast, torch.float32, tuned=True)
    if plain_attention:
        for module in loop.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
    if case.backbone == "resnet":
        loop.model.to(memory_format=torch.channels_last)
        loop.inputs = functools.partial(_channels_last, case.inputs)
    return loop


def _channels_last(inputs: Callable, batch: Batch, progress: float) -> tuple:
    layout = torch.channels_last
    arguments = inputs(batch, progress)
    return tuple(x.contiguous(memory_format=layout) if isinstance(x, Tensor) else x for x in arguments)


def _loop(case: Case, state: dict, autocast, dtype: torch.dtype, tuned: bool) -> official.Loop:
    model = case.plain(tuned).to(DEVICE, dtype)
    model.load_state_dict(state)
    training, lr = case.training, case.lr
    fused = {"fused": True} if tuned else {}
    if training.optimizer == "adamw":
        groups = [p for p in model.parameters() if p.requires_grad]
        if not training.decay_all:
            groups = official.decay_groups(model, training.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr, training.betas, weight_decay=training.weight_decay, **fused)
    elif training.optimizer == "sgd":
        settings = {"momentum": training.momentum, "weight_decay": training.weight_decay, **fused}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr, **settings)
    else:
        optimizer = official.LARS(model.parameters(), lr, training.weight_decay, training.momentum, tuned)
    norm = case.norm and not tuned  # it is only logged, so the tuned step leaves it out
    return case.loop(model, case.inputs, optimizer, autocast, zero_first=not case.norm, norm=norm)


def contestants(case: Case, precision: str, modes: tuple[str, ...] = COMPILED) -> Iterator[tuple[str, Any]]:
    """Names and loops, all from the same weights; the first is ours, the second official.

    Args:
        case: the step.
        precision: a key of `PRECISIONS`.
        modes: modes of torch.compile, keys of `MODES`; a step is compared for each.
    """
    torch.manual_seed(0)
    model = case.ours().to(DEVICE)
    state = {name: x.detach().clone() for name, x in model.state_dict().items()}
    autocast = PRECISIONS[precision]
    yield "ours", Ours(case, model, precision)
    if DEVICE.type == "cuda":  # "ours" becomes the step with a graph
        plain_model = case.ours().to(DEVICE)
        plain_model.load_state_dict(state)
        yield "ours, no graph", Ours(case, plain_model, precision)
    yield "official", plain(case, state, autocast)
    layout = ", channels_last" if case.backbone == "resnet" else ""
    optimizer = "foreach LARS" if case.training.optimizer == "lars" else "fused optimizer"
    yield f"{optimizer}{layout}", tuned(case, state, autocast)
    if case.backbone == "vit":
        yield f"{optimizer}, plain attention", tuned(case, state, autocast, plain_attention=True)
    for mode in modes:
        loop = tuned(case, state, autocast)
        for module in case.compiled:
            loop.model.get_submodule(module).compile(dynamic=False, mode=mode)
        yield f"torch.compile{' of the encoders' * (case.compiled != ('',))}{MODES[mode]}", loop


# The cases


def mae_case(backbone: str, image_size: tuple[int, int], batch: int, **changes) -> Case:
    """Case of MAE with pixels standardised by patch; `changes` of decoder and training."""
    training = dataclasses.replace(mae.Config().training, batch_size=batch, **changes.pop("training", {}))
    config = mae.Config(backbone, image_size, training=training, **changes)
    *encoder, patch = SIZES[backbone]
    decoder = (config.decoder_dim, config.decoder_depth, config.decoder_heads)
    length = image_size[0] * image_size[1] // patch**2

    def inputs(batch: Batch, progress: float) -> tuple:
        return batch.views[0], seeded_noise(length, batch.seed)

    def transcription(tuned: bool) -> nn.Module:
        return official.MAE(image_size, patch, tuple(encoder), decoder, config.mask_ratio, config.norm_pix)

    size = f"MAE, {_name(backbone)}, {_pixels(image_size)}, B={batch}"
    make_batch = functools.partial(images, batch, image_size, 1)
    return Case(size, batch, training, lambda: mae.build(config), transcription, inputs, make_batch, norm=True)


def moco_v2_case(backbone: str, image_size: tuple[int, int], batch: int, queue_size: int, **changes) -> Case:
    """Case of MoCo v2 with batch norms over the whole batch, like the official code in one process."""
    training = dataclasses.replace(moco_v2.Config().training, batch_size=batch, **changes.pop("training", {}))
    config = moco_v2.Config(backbone, image_size, queue_size=queue_size, bn_splits=1, training=training, **changes)

    def transcription(tuned: bool) -> nn.Module:
        encoder = _resnet(backbone, config.dim, False)
        return official.MoCo(encoder, config.dim, queue_size, config.ema_momentum, config.tau, tuned)

    size = f"MoCo v2, {_name(backbone)}, {_pixels(image_size)}, B={batch}, K={queue_size:,}"
    make_batch = functools.partial(images, batch, image_size, 2)
    # Compiled as a whole it is wrong: the copy of the queue is recomputed in the backward pass, after the enqueue.
    compiled = ("encoder_q", "encoder_k")
    ours = functools.partial(moco_v2.build, config)
    return Case(size, batch, training, ours, transcription, _views, make_batch, "resnet", compiled=compiled)


def moco_v3_case(backbone: str, image_size: tuple[int, int], batch: int, **changes) -> Case:
    """Case of MoCo v3: ViTs with AdamW, ResNets with LARS, as in the paper."""
    paper = moco_v3.Config.paper(backbone)
    training = dataclasses.replace(paper.training, batch_size=batch, **changes.pop("training", {}))
    config = dataclasses.replace(paper, image_size=image_size, training=training, **changes)
    is_vit = backbone.startswith("vit")

    def transcription(tuned: bool) -> nn.Module:
        if is_vit:
            *sizes, patch = MOCO_V3_SIZES[backbone]
            encoder = official.moco_v3_vit(image_size, patch, tuple(sizes))
            encoder.head = official.mlp(3, sizes[0], config.hidden, config.dim)
        else:
            encoder = _resnet(backbone, config.dim, True)
            encoder.fc = official.mlp(2, encoder.fc.in_features, config.hidden, config.dim)
        predictor = official.mlp(2, config.dim, config.hidden, config.dim, last_bn=is_vit)
        return official.MoCoV3(encoder, predictor, config.tau, tuned)

    def inputs(batch: Batch, progress: float) -> tuple:
        return *batch.views, 1 - (1 - config.ema_momentum) * (1 + math.cos(math.pi * progress)) / 2

    size = f"MoCo v3, {_name(backbone)}, {_pixels(image_size)}, B={batch}"
    make_batch = functools.partial(images, batch, image_size, 2)
    kind, ours = "vit" if is_vit else "resnet", functools.partial(moco_v3.build, config)
    # Compiled as a whole it would be recompiled at every step, for each new value of the momentum coefficient.
    compiled = ("base_encoder", "momentum_encoder", "predictor")
    return Case(size, batch, training, ours, transcription, inputs, make_batch, kind, compiled=compiled)


def dino_case(backbone: str, image_size: tuple[int, int], local_size: tuple[int, int], batch: int, **changes) -> Case:
    """Case of DINO with two large views and small ones, without drop path, whose random numbers differ, and behind the
    first epoch, in which the last layer is frozen."""
    training = dataclasses.replace(dino.Config().training, batch_size=batch, freeze=(), freeze_epochs=0)
    training.weight_decay_end = None  # a constant for the official loop, whose schedule costs nothing
    fixed = {"drop_path": 0.0, "norm_last_layer": True, "teacher_temp": 0.04, "warmup_teacher_temp_epochs": 0}
    changes |= {"image_size": image_size, "local_size": local_size, "training": training}
    config = dino.Config(backbone, **fixed, **changes)
    *vit, patch = SIZES[backbone]

    def transcription(tuned: bool) -> nn.Module:
        def network() -> nn.Module:
            head = official_dino.Head(vit[0], config.hidden, config.bottleneck, config.prototypes)
            return official_dino.Network(official_dino.ViT(image_size, patch, tuple(vit)), head)

        loss = official_dino.Loss(config.prototypes, config.tau, config.center_momentum, tuned)
        return official_dino.DINO(network(), network(), loss, config.teacher_temp, tuned)

    def make_batch() -> Batch:
        large = images(batch, image_size, 2)
        return large._replace(views=large.views + images(batch, local_size, config.local_crops, seed=2).views)

    views = f"2 × {_pixels(image_size)} + {config.local_crops} × {_pixels(local_size)}"
    size = f"DINO, {_name(backbone)}, {views}, B={batch}, K={config.prototypes:,}"
    ours = functools.partial(dino.build, config)
    return Case(size, batch, training, ours, transcription, _views, make_batch, loop=official_dino.Loop)


def igpt_case(backbone: str, image_size: tuple[int, int], batch: int, **changes) -> Case:
    """Case of the autoregressive iGPT, with evenly spread colours as its palette."""
    training = dataclasses.replace(igpt.Config.paper(backbone).training, batch_size=batch)
    config = igpt.Config(backbone, image_size, training=training, **changes)
    length, statistics = math.prod(image_size), (igpt.IMAGENET_MEAN, igpt.IMAGENET_STD)

    def transcription(tuned: bool) -> nn.Module:
        return official_igpt.IGPT(config.colours, length, igpt.SIZES[backbone], *statistics, tuned)

    size = f"iGPT, {_name(backbone)}, {_pixels(image_size)}, B={batch}, {config.colours} colours"
    make_batch = functools.partial(images, batch, image_size, 1)
    return Case(size, batch, training, functools.partial(igpt.build, config), transcription, _views, make_batch)


def beit_case(backbone: str, image_size: tuple[int, int], batch: int, tokenizer: dict, **changes) -> Case:
    """Case of BEiT with a shared bias table, without drop path, whose random numbers differ, and with one tokenizer of
    random weights for both steps; `tokenizer` has arguments of `Encoder`."""
    training = dataclasses.replace(beit.Config.paper(backbone).training, batch_size=batch)
    config = beit.Config(backbone, image_size, drop_path=0.0, training=training, **changes)
    *vit, patch = BEIT_SIZES[backbone]

    @functools.cache
    def encoder() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(2)
            return Encoder(**tokenizer).eval().requires_grad_(False).to(DEVICE)

    def transcription(tuned: bool) -> nn.Module:
        return official_beit.BEiT(image_size, patch, tuple(vit), encoder(), encoder().vocabulary, tuned)

    def make_batch() -> Batch:
        height, width = (side // patch * encoder().stride for side in image_size)
        first = images(batch, image_size, 1)
        return first._replace(views=first.views + images(batch, (height, width), 1, seed=2).views)

    def inputs(batch: Batch, progress: float) -> tuple:
        counts = torch.full_like(batch.seed, config.mask_patches)
        grid = (image_size[0] // patch, image_size[1] // patch)
        return *batch.views, block_mask(batch.seed, counts, grid, config.mask_min)

    size = f"BEiT, {_name(backbone)}, {_pixels(image_size)}, B={batch}, {encoder().vocabulary:,} codes"
    return Case(
        size,
        batch,
        training,
        lambda: beit.BEiT(config, encoder()),
        transcription,
        inputs,
        make_batch,
        loop=official_beit.Loop,
        groups=beit.parameter_groups,
    )


class Contrast(nn.Module):
    """A method that trains the projection head of SimCLR on given features."""

    def __init__(self, features: int, hidden: int, dim: int, tau: float):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        self.criterion = NTXentLoss(tau)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        a, b = (self.head(view) for view in batch.views)
        with torch.profiler.record_function("loss"):
            return self.criterion(a, b), {}

    def before_step(self, progress: float) -> None:
        """The forward pass has no scheduled values."""

    def after_step(self, progress: float) -> None:
        """There is no state beside the parameters."""

    @property
    def encoder(self) -> nn.Module:
        return nn.Identity()

    def features(self, images: Tensor) -> Tensor:
        return images


def simclr_case(batch: int, features: int, hidden: int, dim: int, tau: float = 0.1) -> Case:
    """Case of SimCLR's loss and head without an encoder: a step on given features."""
    training = Training(100, batch, "sgd", lr=0.3, weight_decay=1e-6, decay_all=True)

    def make_batch() -> Batch:
        generator = torch.Generator().manual_seed(1)
        first = torch.randn(batch, features, generator=generator)
        second = first + torch.randn(batch, features, generator=generator)  # another view of the same image
        return _batch((first, second), generator)

    size = f"SimCLR, head and loss, 2 × {batch:,}, {features}–{hidden}–{dim}"
    sizes = (features, hidden, dim, tau)
    ours, transcription = functools.partial(Contrast, *sizes), functools.partial(official.SimCLR, *sizes)
    return Case(size, batch, training, ours, transcription, _views, make_batch, "none")


def _batch_size(cpu: int, gpu: int) -> int:
    return gpu if DEVICE.type == "cuda" else cpu


CASES: dict[str, Callable[[], Case]] = {
    "mae-vit-base": lambda: mae_case("vit_base", (224, 224), _batch_size(16, 256)),
    "mae-vit-base-32": lambda: mae_case(
        "vit_base", (224, 224), 32
    ),  # where activations take more memory than the optimizer
    "mae-vit-small": lambda: mae_case("vit_small", (224, 224), _batch_size(32, 256)),
    "mae-vit-base-wide": lambda: mae_case("vit_base", (224, 448), _batch_size(8, 128)),
    "moco_v2-resnet50": lambda: moco_v2_case("resnet50", (224, 224), _batch_size(32, 256), 65536),
    "moco_v3-vit-small": lambda: moco_v3_case("vit_small", (224, 224), _batch_size(16, 128)),
    "moco_v3-resnet50": lambda: moco_v3_case("resnet50", (224, 224), _batch_size(16, 128)),
    "dino-vit-small": lambda: dino_case("vit_small", (224, 224), (96, 96), _batch_size(8, 64)),
    "beit-vit-base": lambda: beit_case("vit_base", (224, 224), _batch_size(4, 64), {}),
    "igpt-small": lambda: igpt_case("igpt_small", (32, 32), _batch_size(1, 32)),
    "simclr-loss": lambda: simclr_case(_batch_size(1024, 4096), 512, 512, 256),
}
if DEVICE.type == "cuda":
    CASES |= {
        "mae-vit-large": lambda: mae_case("vit_large", (224, 224), 256),
        "moco_v3-vit-base": lambda: moco_v3_case("vit_base", (224, 224), 128),
    }


def images(batch: int, image_size: tuple[int, int], views: int, seed: int = 1) -> Batch:
    """Images of noise with structure larger than a pixel; deterministic for a seed."""
    generator = torch.Generator().manual_seed(seed)
    coarse = [max(2, length // 8) for length in image_size]
    blurred = torch.randn(batch, 3, *coarse, generator=generator)
    blurred = F.interpolate(blurred, image_size, mode="bilinear")
    noisy = (blurred + 0.3 * torch.randn(batch, 3, *image_size, generator=generator) for _ in range(views))
    return _batch(tuple(noisy), generator)


def as_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    return batch._replace(views=tuple(view.to(dtype) for view in batch.views))


def state_bytes(loop: Any) -> int:
    """Bytes in use between steps: parameters, buffers, optimizer state, gradients that are kept."""
    parameters = list(loop.model.parameters())
    optimizer = itertools.chain.from_iterable(state.values() for state in loop.optimizer.state.values())
    tensors = (*parameters, *loop.model.buffers(), *(p.grad for p in parameters), *optimizer)
    storages = [x.untyped_storage() for x in tensors if isinstance(x, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _batch(views: tuple[Tensor, ...], generator: torch.Generator) -> Batch:
    count = len(views[0])
    seeds = torch.randint(2**31, (count,), generator=generator)
    numbers = torch.arange(count)
    return Batch(tuple(view.to(DEVICE) for view in views), *(x.to(DEVICE) for x in (numbers, -numbers, seeds)))


def _views(batch: Batch, progress: float) -> tuple:
    return batch.views


def _resnet(name: str, dim: int, zero_init_residual: bool) -> nn.Module:
    if name == "resnet_mini":  # torchvision's class with one block per stage
        return ResNetMini(dim, nn.BatchNorm2d, zero_init_residual)
    return official.resnet_of(name, num_classes=dim, zero_init_residual=zero_init_residual)


def _name(backbone: str) -> str:
    known = {"vit_small": "ViT-S/16", "vit_base": "ViT-B/16", "vit_large": "ViT-L/16", "resnet50": "ResNet-50"}
    known |= {"igpt_small": "iGPT-S"}
    return known.get(backbone, backbone)


def _pixels(size: tuple[int, int]) -> str:
    height, width = size
    return f"{height}²" if height == width else f"{height}×{width}"
