"""Drop-in modules under autocast, torch.compile and DistributedDataParallel, with deepcopy, state dicts, pickles, other
dtypes and the meta device."""

import copy
import io
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.distributed import all_gather, rank
from fastssl.nn import (
    Attention,
    DCLLoss,
    DCLWLoss,
    DINOHead,
    DINOLoss,
    InfoNCELoss,
    KeyQueue,
    MaskedPatchLoss,
    MomentumEncoder,
    NTXentLoss,
    ViT,
    random_masking,
)
from tests.support.ranks import run_ranks


class Masker(nn.Module):
    """`random_masking` as a module, with given noise."""

    def forward(self, x, noise):
        return random_masking(x, 0.75, noise)[0]


class WithMomentumEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.online = nn.Linear(16, 16)
        self.ema = MomentumEncoder(self.online, 0.9)

    def forward(self, x):
        y = self.online(x) * self.ema(x)
        self.ema.update(self.online)
        return y


class WithQueue(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(16))
        self.keys = KeyQueue(16, 12)

    def forward(self, x):
        y = (x * self.scale) @ self.keys.queue.detach().clone().to(x.dtype).T
        self.keys.enqueue(x)
        return y


class WithDINOLoss(nn.Module):
    """A head whose logits are not multiplied out, or are, for two views of a student; the teacher's views are given."""

    def __init__(self, factored):
        super().__init__()
        self.factored = factored
        self.student = DINOHead(16, 9, norm_last_layer=False, hidden_dim=8, bottleneck_dim=6)
        self.criterion = DINOLoss(9)

    def forward(self, student, teacher):
        if self.factored:
            with torch.no_grad():
                teacher = self.student.factored(teacher)
            return self.criterion(teacher, self.student.factored(student))
        with torch.no_grad():
            teacher = self.student(teacher).chunk(2)
        return self.criterion(teacher, self.student(student).chunk(3))


class Case(NamedTuple):
    build: type
    arguments: tuple
    shapes: tuple  # of the floating inputs of forward; those that get a gradient come first
    differentiable: int


CASES = {
    "InfoNCELoss": Case(InfoNCELoss, (16, 12, 0.2), ((5, 16), (5, 16)), 1),
    "InfoNCELoss sharded": Case(lambda: InfoNCELoss(16, 12, 0.2, shard=True), (), ((5, 16), (5, 16)), 1),
    "InfoNCELoss with trained tau": Case(
        lambda: InfoNCELoss(16, 12, nn.Parameter(torch.tensor(0.2))), (), ((5, 16),) * 2, 1
    ),
    "KeyQueue": Case(WithQueue, (), ((5, 16),), 1),
    "NTXentLoss": Case(NTXentLoss, (0.5,), ((5, 16), (5, 16)), 2),
    "DCLLoss": Case(DCLLoss, (0.2,), ((5, 16), (5, 16)), 2),
    "DCLWLoss": Case(DCLWLoss, (0.2,), ((5, 16), (5, 16)), 2),
    "MomentumEncoder": Case(WithMomentumEncoder, (), ((5, 16),), 1),
    "Attention": Case(lambda: Attention(16, 2, qkv_bias=True, qk_norm=True), (), ((2, 7, 16),), 1),
    "MaskedPatchLoss": Case(lambda: MaskedPatchLoss(4, True, masked=3), (), ((2, 3, 48), (2, 3, 8, 12)), 1),
    "random_masking": Case(Masker, (), ((2, 8, 16), (2, 8)), 1),
    "DINOLoss": Case(WithDINOLoss, (True,), ((6, 16), (4, 16)), 1),
    "DINOLoss of logits": Case(WithDINOLoss, (False,), ((6, 16), (4, 16)), 1),
    "ViT": Case(lambda: ViT((8, 12), 4, embed_dim=16, depth=1, num_heads=2), (), ((2, 3, 8, 12),), 1),
}


def build(name, dtype=torch.float32, device="cpu"):
    case = CASES[name]
    torch.manual_seed(0)
    with torch.device(device):
        module = case.build(*case.arguments).to(dtype)
        inputs = [torch.randn(shape).to(dtype) for shape in case.shapes]
        if name == "MaskedPatchLoss":  # forward(imgs, pred, ids)
            inputs.append(torch.tensor([[0, 1, 3], [2, 4, 5]]))
    return module, inputs


def arguments_of(name, inputs):
    return (inputs[1], inputs[0], inputs[2]) if name == "MaskedPatchLoss" else inputs


def outputs_and_gradients(name, call, inputs):
    """The output and the gradients of the differentiable inputs."""
    leaves = [x.clone().requires_grad_() for x in inputs[: CASES[name].differentiable]]
    out = call(*arguments_of(name, [*leaves, *inputs[len(leaves) :]]))
    out.float().square().sum().backward()
    return [out.detach(), *(x.grad for x in leaves)]


def state_of(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


@pytest.mark.parametrize("name", CASES)
def test_deepcopy_state_dict_and_pickle(name):
    module, inputs = build(name)
    outputs_and_gradients(name, module, inputs)  # so that queues and momentum encoders differ from fresh ones
    copies = [copy.deepcopy(module), build(name)[0]]
    copies[1].load_state_dict(module.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    copies.append(torch.load(buffer, weights_only=False))
    for duplicate in copies:
        torch.testing.assert_close(duplicate.state_dict(), module.state_dict(), rtol=0, atol=0)
        before = state_of(module)
        torch.testing.assert_close(
            outputs_and_gradients(name, duplicate, inputs),
            outputs_and_gradients(name, copy.deepcopy(module), inputs),
            rtol=0,
            atol=0,
        )
        torch.testing.assert_close(state_of(module), before, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_other_dtypes(name, dtype):
    if name == "MomentumEncoder" and dtype == torch.bfloat16:  # an average in bfloat16 would not move
        with pytest.raises(TypeError, match=r"ema_update_: targets.* must be float32 or float64"):
            outputs_and_gradients(name, *build(name, dtype))
        return
    (plain, inputs), (module, converted) = build(name), build(name, dtype)
    tensors = [*module.parameters(), *module.buffers(), *(v for v in vars(module).values() if torch.is_tensor(v))]
    assert all(x.dtype == dtype for x in tensors if x.is_floating_point())
    result, expected = outputs_and_gradients(name, module, converted), outputs_and_gradients(name, plain, inputs)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float64 else {"rtol": 0.1, "atol": 0.15}
    for tensor, reference in zip(result, expected):
        torch.testing.assert_close(tensor.float(), reference, **close)


@pytest.mark.parametrize("name", CASES)
def test_autocast(name):
    (module, inputs), (plain, _) = build(name), build(name)
    expected = outputs_and_gradients(name, plain, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        result = outputs_and_gradients(name, module, inputs)
    losses = name.startswith(("InfoNCE", "NTXent", "MaskedPatch", "DCL"))
    wide = losses or name.startswith(("random_masking", "ViT", "DINOLoss"))  # which ends in a LayerNorm
    assert result[0].dtype == (torch.float32 if wide else torch.bfloat16)
    for tensor, reference in zip(result, expected):
        exact = {"rtol": 1e-6, "atol": 1e-7} if losses else {"rtol": 0.1, "atol": 0.15}  # losses stay in float32
        torch.testing.assert_close(tensor.float(), reference, **exact)


@pytest.mark.parametrize("name", CASES)
def test_compiles_in_one_graph(name):
    (module, inputs), (plain, _) = build(name), build(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(3):  # queues and momentum encoders change
        expected, result = outputs_and_gradients(name, plain, inputs), outputs_and_gradients(name, compiled, inputs)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.state_dict(), plain.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_meta_device(name):
    module, inputs = build(name, device="meta")
    assert all(x.is_meta for x in module.state_dict().values())
    real, real_inputs = build(name)
    result = module(*arguments_of(name, inputs))
    expected = real(*arguments_of(name, real_inputs))
    assert result.is_meta
    assert (result.shape, result.dtype) == (expected.shape, expected.dtype)
    real.load_state_dict(real.state_dict())
    module.to_empty(device="cpu").load_state_dict(real.state_dict())
    torch.testing.assert_close(module.state_dict(), real.state_dict(), rtol=0, atol=0)


class Scaled(nn.Module):
    """A module with a trained factor for its inputs, so that DistributedDataParallel has a gradient to average."""

    def __init__(self, name):
        super().__init__()
        self.name, (self.inner, _) = name, build(name)
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *inputs):
        first = CASES[self.name].differentiable
        scaled = [x * self.weight if i < first else x for i, x in enumerate(inputs)]
        return self.inner(*arguments_of(self.name, scaled))


def gradients_under_ddp():
    results = {}
    for name in CASES:
        model = Scaled(name)
        parallel = DistributedDataParallel(model)
        inputs = build(name)[1]
        inputs[0] = inputs[0] * (1 + rank())
        parallel(*inputs).square().mean().backward()
        alone = Scaled(name)
        alone(*inputs).square().mean().backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        mean = {
            key: all_gather(p.grad.unsqueeze(0)).mean(0) for key, p in alone.named_parameters() if p.grad is not None
        }
        results[name] = (gradients, mean)
    return results


def test_distributed_data_parallel_averages_the_gradients():
    """A sharded queue contrasts with the keys of both ranks, as the copies of one that is not sharded do."""
    for results in run_ranks(2, gradients_under_ddp):
        assert results.keys() == CASES.keys()
        for gradients, mean in results.values():
            torch.testing.assert_close(gradients, mean, rtol=1e-5, atol=1e-7)
