import copy

import torch
import torch.nn.functional as F
from torch import nn

from fastssl.nn.heads import moco_v3_head
from fastssl.nn.twin import MomentumTwin
from fastssl.ops import batch_info_nce
from tests.golden.golden import part, read


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def test_update_is_the_formula_and_leaves_buffers_alone():
    module = net()
    twin = MomentumTwin(module, 0.9)
    with torch.no_grad():
        module[0].weight.add_(1)
    module[1].running_mean.fill_(5)
    before = copy.deepcopy(twin.state_dict())
    twin.update(module)
    torch.testing.assert_close(twin.state_dict()["0.weight"], 0.9 * before["0.weight"] + 0.1 * module[0].weight.data)
    assert torch.equal(twin.state_dict()["1.running_mean"], before["1.running_mean"])
    twin.update(module, momentum=0.0)
    assert torch.equal(twin.state_dict()["0.weight"], module[0].weight)


def test_names_are_those_of_the_module():
    holder = nn.Module()
    holder.encoder_k = MomentumTwin(net())
    assert list(holder.state_dict()) == [f"encoder_k.{name}" for name in net().state_dict()]
    holder.load_state_dict(holder.state_dict(), strict=True)
    MomentumTwin(net()).load_state_dict(net().state_dict(), strict=True)


def test_twin_is_copied_and_gives_no_gradient():
    module = net()
    twin = copy.deepcopy(MomentumTwin(module))
    assert not any(p.requires_grad for p in twin.parameters())
    assert all(p.requires_grad for p in module.parameters())
    assert not twin(torch.randn(5, 3, requires_grad=True)).requires_grad
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


class Encoder(nn.Module):
    """The golden file's encoder: body, ReLU, projector."""

    def __init__(self, mlp_dim, dim):
        super().__init__()
        self.body = nn.Linear(20, 32)
        self.head = moco_v3_head(3, 32, mlp_dim, dim)

    def forward(self, x):
        return self.head(F.relu(self.body(x)))


def test_three_golden_steps_of_moco_v3():
    """Heads, twin and loss put together as in the paper's algorithm 1."""
    golden, meta = read("moco_v3_vit")
    tau = meta["temperature"]
    model = nn.Module()
    model.base_encoder = Encoder(meta["mlp_dim"], meta["dim"])
    model.momentum_encoder = MomentumTwin(model.base_encoder, meta["momentum"])
    model.predictor = moco_v3_head(2, meta["dim"], meta["mlp_dim"], meta["dim"])
    model.load_state_dict(part(golden, "state."), strict=True)
    model.double()
    trained = [*model.base_encoder.parameters(), *model.predictor.parameters()]
    optimizer = torch.optim.SGD(trained, lr=meta["sgd_lr"])
    for step in range(3):
        expected = part(golden, f"step{step}.")
        x1, x2 = expected["x1"].double(), expected["x2"].double()
        q1, q2 = (F.normalize(model.predictor(model.base_encoder(x)), dim=1) for x in (x1, x2))
        model.momentum_encoder.update(model.base_encoder)
        k1, k2 = (F.normalize(model.momentum_encoder(x), dim=1) for x in (x1, x2))
        loss = 2 * tau * sum(batch_info_nce(q, k, tau).loss.mean() for q, k in ((q1, k2), (q2, k1)))
        loss.backward()
        torch.testing.assert_close(loss.detach(), expected["loss"][0], rtol=1e-9, atol=1e-9)
        for key, value in part(expected, "grad.").items():
            torch.testing.assert_close(model.get_parameter(key).grad, value, rtol=1e-8, atol=1e-9)
        for key, value in part(expected, "momentum_encoder.").items():
            torch.testing.assert_close(model.momentum_encoder.state_dict()[key], value, rtol=1e-9, atol=1e-9)
        optimizer.step()
        optimizer.zero_grad()
