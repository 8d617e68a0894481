"""The official BEiT step in plain eager torch, as a baseline: ViT of timm with a mask token, tokenizer and loss.

Written from what the code of microsoft/unilm (beit) computes, without copying it; see `official.py`. The tokenizer is
DALL-E's encoder, whose convolutions are torch's in both steps.
"""

import torch
import torch.nn.functional as F
from timm.models.beit import Beit, RelativePositionBias
from torch import Tensor, nn
from torch.profiler import record_function

from . import official


class BEiT(Beit):
    """``model(images, second, mask)`` is the loss of normalised images, their views for the tokenizer and masks [B, L].

    Args:
        image_size: (height, width) in pixels.
        patch: side of the square patches in pixels.
        sizes: (width, blocks, heads).
        tokenizer: second views → codes [B, rows, columns].
        vocabulary: number of codes.
        tuned: use attention of torch that may keep no matrix; the official code has none.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        patch: int,
        sizes: tuple[int, int, int],
        tokenizer: nn.Module,
        vocabulary: int,
        tuned: bool,
    ):
        dim, depth, heads = sizes
        super().__init__(
            image_size,
            patch,
            num_classes=0,
            global_pool="token",
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            init_values=0.1,
            use_abs_pos_emb=False,
            use_rel_pos_bias=False,
            use_shared_rel_pos_bias=True,
            norm_layer=official.layer_norm,
        )
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.lm_head = nn.Linear(dim, vocabulary)
        self.__dict__["tokenizer"] = tokenizer  # neither trained nor in the state dict
        for module in self.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = tuned
            if isinstance(module, RelativePositionBias):  # the official code saves the index
                module.register_buffer("relative_position_index", module.relative_position_index)

    def forward(self, images: Tensor, second: Tensor, mask: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            codes = self.tokenizer.codes(second).flatten(1)[mask]
        x = self.patch_embed(images)
        weight = mask[..., None].to(x.dtype)
        x = x * (1 - weight) + self.mask_token * weight
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        bias = self.rel_pos_bias()
        for block in self.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        logits = self.lm_head(self.norm(x)[:, 1:][mask])
        with record_function("loss"):
            loss = F.cross_entropy(logits, codes)
            (logits.argmax(1) == codes).float().mean().item()  # logged at every step
        return loss


class Loop(official.Loop):
    """The steps of BEiT's loop: the gradient is clipped as a whole, and the class token has no weight decay."""

    clip_norm = 3.0

    def __init__(self, model: nn.Module, *arguments, **options):
        super().__init__(model, *arguments, **options)
        undecayed, decayed = self.optimizer.param_groups
        decayed["params"] = [p for p in decayed["params"] if p is not model.cls_token]
        undecayed["params"].append(model.cls_token)

    def __call__(self, batch, progress: float) -> Tensor:
        inputs = self.inputs(batch, progress)
        device = inputs[0].device.type
        with record_function("forward"), torch.autocast(device, self.autocast, self.autocast is not None):
            loss = self.model(*inputs)
        with record_function("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        with record_function("optimizer"):
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            self.optimizer.step()
        return loss.detach()
