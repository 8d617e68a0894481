"""Projection and prediction heads."""

from typing import Literal

from torch import nn


def moco_v2_head(fc: nn.Linear) -> nn.Sequential:
    """Linear(d, d), ReLU, and the given last layer `fc`, Linear(d, dim) (Chen et al., 2020, MoCo v2, section 3)."""
    return nn.Sequential(nn.Linear(fc.in_features, fc.in_features), nn.ReLU(), fc)


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
        modules += [nn.Linear(dim_in, dim, bias=bias), nn.BatchNorm1d(dim), nn.ReLU(inplace=True)]
    modules.append(nn.Linear(dims[-2], dim_out, bias=last_bias))
    if last_norm != "none":
        norm = nn.BatchNorm1d(dim_out, affine=last_norm == "scale")
        if last_norm == "scale":
            norm.bias.requires_grad_(False)
        modules.append(norm)
    return nn.Sequential(*modules)
