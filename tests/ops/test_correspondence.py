import pytest
import torch
import torch.nn.functional as F

from fastssl.ops import correspondence as module
from fastssl.ops import dense_match
from tests.support.close import assert_same
from tests.support.contract import compiles, opcheck, refused, rejects
from tests.support.golden import part, read
from tests.support.memory import peak_memory


def formula(q, k):
    return (F.normalize(q, dim=1).mT @ F.normalize(k, dim=1)).argmax(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "width", "places"), [(1, 1, (1, 1)), (70, 16, (9, 7)), (33, 5, (4, 49)), (0, 3, (2, 2))]
)
def test_it_is_the_largest_cosine(batch, width, places, dtype):
    q, k = (torch.randn(batch, width, count).to(dtype) for count in places)
    assert_same(dense_match(q, k), formula(q.double(), k.double()))


def test_golden_matches():
    """Places that the reference matched, from its similarities: features whose products they are."""
    golden, _ = read("densecl")
    expected = part(golden, "step0.")
    similarity = expected["backbone_similarity"]
    q = torch.eye(9, dtype=torch.float64).expand(4, 9, 9)
    assert torch.equal(similarity.argmax(2), expected["match"])
    unit = similarity.mT / similarity.mT.norm(dim=1, keepdim=True)
    assert torch.equal(dense_match(q, unit), unit.argmax(2))


def test_the_first_of_equal_places_is_taken_and_lengths_do_not_matter():
    q, k = torch.randn(2, 8, 5), torch.randn(2, 8, 3)
    assert torch.equal(dense_match(q, torch.cat([k, k], 2)), dense_match(q, k))
    scale = torch.rand(2, 1, 3) + 0.1
    assert torch.equal(dense_match(7 * q, scale * k), dense_match(q, k))
    assert torch.equal(dense_match(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3)), torch.zeros(1, 2, dtype=torch.int64))


def test_it_has_no_gradient_and_takes_any_strides():
    maps = torch.randn(3, 6, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    index = dense_match(maps.flatten(2), maps.flatten(2))
    assert not index.requires_grad
    assert_same(index, torch.arange(16).expand(3, 16))


def test_similarities_of_32_images_are_in_memory_whatever_the_batch():
    def peak(batch):
        q, k = torch.randn(2, batch, 64, 49).unbind()
        return peak_memory(lambda: dense_match(q, k)) - batch * 49 * 8  # the result

    assert peak(128) <= peak(32) + 4096
    assert peak(128) < 3 * 32 * 64 * 49 * 4


def test_contract():
    opcheck(module._dense_match, torch.randn(3, 4, 5), torch.randn(3, 4, 6))
    compiles(lambda q, k: dense_match(q, k) + 1, torch.randn(3, 4, 5), torch.randn(3, 4, 6))


def test_lightlys_index():
    utils = pytest.importorskip("lightly.models.utils")
    x, y = torch.randn(2, 3, 9, 16).unbind()
    assert torch.equal(dense_match(x.mT, y.mT), utils.most_similar_index(x, y))


def test_arguments_are_checked():
    q, k = torch.randn(2, 3, 4), torch.randn(2, 3, 5)
    rejects("dense_match", "q", "[2, 3]", ValueError, dense_match, q[..., 0], k)
    rejects("dense_match", "k", "[1, 3, 5]", ValueError, dense_match, q, k[:1])
    rejects("dense_match", "k", "int64", TypeError, dense_match, q, k.long())
    sentence = "dense_match: k must have at least one place, got shape [2, 3, 0]"
    refused(sentence, ValueError, dense_match, q, k[..., :0])
