import pytest
import torch
import torch.nn.functional as F

from fastssl.nn.predictive import CPCLoss, DrawnCPCLoss, PixelCNN
from tests.support.contract import refused
from tests.support.golden import part, read
from tests.support.memory import peak_memory
from tests.support.ranks import run_ranks


def test_golden_loss_with_all_candidates():
    """The sum over two offsets, and gradients of features and context, in float64."""
    golden, meta = read("cpc")
    steps = meta["v2"]["steps"]
    criterion = CPCLoss(8, tuple(step + 1 for step in steps), 5, meta["v2"]["emb_scale"]).double()
    state = {f"predict.{i}.weight": golden[f"v2.state.predict{step}.weight"] for i, step in enumerate(steps)}
    criterion.load_state_dict({**state, "target.weight": golden["v2.state.target.weight"]})
    inputs = [golden[f"v2.input.{name}"].double().requires_grad_() for name in ("latents", "context")]
    loss = criterion(*(x.permute(0, 3, 1, 2) for x in inputs))
    torch.testing.assert_close(loss, golden["v2.loss"], rtol=1e-9, atol=1e-9)
    for gradient, name in zip(torch.autograd.grad(loss, inputs), ("latents", "context")):
        torch.testing.assert_close(gradient, golden[f"v2.grad.{name}"], rtol=1e-9, atol=1e-9)


def golden_drawn(golden, offsets, batch, columns):
    """Drawn rows of the golden file, which number targets by row, column and image, as ours: image, row, column."""
    drawn = []
    for k, offset in enumerate(offsets):
        rows, numbers = 7 - offset, golden[f"v1.negatives{k}"]
        image, place = numbers % batch, numbers // batch
        ours = (image * rows * columns + place).view(rows, columns, batch, -1)  # of contexts in the same order
        drawn.append(ours.permute(2, 0, 1, 3).flatten(0, 2))
    return drawn


def test_golden_loss_with_drawn_candidates():
    golden, meta = read("cpc")
    meta = meta["v1"]
    offsets = tuple(k + 1 + meta["skip_step"] for k in range(meta["prediction_steps"]))
    criterion = DrawnCPCLoss(6, offsets, meta["negatives"]).double()
    state = part(golden, "v1.state.W_k.")
    criterion.load_state_dict({f"predict.{name}": x.flatten(1) for name, x in state.items()})
    z, c = (golden[f"v1.input.{name}"].double().requires_grad_() for name in "zc")
    loss = criterion(z, c, golden_drawn(golden, offsets, meta["B"], meta["grid"][1]))
    loss.backward()
    exact = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(loss.detach(), golden["v1.loss"], **exact)
    for x, name in ((z, "z"), (c, "c")):
        torch.testing.assert_close(x.grad, golden[f"v1.grad.{name}"], **exact)
    for k, layer in enumerate(criterion.predict):
        torch.testing.assert_close(layer.weight.grad, golden[f"v1.grad.W_k.{k}.weight"].flatten(1), **exact)


def test_all_candidates_are_told_by_cross_entropy_with_labels():
    """The appendix's form, with a label for each prediction."""
    latents, context = torch.randn(2, 3, 8, 6, 4, dtype=torch.float64).unbind()
    criterion = CPCLoss(8, (1, 4), 5).double()
    targets = criterion.target(latents.permute(0, 2, 3, 1)).flatten(0, 2)
    total = 0.0
    for offset, predict in zip((1, 4), criterion.predict):
        image, row, column = torch.meshgrid(torch.arange(3), torch.arange(6 - offset), torch.arange(4), indexing="ij")
        labels = ((image * 6 + row + offset) * 4 + column).flatten()
        predictions = predict(context.permute(0, 2, 3, 1)[:, :-offset]).flatten(0, 2)
        total = total + F.cross_entropy(predictions @ targets.T * 0.1, labels)
    torch.testing.assert_close(criterion(latents, context), total, rtol=1e-12, atol=1e-12)


def test_a_context_sees_its_row_and_the_rows_above():
    network, x = PixelCNN(8, 16, 3), torch.randn(1, 8, 7, 7, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[0, :, 4, 3].sum(), x)
    seen = gradient[0].abs().sum(0) > 0
    assert seen[1:5].any(1).all() and not seen[5:].any() and not seen[0].any()


def test_draws_depend_on_seeds_and_lie_in_the_batch():
    criterion, seeds = DrawnCPCLoss(4, (1, 2), 16), torch.tensor([3, 4, 5])
    drawn = criterion.draw(seeds, 4, 5)
    assert [tuple(x.shape) for x in drawn] == [(45, 16), (30, 16)]
    assert [int(x.max()) < 45 - 15 * i and int(x.min()) >= 0 for i, x in enumerate(drawn)] == [True, True]
    assert len(drawn[0].unique()) == 45
    assert torch.equal(criterion.draw(seeds, 4, 5)[0], drawn[0])
    assert not torch.equal(criterion.draw(seeds + 1, 4, 5)[0], drawn[0])


def losses_of_ranks(seed):
    """Both losses of half the batch on each of two ranks, and the gradient of all ranks' features."""
    from fastssl.distributed import all_gather, all_sum, rank, world_size

    torch.manual_seed(seed)
    everything, seeds = torch.randn(2, 4, 8, 5, 3, dtype=torch.float64), torch.arange(4)
    criteria = CPCLoss(8, (2, 3), 5).double(), DrawnCPCLoss(8, (1, 2), 4).double()
    share = slice(rank() * 4 // world_size(), (rank() + 1) * 4 // world_size())
    results = []
    for criterion in criteria:
        latents, context = (x[share].clone().requires_grad_() for x in everything)
        drawn = [criterion.draw(seeds[share], 5, 3)] if isinstance(criterion, DrawnCPCLoss) else []
        loss = criterion(latents, context, *drawn)
        gradients = [all_gather(x) / world_size() for x in torch.autograd.grad(loss, (latents, context))]
        results.append([all_sum(loss.detach()) / world_size(), *gradients])
    return results


@pytest.mark.slow
def test_two_ranks_equal_one_process():
    for ours, whole in zip(run_ranks(2, losses_of_ranks, 5)[0], losses_of_ranks(5), strict=True):
        for x, y in zip(ours, whole, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_memory_at_real_sizes():
    """The reference's peaks: 689 MiB for 32 images of 1,024 channels; 4,467 MiB for 25,088 candidates. Here a few
    images of them: neither grows with the number of scores."""
    latents, context = torch.randn(2, 32, 1024, 7, 7).unbind()
    latents.requires_grad_()
    criterion, seeds = DrawnCPCLoss(1024), torch.arange(32)

    def step():
        loss = criterion(latents, context, criterion.draw(seeds, 7, 7))
        return torch.autograd.grad(loss, [latents, *criterion.parameters()])

    features_of_5_offsets_and_weights = 2 * 5 * 32 * 7 * 7 * 1024 * 4 // 2 + 5 * 1024**2 * 4
    assert peak_memory(step) < features_of_5_offsets_and_weights + 70e6


def test_arguments_are_checked():
    sentence = "CPCLoss: offsets must be one or more numbers of rows of at least 1, got [0]"
    refused(sentence, ValueError, CPCLoss, 8, (0,))
    sentence = "CPCLoss: the offsets [2, 5] need a grid of at least 6 rows, got 5"
    refused(sentence, ValueError, CPCLoss(4, (2, 5)), *torch.randn(2, 1, 4, 5, 5).unbind())
