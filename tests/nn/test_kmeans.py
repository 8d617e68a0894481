"""k-means, whitening and the memory of embeddings, in one process and over ranks."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.distributed import rank, world_size
from fastssl.nn.embedding_memory import EmbeddingMemory
from fastssl.nn.kmeans import k_means, nearest_centroid, random_rows, whitened
from tests.support.contract import rejects
from tests.support.golden import read
from tests.support.ranks import run_ranks

EXACT = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("head", range(3))
def test_golden_spherical_k_means(head):
    """Three heads of DeepCluster-v2, the last with emptied clusters and equal rows."""
    golden, meta = read("deepcluster_v2")
    x = golden["input.memory_embeddings"][head % 2].double()
    initial = x[golden[f"head{head}.initial_rows"]]
    centroids, nearest = k_means(x, initial, meta["kmeans_iterations"])
    torch.testing.assert_close(centroids, golden[f"head{head}.centroids"], **EXACT)
    assignments = torch.full((meta["dataset"],), -100)
    assignments[golden["input.memory_index"]] = nearest
    assert torch.equal(assignments, golden["assignments"][head])


def blobs(count=60, dtype=torch.float64):
    """Rows around four distant centres, and the number of each row's centre."""
    generator = torch.Generator().manual_seed(2)
    centres = torch.randn(4, 5, generator=generator, dtype=dtype) * 10
    number = torch.arange(count) % 4
    return centres[number] + 0.1 * torch.randn(count, 5, generator=generator, dtype=dtype), number


def test_euclidean_k_means_finds_clusters_and_refills_empty_ones():
    x, number = blobs()
    far = torch.full((2, 5), 1e3, dtype=x.dtype)  # nearest to no row: put beside large clusters
    centroids, nearest = k_means(x, torch.cat([x[:2], far]), 20, spherical=False)
    assert (torch.bincount(nearest, minlength=4) > 0).all()
    best = torch.cdist(x, centroids).argmin(1)
    assert torch.equal(nearest, best)
    for cluster in range(4):
        torch.testing.assert_close(centroids[cluster], x[nearest == cluster].mean(0), **EXACT)
    exact, nearest = k_means(x, x[:4], 20, spherical=False)
    assert torch.equal(nearest, number) and exact.isfinite().all()


def test_tiles_change_nothing(monkeypatch):
    x, _ = blobs()
    expected = nearest_centroid(x, x[:7]), nearest_centroid(x, x[:7], spherical=False)
    monkeypatch.setattr("fastssl.nn.kmeans.PRODUCTS", 20)
    assert torch.equal(nearest_centroid(x, x[:7]), expected[0])
    assert torch.equal(nearest_centroid(x, x[:7], spherical=False), expected[1])
    assert nearest_centroid(x[:0], x[:7]).shape == (0,)


def test_whitened_rows_are_those_of_the_formula():
    x, _ = blobs()
    x = torch.cat([x, x[:, :1] + x[:, 1:2]], 1)  # of rank 5
    y = whitened(x, 6)
    centred = x - x.mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    expected = F.normalize(u[:, :5] * len(x) ** 0.5, dim=1)
    torch.testing.assert_close(y[:, :5].abs(), expected.abs(), rtol=1e-6, atol=1e-8)  # the signs are free
    assert y[:, 5].eq(0).all() and s[5] < 1e-9 * s[0]
    assert whitened(x.float(), 3).dtype == torch.float32
    rejects("whitened", "dim", "7", ValueError, whitened, x, 7)


def test_half_precision_is_computed_in_float32_also_under_autocast():
    x, _ = blobs(dtype=torch.float32)
    expected = k_means(x, x[:4], 3), whitened(x, 3)
    with torch.autocast("cpu", torch.bfloat16):
        (centroids, nearest), white = k_means(x, x[:4], 3), whitened(x, 3)
    assert torch.equal(centroids, expected[0][0]) and torch.equal(nearest, expected[0][1])
    assert torch.equal(white, expected[1])
    assert k_means(x.bfloat16(), x[:4], 3)[0].dtype == torch.float32


def test_random_rows_are_different_rows():
    x = torch.arange(20.0)[:, None].repeat(1, 3)
    rows = random_rows(x, 20)
    assert rows[:, 0].sort().values.tolist() == list(range(20)) and rows[:, 0].tolist() != list(range(20))
    torch.manual_seed(3)
    expected = x[torch.randperm(20)[:5]]
    torch.manual_seed(3)
    assert torch.equal(random_rows(x, 5), expected)
    rejects("random_rows", "count", "21", ValueError, random_rows, x, 21)


def test_bad_arguments_are_refused():
    x = torch.randn(4, 3)
    rejects("k_means", "rounds", "0", ValueError, k_means, x, x, 0)
    rejects("k_means", "centroids", "[4, 3] and [4, 2]", ValueError, k_means, x, x[:, :2], 1)


def clustered(sizes):
    """Centroids and nearest of this rank's rows, which are every other one or unequal parts."""
    x, _ = blobs()
    numbers = torch.arange(len(x)).split(sizes)[rank()] if world_size() > 1 else torch.arange(len(x))
    torch.manual_seed(7)
    x = x[numbers]
    first = random_rows(x, 6, numbers)
    far = torch.full((1, 5), 1e3, dtype=x.dtype)
    spherical = k_means(x, first, 5)
    euclidean = k_means(
        whitened(x, 4).abs(), torch.cat([random_rows(whitened(x, 4).abs(), 3, numbers), far[:, :4]]), 5, False
    )
    return numbers, first, *spherical, *euclidean


@pytest.mark.parametrize("sizes", [(30, 30), (7, 53), (0, 60)])
def test_two_ranks_equal_one_process(sizes):
    _, *expected = clustered(sizes)
    results = run_ranks(2, clustered, sizes)
    for i in (0, 1, 3):  # first rows, centroids
        for result in results:
            torch.testing.assert_close(result[1 + i], expected[i], **EXACT)
    for i in (2, 4):  # nearest
        assert torch.equal(torch.cat([result[1 + i] for result in results]), expected[i])


def filled_memory():
    """A memory of three steps of four images, of which this rank has its share."""
    generator = torch.Generator().manual_seed(1)
    embeddings, index = torch.randn(2, 12, 3, generator=generator), torch.randperm(12, generator=generator)
    memory, batch = EmbeddingMemory(2, 3), 4 // world_size()
    memory.resize(3, batch)
    for step in range(4):  # the first rows are overwritten
        rows = (step % 3) * 4 + rank() * batch + torch.arange(batch)
        memory.write(embeddings[:, rows] + step // 3, index[rows])
    return memory


def saved_and_loaded(state):
    memory = filled_memory()
    saved = {name: x.clone() for name, x in memory.state_dict().items()}
    other = EmbeddingMemory(2, 3)
    other.load_state_dict(state)
    same = all(torch.equal(getattr(memory, name), getattr(other, name)) for name in ("embeddings", "index"))
    return saved, same and (memory.batch, memory.place) == (other.batch, other.place), memory.numbers(), len(memory)


def test_a_memory_over_ranks_saves_and_loads_that_of_one_process():
    memory = filled_memory()
    state = memory.state_dict()
    assert len(memory) == 12 and memory.place == 4 and state["place"].tolist() == [4, 4]
    results = run_ranks(2, saved_and_loaded, state)
    for saved, same, _, length in results:
        assert same and length == 6
        assert all(torch.equal(saved[name], state[name]) for name in state)
    assert sorted(torch.cat([numbers for _, _, numbers, _ in results]).tolist()) == list(range(12))
    assert torch.equal(memory.index[results[1][2]], state["index"].view(3, 2, 2)[:, 1].flatten())


def test_an_empty_memory_is_saved_and_a_row_that_is_not_finite_is_not_written():
    memory, other = EmbeddingMemory(2, 3), EmbeddingMemory(2, 3)
    other.load_state_dict(memory.state_dict())
    assert len(other) == 0
    memory.resize(1, 2)
    memory.write(torch.ones(2, 2, 3), torch.tensor([5, 6]))
    z = torch.full((2, 2, 3), 2.0)
    z[1, 0, 2] = torch.nan
    memory.write(z, torch.tensor([7, 8]))
    assert memory.index.tolist() == [5, 8] and memory.embeddings[:, :, 0].tolist() == [[1, 2], [1, 2]]
    with pytest.raises(TypeError, match="no call"):
        memory(z)
    state = filled_memory().state_dict()
    with pytest.raises(ValueError, match=r"^EmbeddingMemory: the rows to load must be \[2, R, 4\]"):
        EmbeddingMemory(2, 4).load_state_dict(state)
