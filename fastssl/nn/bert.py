"""BERT whose upper layers also attend to an image, and its head for masked tokens (ALBEF). Names are those of its code.

A pass has four parts, which may be asked for one by one: `mode` is

    "text"         token ids through the lower layers, which see text alone
    "fusion"       embeddings of the lower layers through the upper ones, whose cross-attention reads an image
    "multi_modal"  both, one after the other
    "predict"      embeddings to the logits of all tokens of the vocabulary
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops import attention, check, linear

from .block import gelu_mlp
from .linear import Linear
from .norm import ResidualNorm

# name: (width, layers, heads, lower layers). Base: Devlin et al., 2019; Li et al., 2021 (ALBEF), section 3.1.
BERT_SIZES = {"bert_mini": (128, 4, 4, 2), "bert_base": (768, 12, 12, 6)}
VOCABULARY = 30522  # tokens of bert-base-uncased
PAD, CLS, MASK = 0, 101, 103  # ids of [PAD], [CLS] and [MASK]
PADDED = -10000.0  # what a padded position's score is lowered by
EPS = 1e-12  # of BERT's layer norms


class BertAttention(nn.Module):
    """Attention of BERT, then dropout, the residual and a layer norm.

    Args:
        dim: width D of the queries and of the result.
        num_heads: H, which divides D.
        key_dim: width of what keys and values are made of.
        dropout: probability with which attention weights, and values of the result, are dropped in training.
    """

    def __init__(self, dim: int, num_heads: int, key_dim: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        widths = {"query": dim, "key": key_dim, "value": key_dim}
        self.self = nn.ModuleDict({name: Linear(width, dim) for name, width in widths.items()})
        self.output = nn.ModuleDict({"dense": Linear(dim, dim), "LayerNorm": ResidualNorm(dim, EPS)})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, source: Tensor, bias: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """[R, L, D] → [R, L, D].

        Args:
            x: [R, L, D] what queries are made of.
            source: [S, M, key_dim] what keys and values are made of.
            bias: [R, 1, 1, M] floating, added to the scores.
            rows: [R] int64, the row of `source` that a row of x attends to; None: S = R, and each to its own. Keys and
                values are made once for each row of `source`, however often it is attended to.
        """
        q, k, v = (
            self.self[name](tokens).unflatten(2, (self.num_heads, -1))
            for name, tokens in (("query", x), ("key", source), ("value", source))
        )
        if rows is not None:
            k, v = k[rows], v[rows]
        dropout = self.dropout.p if self.training else 0.0
        if bias is None and not dropout:
            out = attention(q, k, v)
        else:
            bias = None if bias is None else bias.to(q.dtype)
            q, k, v = (y.transpose(1, 2) for y in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, bias, dropout).transpose(1, 2)
        delta = self.dropout(self.output["dense"](out.flatten(2)))
        return self.output["LayerNorm"](x, delta, x.dtype)[1]


class BertLayer(nn.Module):
    """Self-attention, cross-attention to an image where there is one, and an MLP, each followed by a layer norm.

    Args:
        dim, num_heads, hidden: width, heads and hidden width of the MLP.
        image_dim: width of an image's tokens; None for a layer without cross-attention.
        dropout: probability of dropout.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, image_dim: int | None, dropout: float):
        super().__init__()
        self.attention = BertAttention(dim, num_heads, dim, dropout)
        self.crossattention = None if image_dim is None else BertAttention(dim, num_heads, image_dim, dropout)
        self.intermediate: Any = nn.ModuleDict({"dense": Linear(dim, hidden)})
        self.output: Any = nn.ModuleDict({"dense": Linear(hidden, dim), "LayerNorm": ResidualNorm(dim, EPS)})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor, images: Tensor | None = None, rows: Tensor | None = None) -> Tensor:
        """[R, L, D] → [R, L, D]; images [S, M, image_dim] and rows [R] are those of the cross-attention."""
        x = self.attention(x, x, bias)
        if self.crossattention is not None:
            x = self.crossattention(x, images, rows=rows)
        delta = self.dropout(gelu_mlp(x, self.intermediate["dense"], self.output["dense"]))
        return self.output["LayerNorm"](x, delta, x.dtype)[1]


class BertEmbeddings(nn.Module):
    """Embeddings of tokens, of positions, and of the first of two segments, added and normalised."""

    def __init__(self, vocabulary: int, positions: int, dim: int, dropout: float):
        super().__init__()
        self.word_embeddings = nn.Embedding(vocabulary, dim, padding_idx=PAD)
        self.position_embeddings = nn.Embedding(positions, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)
        self.LayerNorm = ResidualNorm(dim, EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [R, L] → [R, L, D]."""
        longest = self.position_embeddings.num_embeddings
        if ids.shape[1] > longest:
            raise ValueError(f"BertForMaskedLM: tokens must be at most {longest} a text, got {ids.shape[1]}")
        x = self.word_embeddings(ids) + self.token_type_embeddings.weight[0]
        x = x + self.position_embeddings.weight[: ids.shape[1]]
        return self.dropout(self.LayerNorm(x, None, x.dtype)[1])


class BertForMaskedLM(nn.Module):
    """BERT with an image behind its upper layers: ALBEF's text encoder, multimodal encoder and head for masked tokens.

    Names in the state dict are those of ALBEF's code and of Hugging Face's `BertForMaskedLM`, without the repeated
    names of tied weights: the head's matrix is that of the word embeddings. Queries, keys and values of images are
    computed once for each image, however many texts are fused with it.

    Args:
        image_dim: width of the images' tokens.
        dim, depth, num_heads, text_depth: width, layers, heads, and how many of the layers see text alone; the other
            ones have cross-attention.
        vocabulary: number of tokens.
        positions: largest number of tokens in a text.
        dropout: probability of dropout in training, of attention weights too.

    Raises:
        ValueError: num_heads does not divide dim, or text_depth is not from 1 to depth − 1; by a call, an unknown mode,
            a shape that does not fit, or too many tokens.

    Source: Devlin et al., "BERT", 2019; Li et al., 2021 (ALBEF), section 3.1, and its code.
    """

    def __init__(
        self,
        image_dim: int,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        text_depth: int = 6,
        *,
        vocabulary: int = VOCABULARY,
        positions: int = 512,
        hidden: int | None = None,
        dropout: float = 0.1,
    ):
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"BertForMaskedLM: dim must be divisible by num_heads={num_heads}, got {dim}")
        if not 1 <= text_depth < depth:
            raise ValueError(f"BertForMaskedLM: text_depth must be from 1 to {depth - 1}, got {text_depth}")
        self.dim, self.text_depth = dim, text_depth
        sizes = dim, num_heads, hidden or 4 * dim
        layers = [BertLayer(*sizes, image_dim if i >= text_depth else None, dropout) for i in range(depth)]
        embeddings = BertEmbeddings(vocabulary, positions, dim, dropout)
        encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.bert: Any = nn.ModuleDict({"embeddings": embeddings, "encoder": encoder})
        self.cls = nn.ModuleDict({"predictions": PredictionHead(dim, vocabulary)})
        self.apply(_initialise)

    @property
    def fusion_layers(self) -> list[nn.Module]:
        """The layers with cross-attention."""
        return list(self.bert["encoder"]["layer"])[self.text_depth :]

    def forward(
        self,
        x: Tensor,
        is_token: Tensor | None = None,
        images: Tensor | None = None,
        rows: Tensor | None = None,
        mode: Literal["text", "fusion", "multi_modal", "predict"] = "multi_modal",
    ) -> Tensor:
        """Embeddings [R, L, D] of the last layer that `mode` asks for, or the logits [..., V] of "predict".

        Args:
            x: token ids [R, L] int64; embeddings [R, L, D] for "fusion", [..., D] for "predict".
            is_token: [R, L] bool, False for padding; None: where ids are not 0, everywhere for "fusion".
            images: [S, M, image_dim] tokens of images, for "fusion" and "multi_modal".
            rows: [R] int64, the image of each text; None: S = R, and text i belongs to image i.
        """
        if mode == "predict":
            return self.cls["predictions"](x, self.bert["embeddings"].word_embeddings.weight)
        if mode not in ("text", "fusion", "multi_modal"):
            modes = "text, fusion, multi_modal or predict"
            raise ValueError(f"BertForMaskedLM: mode must be {modes}, got {mode!r}")
        check.tensor("BertForMaskedLM", "x", x, "R L D" if mode == "fusion" else "R L")
        if is_token is None:
            is_token = x.new_ones(x.shape[:2], dtype=torch.bool) if mode == "fusion" else x != PAD
        check.tensor("BertForMaskedLM", "is_token", is_token, "R L", R=x.shape[0], L=x.shape[1])
        layers = list(self.bert["encoder"]["layer"])
        if mode != "fusion":
            x = self.bert["embeddings"](x)
        bias = torch.zeros_like(is_token, dtype=x.dtype).masked_fill_(~is_token, PADDED)[:, None, None]
        if mode != "fusion":
            for layer in layers[: self.text_depth]:
                x = layer(x, bias)
        if mode == "text":
            return x
        if images is None:
            raise ValueError(f"BertForMaskedLM: images must be given for mode {mode!r}, got None")
        check.tensor("BertForMaskedLM", "images", images, "S M W")
        if rows is None and images.shape[0] != x.shape[0]:
            got = f"{images.shape[0]} images for {x.shape[0]} texts"
            raise ValueError(f"BertForMaskedLM: rows must say which image belongs to each text, got {got}")
        for layer in layers[self.text_depth :]:
            x = layer(x, bias, images, rows)
        return x


class PredictionHead(nn.Module):
    """Linear, GELU, layer norm, and the product with the word embeddings, whose weights it shares."""

    def __init__(self, dim: int, vocabulary: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.transform = nn.ModuleDict({"dense": Linear(dim, dim), "LayerNorm": ResidualNorm(dim, EPS)})

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """[..., D] and word embeddings [V, D] → logits [..., V]."""
        x = F.gelu(self.transform["dense"](x))
        return linear(self.transform["LayerNorm"](x, None, x.dtype)[1], weight, self.bias)


def _initialise(module: nn.Module) -> None:
    """Normal weights of standard deviation 0.02, biases 0: BERT's and ALBEF's."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
