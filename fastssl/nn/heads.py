"""Projection and prediction heads."""

from torch import nn


def moco_v2_head(fc: nn.Linear) -> nn.Sequential:
    """Linear(d, d), ReLU, and the given last layer `fc`, Linear(d, dim) (Chen et al., 2020, MoCo v2, section 3)."""
    return nn.Sequential(nn.Linear(fc.in_features, fc.in_features), nn.ReLU(), fc)


def moco_v3_head(layers: int, dim_in: int, hidden: int, dim_out: int, last_bn: bool = True) -> nn.Sequential:
    """Projector or predictor of MoCo v3: linear layers without bias, with batch norm and ReLU between them, and with
    `last_bn` a batch norm without affine parameters at the end (Chen et al., 2021, section 4.2.2, "MLP heads").
    """
    modules: list[nn.Module] = []
    for i in range(layers):
        last = i == layers - 1
        modules.append(nn.Linear(dim_in if i == 0 else hidden, dim_out if last else hidden, bias=False))
        if not last:
            modules += [nn.BatchNorm1d(hidden), nn.ReLU(inplace=True)]
        elif last_bn:
            modules.append(nn.BatchNorm1d(dim_out, affine=False))
    return nn.Sequential(*modules)
