"""BEiT learns the codes of a tokenizer that was trained here: shapes, minutes on two cores."""

import dataclasses

import pytest
import torch
from safetensors.torch import save_file

from fastssl.data.augmentation import IMAGENET_MEAN, IMAGENET_STD, evaluation
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.eval.reconstruction import reconstruct
from fastssl.methods import beit, dvae
from fastssl.nn.visual_tokens import codes_of_pixels
from fastssl.train.config import Execution
from fastssl.train.trainer import Trainer

RUNS = {dvae: ("shapes", 4), beit: ("shapes:count=1024", 6)}  # images and epochs


def trained(module, config):
    """The method after a few epochs of shapes."""
    images, epochs = RUNS[module]
    config.training.epochs = epochs
    torch.manual_seed(0)
    method = module.build(config)
    loader = Loader(open_source(images), config.augmentation, config.training.batch_size)
    groups = getattr(module, "parameter_groups", None)
    trainer = Trainer(method, config.training, Execution(), len(loader), parameter_groups=groups)
    for epoch in range(epochs):
        batches = loader.epoch(epoch)
        for _ in range(len(loader)):
            trainer.step(batches)
    return method.eval()


@pytest.mark.exhaustive
def test_codes_of_masked_patches_are_predicted_better_than_by_their_frequencies(tmp_path):
    """On held-out images, by the codes around them; and their pictures are nearer to the image than grey is."""
    tokenizer = trained(dvae, dvae.Config.small())
    save_file(tokenizer.state_dict(), tmp_path / "tokenizer.safetensors")
    config = dataclasses.replace(beit.Config.small(), tokenizer=str(tmp_path / "tokenizer.safetensors"))
    config.training.warmup_epochs = 1
    method = trained(beit, config)
    (images,) = next(Loader(open_source("shapes", "test"), evaluation((32, 32), 1.0), 256).epoch(0)).views
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    codes, mask = codes_of_pixels(method.tokenizer, images * std + mean, method.grid), method.masks(torch.arange(256))
    share = torch.bincount(codes.flatten(), minlength=method.tokenizer.vocabulary) / codes.numel()
    entropy = -share.xlogy(share).sum().item()
    with torch.no_grad():
        loss, metrics = method.loss(images, codes.flatten(1), mask)
    accuracy = metrics["code_accuracy"].item()
    print(f"loss {loss:.3f}, entropy {entropy:.3f}; accuracy {accuracy:.3f}, most frequent {share.max():.3f}")
    assert loss < entropy - 0.2
    assert accuracy > share.max() + 0.05
    shown = reconstruct(method, images[:64])
    error, of_grey = ((x - shown.input).abs().mean().item() for x in (shown.filled, shown.masked))
    print(f"error of pictures {error:.4f}, of grey in place of masked patches {of_grey:.4f}")
    assert error < of_grey
