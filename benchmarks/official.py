"""The official training steps in plain eager torch, as baselines: models, momentum updates and loops.

Written from what the code of facebookresearch's mae, moco and moco-v3 computes, without copying it. Blocks are those of
current timm and torchvision; the official code uses older releases. Nothing of fastssl is used.

Weights are always loaded: the names in the state dicts are the official ones. `tuned` models use faster alternatives of
torch with the same results: momentum updates by `_foreach_lerp_`, and no accuracy at every step.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block, PatchEmbed, VisionTransformer
from torch import Tensor, nn
from torch.profiler import record_function
from torchvision.models import resnet


def layer_norm(dim: int, **_) -> nn.LayerNorm:
    return nn.LayerNorm(dim, eps=1e-6)


class MAE(nn.Module):
    """Embeds all patches, encodes the kept ones, decodes and predicts all; the loss is that of the removed ones.

    Args:
        img_size: (height, width) in pixels.
        patch: side of the square patches in pixels.
        encoder, decoder: (width, blocks, heads) of each.
    """

    def __init__(
        self,
        img_size: tuple[int, int],
        patch: int,
        encoder: tuple[int, int, int],
        decoder: tuple[int, int, int],
        mask_ratio: float = 0.75,
        norm_pix_loss: bool = True,
    ):
        super().__init__()
        self.patch, self.mask_ratio, self.norm_pix_loss = patch, mask_ratio, norm_pix_loss
        (dim, depth, heads), (decoder_dim, decoder_depth, decoder_heads) = encoder, decoder
        self.patch_embed = PatchEmbed(img_size, patch, 3, dim)
        length = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + length, dim), requires_grad=False)
        self.blocks = _blocks(dim, depth, heads)
        self.norm = layer_norm(dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + length, decoder_dim), requires_grad=False)
        self.decoder_blocks = _blocks(decoder_dim, decoder_depth, decoder_heads)
        self.decoder_norm = layer_norm(decoder_dim)
        self.decoder_pred = nn.Linear(decoder_dim, 3 * patch**2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """The loss; `noise` [B, L] determines the mask."""
        x, mask, restore = self.random_masking(self.patch_embed(images) + self.pos_embed[:, 1:], noise)
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        pred = self.decode(self.norm(x), restore)
        with record_function("loss"):
            return self.loss(images, pred, mask)

    def random_masking(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Kept tokens, the mask (1 for removed patches), and the rank of each patch's noise."""
        batch, length, dim = x.shape
        keep = int(length * (1 - self.mask_ratio))
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        kept = x.gather(1, order[:, :keep].unsqueeze(-1).repeat(1, 1, dim))
        mask = torch.ones(batch, length, device=x.device)
        mask[:, :keep] = 0
        return kept, mask.gather(1, restore), restore

    def decode(self, latent: Tensor, restore: Tensor) -> Tensor:
        """Predictions of all patches [B, L, 3p²]."""
        x = self.decoder_embed(latent)
        batch, tokens, dim = x.shape
        masked = self.mask_token.repeat(batch, restore.shape[1] + 1 - tokens, 1)
        patches = torch.cat([x[:, 1:], masked], dim=1)
        patches = patches.gather(1, restore.unsqueeze(-1).repeat(1, 1, dim))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def loss(self, images: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        rows, columns = height // self.patch, width // self.patch
        target = images.reshape(batch, channels, rows, self.patch, columns, self.patch)
        target = torch.einsum("bchpwq->bhwpqc", target).reshape(batch, rows * columns, -1)
        if self.norm_pix_loss:
            mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (var + 1e-6) ** 0.5
        error = ((pred - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum()


def _blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    return nn.ModuleList(Block(dim, heads, 4, qkv_bias=True, norm_layer=layer_norm) for _ in range(depth))


class Momentum(nn.Module):
    """Base of both MoCos: the update of the momentum encoder."""

    def __init__(self, tuned: bool):
        super().__init__()
        self.tuned = tuned

    @torch.no_grad()
    def update_momentum_encoder(self, target: nn.Module, source: nn.Module, m: float) -> None:
        with record_function("EMA and queue"):
            if self.tuned:
                torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), 1 - m)
                return
            for query, key in zip(source.parameters(), target.parameters()):
                key.data = key.data * m + query.data * (1 - m)

    def count_hits(self, logits: Tensor, labels: Tensor) -> None:
        """Top-1 and top-5 accuracy, which the official loops compute at every step."""
        if not self.tuned:
            with torch.no_grad():
                hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
                self.hits = hits[:, :1].float().sum(), hits.float().sum()


class MoCo(Momentum):
    """MoCo v2; both encoders start equal. In one process shuffling has no effect on batch norms, which use the whole
    batch. The batch size must divide the queue size."""

    def __init__(self, encoder: nn.Module, dim: int, queue_size: int, m: float, tau: float, tuned: bool = False):
        super().__init__(tuned)
        self.m, self.tau = m, tau
        width = encoder.fc.in_features
        encoder.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        self.encoder_q, self.encoder_k = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.register_buffer("queue", torch.zeros(dim, queue_size))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.int64))

    def forward(self, im_q: Tensor, im_k: Tensor) -> Tensor:
        q = F.normalize(self.encoder_q(im_q), dim=1)
        with torch.no_grad():
            self.update_momentum_encoder(self.encoder_k, self.encoder_q, self.m)
            order = torch.randperm(len(im_k), device=im_k.device)
            k = F.normalize(self.encoder_k(im_k[order]), dim=1)[order.argsort()]
        with record_function("loss"):
            positive = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
            negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
            logits = torch.cat([positive, negative], dim=1) / self.tau
            labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            loss = F.cross_entropy(logits, labels)
            self.count_hits(logits, labels)
        with record_function("EMA and queue"):
            self.dequeue_and_enqueue(k)
        return loss

    @torch.no_grad()
    def dequeue_and_enqueue(self, keys: Tensor) -> None:
        ptr, size = int(self.queue_ptr), self.queue.shape[1]
        assert size % len(keys) == 0
        self.queue[:, ptr : ptr + len(keys)] = keys.T
        self.queue_ptr[0] = (ptr + len(keys)) % size


class MoCoV3(Momentum):
    """MoCo v3; the last layer of the encoder, `head` or `fc`, is the projector."""

    def __init__(self, encoder: nn.Module, predictor: nn.Module, tau: float, tuned: bool = False):
        super().__init__(tuned)
        self.tau = tau
        self.base_encoder, self.momentum_encoder = encoder, copy.deepcopy(encoder).requires_grad_(False)
        self.predictor = predictor

    def forward(self, x1: Tensor, x2: Tensor, m: float) -> Tensor:
        q1, q2 = self.predictor(self.base_encoder(x1)), self.predictor(self.base_encoder(x2))
        with torch.no_grad():
            self.update_momentum_encoder(self.momentum_encoder, self.base_encoder, m)
            k1, k2 = self.momentum_encoder(x1), self.momentum_encoder(x2)
        with record_function("loss"):
            return self.contrastive_loss(q1, k2) + self.contrastive_loss(q2, k1)

    def contrastive_loss(self, q: Tensor, k: Tensor) -> Tensor:
        logits = torch.einsum("nc,mc->nm", F.normalize(q, dim=1), F.normalize(k, dim=1)) / self.tau
        return F.cross_entropy(logits, torch.arange(len(q), device=q.device)) * (2 * self.tau)


def mlp(layers: int, dim_in: int, hidden: int, dim_out: int, last_bn: bool = True) -> nn.Sequential:
    """Projector or predictor of MoCo v3."""
    modules: list[nn.Module] = []
    for i in range(layers):
        width, out = (hidden if i else dim_in), (hidden if i < layers - 1 else dim_out)
        modules.append(nn.Linear(width, out, bias=False))
        if i < layers - 1:
            modules += [nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        elif last_bn:
            modules.append(nn.BatchNorm1d(out, affine=False))
    return nn.Sequential(*modules)


def moco_v3_vit(img_size: tuple[int, int], patch: int, sizes: tuple[int, int, int]) -> VisionTransformer:
    """ViT of `sizes` (width, blocks, heads), whose positions and patch embedding are not trained."""
    dim, depth, heads = sizes
    vit = VisionTransformer(
        img_size, patch, num_classes=0, embed_dim=dim, depth=depth, num_heads=heads, norm_layer=layer_norm
    )
    vit.pos_embed.requires_grad_(False)
    vit.patch_embed.requires_grad_(False)
    return vit


def resnet_of(name: str, **kwargs) -> nn.Module:
    return getattr(resnet, name)(**kwargs)


class SimCLR(nn.Module):
    """Projection head of two layers and NT-Xent, the mean over both views of all images.

    The official code computes four matrices of logits and adds −1e9 to two diagonals; the tuned version computes one.
    """

    def __init__(self, features: int, hidden: int, dim: int, tau: float, tuned: bool = False):
        super().__init__()
        self.tau, self.tuned = tau, tuned
        self.head = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        a, b = self.head(x1), self.head(x2)
        with record_function("loss"):
            return self.one_matrix(a, b) if self.tuned else self.four_matrices(a, b)

    def four_matrices(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
        labels = torch.arange(len(a), device=a.device)
        masks = F.one_hot(labels, len(a)) * 1e9
        aa, bb = (x @ x.T / self.tau - masks for x in (a, b))
        ab, ba = a @ b.T / self.tau, b @ a.T / self.tau
        losses = (F.cross_entropy(torch.cat(pair, dim=1), labels) for pair in ((ab, aa), (ba, bb)))
        return sum(losses) / 2

    def one_matrix(self, a: Tensor, b: Tensor) -> Tensor:
        z = F.normalize(torch.cat([a, b]), dim=1)
        logits = (z @ z.T / self.tau).fill_diagonal_(-torch.inf)
        return F.cross_entropy(logits, torch.arange(len(z), device=z.device).roll(len(a)))


class LARS(torch.optim.Optimizer):
    """MoCo v3's: v ← m·v + s·(g + λ·w), w ← w − lr·v, s = trust·‖w‖ / ‖g + λ·w‖; for vectors s = 1 and λ = 0."""

    def __init__(self, params, lr: float, weight_decay: float, momentum: float = 0.9, tuned: bool = False):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": 0.001})
        self.tuned = tuned

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            trained = [p for p in group["params"] if p.grad is not None]
            for p in trained:
                if "mu" not in self.state[p]:
                    self.state[p]["mu"] = torch.zeros_like(p)
            if self.tuned:
                self._foreach_step(trained, group)
                continue
            for p in trained:
                self._step(p, self.state[p]["mu"], group)

    @staticmethod
    def _step(p: Tensor, mu: Tensor, group: dict) -> None:
        change = p.grad
        if p.ndim > 1:
            change = change.add(p, alpha=group["weight_decay"])
            norm, change_norm = p.norm(), change.norm()
            ones = torch.ones_like(norm)
            scale = torch.where(change_norm > 0, group["trust"] * norm / change_norm, ones)
            change = change.mul(torch.where(norm > 0, scale, ones))
        mu.mul_(group["momentum"]).add_(change)
        p.add_(mu, alpha=-group["lr"])

    def _foreach_step(self, trained: list[Tensor], group: dict) -> None:
        matrices = [p for p in trained if p.ndim > 1]
        changes = {p: p.grad for p in trained}
        if matrices:
            decayed = torch._foreach_add([p.grad for p in matrices], matrices, alpha=group["weight_decay"])
            norm, change_norm = (torch.stack(torch._foreach_norm(x)) for x in (matrices, decayed))
            scales = torch.where((norm > 0) & (change_norm > 0), group["trust"] * norm / change_norm, 1.0)
            torch._foreach_mul_(decayed, list(scales.unbind()))
            changes |= dict(zip(matrices, decayed))
        mus = [self.state[p]["mu"] for p in trained]
        torch._foreach_mul_(mus, group["momentum"])
        torch._foreach_add_(mus, [changes[p] for p in trained])
        torch._foreach_add_(trained, mus, alpha=-group["lr"])


class Loop:
    """Steps of the official loops: ``loss = loop(batch, progress)``.

    Args:
        model: returns the loss.
        inputs: (batch, progress) → arguments of the model.
        optimizer: optimizer of the model's parameters.
        autocast: dtype of autocast, or None for none.
        zero_first: set gradients to None before the backward pass, like MoCo's loops, instead of after the step, like
            MAE's.
        norm: compute the gradient norm at each step, like MAE's loop.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Callable[..., tuple],
        optimizer: torch.optim.Optimizer,
        autocast: torch.dtype | None = None,
        zero_first: bool = True,
        norm: bool = False,
    ):
        self.model, self.inputs, self.optimizer = model.train(), inputs, optimizer
        self.autocast, self.zero_first, self.norm = autocast, zero_first, norm

    def __call__(self, batch, progress: float) -> Tensor:
        with record_function("data"):
            inputs = self.inputs(batch, progress)
        device = inputs[0].device.type
        with record_function("forward"), torch.autocast(device, self.autocast, self.autocast is not None):
            loss = self.model(*inputs)
        with record_function("backward"):
            if self.zero_first:
                self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            if self.norm:
                norms = [p.grad.norm() for p in self.model.parameters() if p.grad is not None]
                self.grad_norm = torch.stack(norms).norm()
            self.optimizer.step()
            if not self.zero_first:
                self.optimizer.zero_grad()
        return loss.detach()


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameter groups of MAE: no weight decay of vectors and biases."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    undecayed = [p for name, p in trained if p.ndim == 1 or name.endswith(".bias")]
    ids = set(map(id, undecayed))
    decayed = [p for _, p in trained if id(p) not in ids]
    return [{"params": undecayed, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]
