"""How many dimensions features and embeddings use: RankMe, and signs of a collapse."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.distributed import all_sum

MOST = 4096  # largest number of features of a rank to look at
FLAT = 0.05  # mean standard deviation of a dimension, as a share of 1/√F, below which the features count as collapsed
REDUNDANT = 0.9  # mean squared correlation of an embedding's dimensions, from which they count as redundant
LINE = 0.9  # share of the variance in two directions, from which the features count as collapsed


class Spectrum(NamedTuple):
    """How the features of many images are spread."""

    rankme: float  # effective number of dimensions, 1 to `width`
    width: int  # F
    two_directions: float  # share of the variance of unit features that lies in two directions, 0 to 1
    deviation: float  # mean standard deviation of a dimension of unit features, as a share of 1/√F, 0 to 1

    def text(self) -> str:
        """The numbers as a phrase."""
        return (
            f"RankMe {self.rankme:.3g} of {self.width}; two directions have {self.two_directions:.0%} of the variance; "
            f"standard deviation per dimension {self.deviation:.0%} of 1/√{self.width}"
        )

    def results(self) -> dict[str, float]:
        """Fields of evaluations.jsonl."""
        return {
            "rankme": round(self.rankme, 2),
            "two_directions": round(self.two_directions, 4),
            "deviation": round(self.deviation, 4),
        }

    @property
    def _flat(self) -> bool:
        """Whether two directions, of more than two, hold nearly all of the variance."""
        return self.width > 2 and self.two_directions > LINE

    def warning(self, reconstructs: bool = False) -> str | None:
        """One sentence if the features look collapsed: are nearly equal, or have their variance in two directions.

        Args:
            reconstructs: the method predicts masked patches. Two directions often hold most of the variance of such
                features without a collapse: see `note`.
        """
        if self.deviation < FLAT:
            return (
                f"The features look collapsed: those of all images are nearly equal, with a standard deviation per "
                f"dimension of {self.deviation:.1%} of 1/√{self.width}."
            )
        if self._flat and not reconstructs:
            return (
                f"The features look collapsed: {self.two_directions:.0%} of their variance lies in two of "
                f"{self.width} directions."
            )
        return None

    def note(self, reconstructs: bool) -> str | None:
        """One sentence if a method that predicts masked patches has features with their variance in two directions."""
        if self._flat and reconstructs:
            return (
                f"Two of {self.width} directions hold {self.two_directions:.0%} of the features' variance, as often "
                "where masked patches are predicted; a linear classifier or fine-tuning tells more than kNN."
            )
        return None


@torch.no_grad()
def measure_spectrum(features: Tensor) -> Spectrum:
    """The spectrum of the features of all ranks together; all ranks must call it.

    RankMe is ``exp(−Σ p·log p)``, p = σ / Σ σ, of the singular values σ of the matrix of features. The standard
    deviation of a dimension of unit features is at most 1/√F in the mean, which features that point everywhere reach.

    Args:
        features: [N, F] floating; of more than `MOST` rows evenly spaced ones are taken. N may differ between ranks.

    Raises:
        ValueError: there are no features, or some are not finite.

    Source: Garrido et al., "RankMe: Assessing the Downstream Performance of Pretrained Self-Supervised Representations
    by Their Rank", 2023, equation 1; Chen and He, "Exploring Simple Siamese Representation Learning", 2021, section 4.1
    (the standard deviation).
    """
    x = features[:: max(1, -(-len(features) // MOST))].double()
    unit = F.normalize(x, dim=1)
    count = all_sum(torch.tensor(float(len(x)), dtype=torch.float64, device=x.device))
    gram, second, mean = all_sum(x.T @ x), all_sum(unit.T @ unit), all_sum(unit.sum(0)) / count
    if not count or not gram.isfinite().all():
        raise ValueError(f"spectrum: features must be finite and at least one, got {list(features.shape)}")
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    p = singular / singular.sum().clamp_min(1e-300)
    covariance = second / count - mean.outer(mean)
    variances = torch.linalg.eigvalsh(covariance).clamp_min(0)
    total = variances.sum().clamp_min(1e-300)
    return Spectrum(
        rankme=float(torch.exp(-torch.xlogy(p, p).sum())),
        width=x.shape[1],
        two_directions=float(variances[-2:].sum() / total),
        deviation=float(covariance.diagonal().clamp_min(0).sqrt().mean() * x.shape[1] ** 0.5),
    )


def redundant_embeddings(metrics: list[dict]) -> str | None:
    """One sentence if the dimensions of the embeddings are strongly correlated in the newest epoch.

    Args:
        metrics: records of metrics.jsonl, with "redundancy" (`nn.noncontrastive.redundancy`) where the method should
            keep it small.
    """
    known = [line for line in metrics if line.get("redundancy") is not None]
    if not known:
        return None
    last = math.ceil(known[-1]["epoch"])
    newest = [line["redundancy"] for line in known if math.ceil(line["epoch"]) == last]
    mean = sum(newest) / len(newest)
    if mean < REDUNDANT:
        return None
    return (
        f"The embeddings look redundant: in epoch {last} the mean squared correlation of two of their dimensions is "
        f"{mean:.2f}."
    )
