"""An image encoder, a text encoder and a multimodal one, with momentum twins (ALBEF)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bert import PAD, BertForMaskedLM
from .losses import l2_normalize
from .momentum import MomentumEncoder
from .token_masks import distilled_token_loss, masked_positions
from .vit import ViT

BASE_WIDTH = 768  # of ViT-B and BERT base
FOLLOWED = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")  # those with a momentum encoder


class Encoded(NamedTuple):
    """What the encoders make of a batch of pairs."""

    patches: Tensor  # [B, N, W] tokens of the images, the class token first
    text: Tensor  # [B, L, D] embeddings by the layers that see text alone
    masked_text: Tensor | None  # the same of the texts with masked tokens
    image_z: Tensor  # [B, dim] unit vectors of the images
    text_z: Tensor  # [B, dim] unit vectors of the texts


class FusionNetwork(nn.Module):
    """ALBEF's networks; names in the state dict are those of its code.

    Args:
        visual_encoder: ViT that returns all its tokens, the class token first.
        text_encoder: text and multimodal encoder, with its head for masked tokens.
        dim: width of the vectors that are contrasted.
        momentum: momentum coefficient of the twins.

    Source: Li et al., 2021 (ALBEF), section 3.1, and its code.
    """

    def __init__(self, visual_encoder: ViT, text_encoder: BertForMaskedLM, dim: int, momentum: float):
        super().__init__()
        self.visual_encoder, self.text_encoder = visual_encoder, text_encoder
        self.vision_proj = nn.Linear(visual_encoder.embed_dim, dim)
        self.text_proj = nn.Linear(text_encoder.dim, dim)
        self.itm_head = nn.Linear(text_encoder.dim, 2)
        for name in FOLLOWED:
            self.add_module(f"{name}_m", MomentumEncoder(getattr(self, name), momentum))

    def encode(self, images: Tensor, tokens: Tensor, corrupted: Tensor | None = None, twin: bool = False) -> Encoded:
        """Images [B, 3, H, W], tokens [B, L] and, where they are given, tokens with masks, by the encoders or their
        twins."""
        vit, bert, image_head, text_head = (getattr(self, f"{name}_m" if twin else name) for name in FOLLOWED)
        ids = (tokens,) if corrupted is None else (tokens, corrupted)
        is_token = (tokens != PAD).repeat(len(ids), 1)  # a random token in place of a masked one may be [PAD]
        patches, texts = vit(images), bert(torch.cat(ids), is_token, mode="text").split(len(tokens))
        image_z, text_z = image_head(patches[:, 0]), text_head(texts[0][:, 0])
        masked_text = None if corrupted is None else texts[1]
        return Encoded(patches, texts[0], masked_text, l2_normalize(image_z), l2_normalize(text_z))

    def fuse(
        self, student: Encoded, is_token: Tensor, negatives: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Texts fused with images, all in one pass, in which keys and values of an image are computed once.

        Args:
            student: what the encoders made of the batch.
            is_token: [B, L] bool, False for padding.
            negatives: another image for each text and another text for each image [B]; None for no matching.

        Returns: logits of matching [3·B, 2] of the pairs, of texts with other images, and of images with other texts;
            the texts with masks, each with its image [B, L, D]. None for what is not asked for.
        """
        batch, own = len(is_token), torch.arange(len(is_token), device=is_token.device)
        parts = []  # (texts, which positions are tokens, images)
        if negatives is not None:
            other_image, other_text = negatives
            parts += [(student.text, is_token, own), (student.text, is_token, other_image)]
            parts.append((student.text[other_text], is_token[other_text], own))
        if student.masked_text is not None:
            parts.append((student.masked_text, is_token, own))
        if not parts:
            return None, None
        texts, masks, rows = (torch.cat(tensors) for tensors in zip(*parts))
        fused = self.text_encoder(texts, masks, student.patches, rows, "fusion")
        matched = None if negatives is None else self.itm_head(fused[: 3 * batch, 0])
        return matched, None if student.masked_text is None else fused[-batch:]

    def token_loss(
        self, fused: Tensor, twin: Encoded, is_token: Tensor, targets: Tensor, alpha: Tensor, probability: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of the masked tokens, and the share that is predicted right. Logits are computed at masked positions.

        Args:
            fused: [B, L, D] texts with masks, fused with their images.
            twin: what the momentum encoders made of the batch; without masked texts the targets are the tokens alone.
            is_token: [B, L] bool, False for padding.
            targets: [B, L] int64, the masked tokens, −100 elsewhere.
            alpha: share of the twin's softmax in the targets.
            probability: that with which tokens were masked.
        """
        bert_m: Any = self.text_encoder_m
        positions = masked_positions(targets, probability)
        twin_logits = None
        if twin.masked_text is not None:
            with torch.no_grad():
                hidden = bert_m(twin.masked_text, is_token, twin.patches, mode="fusion")
                twin_logits = bert_m(hidden.flatten(0, 1)[positions], mode="predict")
        logits, rows = self.text_encoder(fused.flatten(0, 1)[positions], mode="predict"), targets.flatten()[positions]
        loss = distilled_token_loss(logits, twin_logits, rows, alpha)
        return loss, (logits.argmax(1) == rows).sum() / (rows >= 0).sum().clamp(min=1)

    def update_twins(self) -> None:
        """Move the twins towards what they follow."""
        for name in FOLLOWED:
            getattr(self, f"{name}_m").update(getattr(self, name))

    def embed_images(self, images: Tensor) -> Tensor:
        """Unit vectors [B, dim] of images [B, 3, H, W]."""
        return l2_normalize(self.vision_proj(self.visual_encoder(images)[:, 0]))

    def embed_text(self, tokens: Tensor) -> Tensor:
        """Unit vectors [B, dim] of token ids [B, L]."""
        return l2_normalize(self.text_proj(self.text_encoder(tokens, mode="text")[:, 0]))

    def log_odds(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logarithms of the odds [B] that images [B, 3, H, W], or one image for all, match texts [B, L]."""
        rows = tokens.new_zeros(len(tokens)) if len(images) == 1 else None
        fused = self.text_encoder(tokens, None, self.visual_encoder(images), rows)
        mismatch, match = self.itm_head(fused[:, 0]).unbind(1)
        return match - mismatch


@torch.no_grad()
def raise_gain(network: nn.Module, width: int) -> None:
    """Enlarge the initial weights of a network narrower than base models, for whose 768 columns their deviation 0.02 is
    meant.

    Layers of 128 would add so little that all images, and all texts, have nearly the same embedding. A ViT's positions
    would be drowned by patches, whose deviation is 0.8: they get 0.3.
    """
    gain = max(1.0, BASE_WIDTH / width) ** 0.5
    for module in network.modules():
        if isinstance(module, nn.Linear):
            module.weight *= gain
        if isinstance(module, ViT) and module.pos_embed is not None:
            module.pos_embed.mul_(gain**3)
