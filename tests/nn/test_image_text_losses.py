"""CLIP's and SigLIP's losses against open_clip's numbers, in one process and over ranks."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import rank, world_size
from fastssl.nn import CLIPLoss, SigLIPLoss
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.ranks import run_ranks

FEATURES = ("image", "text")


class Both(torch.nn.Module):
    """Features and scalars as parameters, so that gradients are averaged as in training."""

    def __init__(self, name: str, golden: dict):
        super().__init__()
        self.name = name
        whole = [golden[f"input.{side}_features"].double() for side in FEATURES]
        local = [x.chunk(world_size())[rank()] for x in whole]
        self.image, self.text = (x.clone().requires_grad_() for x in local)
        start = 1 / 0.07 if name == "clip" else 10.0
        self.logit_scale = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64).log())
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.0).double()) if name == "siglip" else None

    def forward(self):
        if self.name == "clip":
            return CLIPLoss()(self.image, self.text, self.logit_scale.exp())
        return SigLIPLoss()(self.image, self.text, self.logit_scale.exp(), self.logit_bias)


def results(name: str) -> dict:
    """Loss and gradients of this rank; those of the scalars are averaged."""
    golden, _ = read("clip_siglip_losses")
    module = Both(name, golden)
    parallel = DistributedDataParallel(module) if world_size() > 1 else module
    loss = parallel()
    loss.backward()
    scalars = {key: p.grad for key, p in module.named_parameters()}
    return {"loss": loss.detach(), "image": module.image.grad, "text": module.text.grad, **scalars}


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_one_process_has_open_clips_loss_and_gradients(name):
    golden, _ = read("clip_siglip_losses")
    found = results(name)
    whole = part(golden, f"{name}.whole.")
    same(found.pop("loss"), whole.pop("loss"))
    assert {f"grad.{key}" for key in found} == set(whole)
    for key, gradient in found.items():
        same(gradient, whole[f"grad.{key}"])


@pytest.mark.parametrize(("name", "world"), [("clip", 2), ("siglip", 2), ("siglip", 3)])
def test_ranks_have_the_losses_and_gradients_of_the_whole_batch(name, world):
    golden, _ = read("clip_siglip_losses")
    mode = "local1_grad1" if name == "clip" else "bidir"
    found, whole = run_ranks(world, results, name), part(golden, f"{name}.whole.")
    for r, mine in enumerate(found):
        theirs = part(golden, f"world{world}.{name}.{mode}.rank{r}.")
        same(mine["loss"], theirs["loss"])
        for side in FEATURES:  # which no one averages here: the towers' gradients would be
            same(mine[side], theirs[f"grad.{side}"])
        for scalar in ("logit_scale", "logit_bias")[: 1 if name == "clip" else 2]:
            same(mine[scalar], whole[f"grad.{scalar}"])
    same(sum(mine["loss"] for mine in found) / world, whole["loss"])
    for side in FEATURES:
        same(torch.cat([mine[side] for mine in found]) / world, whole[f"grad.{side}"])


def test_calls_of_open_clip():
    images, texts = torch.nn.functional.normalize(torch.randn(2, 5, 8), dim=2)
    scale, bias = torch.tensor(12.0), torch.tensor(-7.0)
    logits = 12 * images @ texts.T
    labels, z = torch.arange(5), 2 * torch.eye(5) - 1
    rows, columns = (torch.nn.functional.cross_entropy(x, labels) for x in (logits, logits.T))
    clip = CLIPLoss()(images, texts, scale, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(clip, (rows + columns) / 2)
    siglip = SigLIPLoss()(images, texts, scale, bias, output_dict=True)["contrastive_loss"]
    torch.testing.assert_close(siglip, -torch.nn.functional.logsigmoid(z * (logits - 7)).sum() / 5)


@pytest.mark.parametrize("criterion", [CLIPLoss(), SigLIPLoss()], ids=["clip", "siglip"])
def test_a_text_of_no_image_is_refused(criterion):
    name = type(criterion).__name__
    for texts in (torch.randn(6, 8), torch.randn(4, 8), torch.randn(5, 7)):
        sentence = f"{name}: text_features must have shape [B=5, D=8], got {list(texts.shape)}"
        refused(sentence, ValueError, criterion, torch.randn(5, 8), texts, 10.0)
