"""BERT with cross-attention: its modes, padding, sharing of images. tests/methods/test_albef.py has golden numbers."""

import pytest
import torch

from fastssl.nn.bert import BERT_SIZES, BertForMaskedLM
from tests.support.contract import refused


def small(dropout=0.0, **sizes):
    torch.manual_seed(0)
    sizes = {"dim": 16, "depth": 4, "num_heads": 2, "text_depth": 2, "vocabulary": 50, "positions": 12, **sizes}
    return BertForMaskedLM(24, **sizes, dropout=dropout).double()


def texts(*lengths, longest=8):
    ids = torch.randint(1, 50, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    return ids.masked_fill_(torch.arange(longest) >= torch.tensor(lengths)[:, None], 0)


def close(one, two):
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-12)


def test_both_halves_give_the_whole_and_the_head_the_logits():
    model, ids, images = small(), texts(8, 5, 3), torch.randn(3, 6, 24, dtype=torch.float64)
    text = model(ids, mode="text")
    fused = model(text, ids != 0, images, mode="fusion")
    assert torch.equal(fused, model(ids, None, images))
    logits = model(fused[:, 1:3], mode="predict")
    assert logits.shape == (3, 2, 50)
    x = model.cls["predictions"].transform["dense"](fused[:, 1:3])
    x = model.cls["predictions"].transform["LayerNorm"](torch.nn.functional.gelu(x))[1]
    close(logits, x @ model.bert["embeddings"].word_embeddings.weight.T + model.cls["predictions"].bias)


def test_padding_has_no_influence():
    model, ids, images = small(), texts(4, 4), torch.randn(2, 6, 24, dtype=torch.float64)
    close(model(ids, None, images)[:, :4], model(ids[:, :4], None, images))
    everything = torch.ones_like(ids, dtype=torch.bool)
    assert not torch.allclose(model(ids, everything, images)[:, :4], model(ids[:, :4], None, images))


def test_texts_that_share_an_image_equal_a_copy_of_it_for_each():
    """Results, and gradients to weights and images."""
    model, ids = small(), texts(8, 5, 3, 7, 2)
    images, rows = torch.randn(2, 6, 24, dtype=torch.float64, requires_grad=True), torch.tensor([1, 0, 1, 1, 0])
    parameters = [images, *(p for name, p in model.named_parameters() if "crossattention" in name)]
    results = []
    for arguments in ((images, rows), (images[rows], None)):
        out = model(ids, None, *arguments)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), parameters)])
    for one, two in zip(*results):
        close(one, two)


def test_dropout_is_for_training_alone():
    model, ids, images = small(0.3), texts(8, 5), torch.randn(2, 6, 24, dtype=torch.float64)
    assert not torch.equal(model(ids, None, images), model(ids, None, images))
    assert torch.equal(model.eval()(ids, None, images), small().eval()(ids, None, images))


def test_initial_weights_and_numbers_of_parameters():
    """The tied matrix counts once: 123.7 million for BERT base with cross-attention in its upper half."""
    with torch.device("meta"):
        model = BertForMaskedLM(768, *BERT_SIZES["bert_base"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 123.7
    model = small(vocabulary=3000, dim=64)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            assert p.std().item() == pytest.approx(0.02, rel=0.15), name
        else:
            assert (p == ("LayerNorm.weight" in name)).all(), name


def test_refusals():
    model, ids, images = small(), texts(8, 5), torch.randn(3, 6, 24, dtype=torch.float64)
    for sentence, arguments, options in [
        ("BertForMaskedLM: tokens must be at most 12 a text, got 13", (torch.ones(1, 13, dtype=torch.int64),), {}),
        ("BertForMaskedLM: images must be given for mode 'multi_modal', got None", (ids,), {}),
        (
            "BertForMaskedLM: rows must say which image belongs to each text, got 3 images for 2 texts",
            (ids, None, images),
            {},
        ),
        ("BertForMaskedLM: mode must be text, fusion, multi_modal or predict, got 'x'", (ids,), {"mode": "x"}),
    ]:
        refused(sentence, ValueError, model, *arguments, **options)
    refused("BertForMaskedLM: dim must be divisible by num_heads=3, got 16", ValueError, small, num_heads=3)
    refused("BertForMaskedLM: text_depth must be from 1 to 3, got 4", ValueError, small, text_depth=4)
