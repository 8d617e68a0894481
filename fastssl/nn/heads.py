"""Projection and prediction heads."""

import itertools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.ops.dispatch import acc_dtype

from .linear import Linear


def moco_v2_head(fc: nn.Linear) -> nn.Sequential:
    """Linear(d, d), ReLU, and the given last layer `fc`, Linear(d, dim) (Chen et al., 2020, MoCo v2, section 3)."""
    return nn.Sequential(Linear(fc.in_features, fc.in_features), nn.ReLU(), fc)


def mlp_head(
    *dims: int, bias: bool = False, last_bias: bool = False, last_norm: Literal["none", "scale", "plain"] = "none"
) -> nn.Sequential:
    """Projector or predictor: linear layers, with batch norm and ReLU between them.

    Args:
        dims: widths of the input, of each hidden layer, and of the output.
        bias: biases in the linear layers before a batch norm with ReLU (BYOL, VICReg).
        last_bias: a bias in the last linear layer (predictor of SimSiam).
        last_norm: batch norm at the end: "none"; "plain", without weight and bias (MoCo v3, SimSiam, Barlow Twins); or
            "scale", with a weight and a bias that stays 0 (SimCLR).

    Returns: the layers in order, as the official code of MoCo v3, SimSiam, Barlow Twins and VICReg numbers them.

    Source: Chen et al., 2020 (SimCLR), section 4.2; Grill et al., 2020 (BYOL), section 3.3.
    """
    modules: list[nn.Module] = []
    *hidden, dim_out = dims[1:]
    for dim_in, dim in zip(dims, hidden):
        modules += [Linear(dim_in, dim, bias=bias), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
    modules.append(Linear(dims[-2], dim_out, bias=last_bias))
    if last_norm != "none":
        norm = nn.BatchNorm1d(dim_out, affine=last_norm == "scale")
        if last_norm == "scale":
            norm.bias.requires_grad_(False)
        modules.append(norm)
    return nn.Sequential(*modules)


class FactoredLogits(NamedTuple):
    """Logits ``features @ prototypes.T`` that are not multiplied out: for losses that never store them."""

    features: Tensor  # [N, D]
    prototypes: Tensor  # [K, D]


class DINOHead(nn.Module):
    """Projection head of DINO, iBOT and DINOv2: an MLP, unit length, and a weight-normed layer of prototypes.

    ``head(x)`` gives logits [N, K], as the official class of the same name and arguments, whose state dicts load.
    ``head.factored(x)`` gives the same as `FactoredLogits`, 256 numbers a row, from which `DINOLoss` and
    `IBOTPatchLoss` compute without logits.

    Args:
        in_dim: width of the features.
        out_dim: K, the number of prototypes.
        use_bn: batch norms in the MLP.
        norm_last_layer: keep the lengths of the prototypes at 1: `last_layer.weight_g` is not trained.
        nlayers: linear layers of the MLP; the last has no GELU behind it.
        hidden_dim: hidden width of the MLP.
        bottleneck_dim: D, the width of its output.

    Source: Caron et al., 2021 (DINO), section 3.1 and appendix C, and its code.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ):
        super().__init__()
        if nlayers < 1:
            raise ValueError(f"DINOHead: nlayers must be at least 1, got {nlayers}")
        dims = [in_dim, *[hidden_dim] * (nlayers - 1), bottleneck_dim]
        layers: list[nn.Module] = []
        for dim, width in itertools.pairwise(dims[:-1]):
            layers += [Linear(dim, width), *[nn.BatchNorm1d(width)] * use_bn, nn.GELU()]
        last = Linear(dims[-2], bottleneck_dim)
        self.mlp: nn.Module = nn.Sequential(*layers, last) if layers else last
        for module in self.mlp.modules():
            if isinstance(module, Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = PrototypeLayer(bottleneck_dim, out_dim, norm_last_layer)

    def factored(self, x: Tensor) -> FactoredLogits:
        """Features [N, in_dim] → unit vectors [N, D], float32 (float64 for float64), and prototypes [K, D]."""
        gelu = False
        for layer in self.mlp if isinstance(self.mlp, nn.Sequential) else [self.mlp]:
            if isinstance(layer, nn.GELU):
                gelu = True  # computed by the next layer as it reads its input
            else:
                x, gelu = layer(x, gelu=True) if gelu else layer(x), False
        return FactoredLogits(F.normalize(x.to(acc_dtype(x)), dim=-1), self.last_layer.prototypes())

    def forward(self, x: Tensor) -> Tensor:
        """Features [N, in_dim] → logits [N, K]."""
        features, prototypes = self.factored(x)
        return F.linear(features.to(prototypes.dtype), prototypes)


class PrototypeLayer(nn.Module):
    """Prototypes ``weight_g · weight_v / ‖weight_v‖``, row by row; the names are those of `torch.nn.utils.weight_norm`.

    Args:
        dim: D.
        count: K, the number of prototypes.
        fixed_length: keep the lengths `weight_g` at 1.

    Source: Salimans and Kingma, "Weight Normalization", 2016, equation 2.
    """

    def __init__(self, dim: int, count: int, fixed_length: bool = False):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1), requires_grad=not fixed_length)
        self.weight_v = nn.Parameter(torch.empty(count, dim))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)  # that of a linear layer

    def prototypes(self) -> Tensor:
        """[K, D], with gradient."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)
