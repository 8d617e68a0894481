"""Twelve training steps of MAE and MoCo v3 equal those of a reference in plain torch.

The reference is written from the papers and the official code: formulas on a dict of tensors, a copy of the method's
initial state dict. It uses nothing of fastssl. Both sides compute in float64 from the same weights, noise and images,
and differ only by rounding.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.contract import Batch
from fastssl.methods import moco_v3
from fastssl.methods.mae import MAE
from fastssl.train.config import Training
from fastssl.train.optim import build_optimizer
from fastssl.train.schedule import learning_rate
from tests.support.golden import part

STEPS, EPOCHS, WARMUP, BATCH = 12, 4, 1, 8  # three steps per epoch: the warm-up ends during the run
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")

# Rounding of 1e-16 grows in twelve steps to relative errors of 9e-14 in losses and 2e-13 in states: the largest of ten
# seeds of each case, on one and two threads. The bounds are at least ten times that, for other orders of summation.
LOSS = {"rtol": 1e-12, "atol": 0}
STATE = {"rtol": 1e-10, "atol": 1e-11}
# Parameters that do not change the loss: the bias of attention keys, and the bias of the last norm in front of the
# projector's batch norm. Their exact gradient is 0, and AdamW turns rounding errors of 1e-17 into steps of
# lr · 1e-17 / eps, with eps 1e-8. They differ by 7e-11 after twelve steps, and so does the batch norm's running mean.
WITHOUT_EFFECT = ("attn.qkv.bias", "encoder.norm.bias", "encoder.head.1.running_mean")
WITHOUT_EFFECT_STATE = {"rtol": 1e-10, "atol": 1e-9}


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: tensors are too small for a second one to help, and on busy cores it delays them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Layers


def linear(p, name, x):
    x = x @ p[f"{name}.weight"].T
    return x + p[f"{name}.bias"] if f"{name}.bias" in p else x


def layer_norm(p, name, x, eps):
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]


def batch_norm(p, name, x):
    """Training mode: normalises by the batch's biased variance; the running variance is unbiased."""
    dims, column = [d for d in range(x.ndim) if d != 1], (1, -1, *[1] * (x.ndim - 2))
    mean, variance, count = x.mean(dims), x.var(dims, correction=0), x.numel() / x.shape[1]
    with torch.no_grad():
        for key, statistic in (("running_mean", mean), ("running_var", variance * count / (count - 1))):
            p[f"{name}.{key}"].mul_(0.9).add_(0.1 * statistic)
        p[f"{name}.num_batches_tracked"].add_(1)
    x = (x - mean.view(column)) / (variance.view(column) + 1e-5).sqrt()
    if f"{name}.weight" in p:
        x = x * p[f"{name}.weight"].view(column) + p[f"{name}.bias"].view(column)
    return x


def blocks(p, x, heads, eps):
    """Pre-norm transformer blocks: softmax attention, then an MLP with the exact GELU, each with a residual."""
    count = 1 + max(int(name.split(".")[0]) for name in p)
    for b in (part(p, f"{i}.") for i in range(count)):
        n, length, dim = x.shape
        qkv = linear(b, "attn.qkv", layer_norm(b, "norm1", x, eps))
        q, k, v = qkv.view(n, length, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / math.sqrt(dim // heads)).softmax(-1)
        x = x + linear(b, "attn.proj", (weights @ v).transpose(1, 2).reshape(n, length, dim))
        h = linear(b, "mlp.fc1", layer_norm(b, "norm2", x, eps))
        x = x + linear(b, "mlp.fc2", h * (1 + torch.erf(h / math.sqrt(2))) / 2)
    return x


def embed(p, images, patch):
    x = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=patch)
    return x.flatten(2).mT + p["pos_embed"][:, 1:]


# MAE (He et al., 2021, section 3)


def mae_predict(p, images, noise, facts):
    """Predictions of all patches, and the mask: 1 for removed patches."""
    patch, eps = facts["patch"], facts["ln_eps"]
    x = embed(p, images, patch)
    n, length, dim = x.shape
    keep = int(length * (1 - facts["mask_ratio"]))
    shuffled = noise.argsort(1)
    restore = shuffled.argsort(1)
    x = torch.stack([x[i, shuffled[i, :keep]] for i in range(n)])
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(n, 1, dim), x], 1)
    x = linear(p, "decoder_embed", layer_norm(p, "norm", blocks(part(p, "blocks."), x, facts["heads"], eps), eps))
    cls, kept = x[:, :1], x[:, 1:]
    x = torch.cat([kept, p["mask_token"].expand(n, length - keep, -1)], 1)
    x = torch.cat([cls, torch.stack([x[i, restore[i]] for i in range(n)])], 1) + p["decoder_pos_embed"]
    x = layer_norm(p, "decoder_norm", blocks(part(p, "decoder_blocks."), x, facts["decoder_heads"], eps), eps)
    return linear(p, "decoder_pred", x)[:, 1:], (restore >= keep).double()


def mae_loss(p, data, step, facts):
    images, noise = data
    pred, mask = mae_predict(p, images, noise, facts)
    n, channels = images.shape[:2]
    target = F.unfold(images, facts["patch"], stride=facts["patch"]).view(n, channels, -1, pred.shape[1])
    target = target.permute(0, 3, 2, 1).flatten(2)  # pixels of a patch row by row, channels last
    if facts["norm_pix"]:
        variance = target.var(-1, correction=facts["correction"], keepdim=True)
        target = (target - target.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    return ((pred - target).square().mean(-1) * mask).sum() / mask.sum()


# MoCo v3 (Chen et al., 2021, algorithm 1)


def vit(p, images, facts):
    x = embed(p, images, patch=4)
    x = torch.cat([(p["cls_token"] + p["pos_embed"][:, :1]).expand(len(x), -1, -1), x], 1)
    x = blocks(part(p, "blocks."), x, 4, facts["ln_eps"])
    return head(part(p, "head."), layer_norm(p, "norm", x, facts["ln_eps"])[:, 0], 3)


def resnet(p, images, facts):
    """A 3×3 stem of stride 2 without pooling, then one basic block for each of the four widths."""

    def conv(name, norm, x, stride=1):
        weight = p[f"{name}.weight"]
        return batch_norm(p, norm, F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2))

    x = conv("conv1", "bn1", images, 2).relu()
    for layer, stride in (("layer1.0", 1), ("layer2.0", 2), ("layer3.0", 2), ("layer4.0", 2)):
        out = conv(f"{layer}.conv1", f"{layer}.bn1", x, stride).relu()
        out = conv(f"{layer}.conv2", f"{layer}.bn2", out)
        if stride == 2:
            x = conv(f"{layer}.downsample.0", f"{layer}.downsample.1", x, stride)
        x = (out + x).relu()
    return head(part(p, "fc."), x.mean((2, 3)), 2)


def head(p, x, layers, last_bn=True):
    """Projector or predictor: linear layers without bias, batch norm and ReLU between them."""
    for i in range(layers):
        x = linear(p, f"{3 * i}", x)
        if i < layers - 1 or last_bn:
            x = batch_norm(p, f"{3 * i + 1}", x)
        x = x.relu() if i < layers - 1 else x
    return x


def moco_v3_loss(p, views, step, facts):
    """As in the official code: queries first, then the momentum encoder is updated and computes the keys."""
    encoder, tau = facts["encoder"], facts["tau"]
    base, momentum, predictor = (part(p, f"{name}.") for name in ("base_encoder", "momentum_encoder", "predictor"))
    q1, q2 = (head(predictor, encoder(base, x, facts), 2, encoder is vit) for x in views)
    progress = step / STEPS if facts["momentum_rises"] else 0
    m = 1 - 0.5 * (1 + math.cos(math.pi * progress)) * (1 - facts["momentum"])
    with torch.no_grad():
        for name in momentum:
            if not name.endswith(BUFFERS):
                momentum[name].mul_(m).add_((1 - m) * base[name])
        k1, k2 = (encoder(momentum, x, facts) for x in views)

    def contrast(q, k):
        q, k = (x / x.norm(dim=1, keepdim=True) for x in (q, k))
        logits = q @ k.T / tau
        return facts["scale"] * tau * (logits.logsumexp(1) - logits.diagonal()).mean()

    return contrast(q1, k2) + contrast(q2, k1)


# Optimizers and schedule


def adamw(p, gradient, lr, state, facts):
    """Loshchilov and Hutter, 2019, algorithm 2."""
    (beta1, beta2), state["t"] = facts["betas"], state.get("t", 0) + 1
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * gradient
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * gradient**2
    m, v = state["m"] / (1 - beta1 ** state["t"]), state["v"] / (1 - beta2 ** state["t"])
    decay = facts["weight_decay"] if facts["decay_vectors"] or p.ndim > 1 else 0
    return p - lr * decay * p - lr * m / (v.sqrt() + 1e-8)


def lars(p, gradient, lr, state, facts):
    """Without weight decay and scaling of vectors."""
    if p.ndim > 1 or facts["decay_vectors"]:
        gradient = gradient + facts["weight_decay"] * p
        if p.norm() > 0 and gradient.norm() > 0:
            gradient = gradient * 0.001 * p.norm() / gradient.norm()
    state["v"] = 0.9 * state.get("v", 0) + gradient
    return p - lr * state["v"]


def scheduled(lr, step):
    peak, epoch = lr * BATCH / 256, step * EPOCHS / STEPS
    if epoch < WARMUP:
        return peak * epoch / WARMUP
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - WARMUP) / (EPOCHS - WARMUP)))


# Steps of both sides


def ours(model, training, batches, loss_of):
    """Yield the loss of each step, trained like fastssl/train/trainer.py does."""
    optimizer = build_optimizer(model, training)
    for step, data in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(training, step * EPOCHS / STEPS)
        loss = loss_of(data)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.after_step((step + 1) / STEPS)
        yield loss.detach()


def reference(p, batches, loss_of, update, facts):
    """Yield the loss of each step, training `p`."""
    fixed = (*BUFFERS, "pos_embed", *facts["frozen"])
    trained = [name for name in p if not name.endswith(fixed) and not name.startswith("momentum_encoder.")]
    states = {name: {} for name in trained}
    for step, data in enumerate(batches):
        for name in trained:
            p[name] = p[name].detach().requires_grad_()
        loss = loss_of(p, data, step, facts)
        gradients = torch.autograd.grad(loss, [p[name] for name in trained])
        for name, gradient in zip(trained, gradients):
            p[name] = update(p[name].detach(), gradient, scheduled(facts["lr"], step), states[name], facts)
        yield loss.detach()


def assert_replays(model, training, batches, loss_of, transcription):
    """Assert equal losses of every step and equal parameters and buffers after the last; the reference's state.

    Our momentum encoder was then updated once more than the reference's, but with a momentum coefficient of 1.
    """
    reference_loss_of, update, facts = transcription
    initial = {name: x.clone() for name, x in model.state_dict().items()}
    p = {name: x.clone() for name, x in initial.items()}
    both = zip(ours(model, training, batches, loss_of), reference(p, batches, reference_loss_of, update, facts))
    for step, (loss, expected) in enumerate(both):
        torch.testing.assert_close(loss, expected, **LOSS, msg=lambda m, step=step: f"loss of step {step}: {m}")
    assert step == STEPS - 1
    state = model.state_dict()
    assert state.keys() == p.keys()
    for name, x in state.items():
        bounds = WITHOUT_EFFECT_STATE if name.endswith(WITHOUT_EFFECT) else STATE
        torch.testing.assert_close(x, p[name].detach(), **bounds, msg=lambda m, name=name: f"{name}: {m}")
    for name, x in model.named_parameters():
        if x.requires_grad and x.ndim > 1:
            moved = (x.detach() - initial[name]).abs().max()
            assert moved > 1e-3, f"{name} moved by only {moved:.1e}: the comparison would show nothing"
    return p


def mae_case(img_size, norm_pix, **wrong):
    """Arguments of `assert_replays`; `wrong` changes facts of the reference."""
    sizes = {
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 3,
        "decoder_embed_dim": 32,
        "decoder_depth": 2,
        "decoder_num_heads": 2,
    }
    model = MAE(img_size, 4, **sizes, norm_pix_loss=norm_pix, mask_ratio=0.7).double()
    training = Training(EPOCHS, BATCH, "adamw", lr=0.05, weight_decay=0.05, betas=(0.9, 0.95), warmup_epochs=WARMUP)
    facts = {
        "patch": 4,
        "heads": 3,
        "decoder_heads": 2,
        "ln_eps": 1e-6,
        "mask_ratio": 0.7,
        "norm_pix": norm_pix,
        "correction": 1,
        "frozen": (),
        "lr": 0.05,
        "weight_decay": 0.05,
        "betas": (0.9, 0.95),
        "decay_vectors": False,
    }
    batches = [(torch.randn(BATCH, 3, *img_size).double(), torch.rand(BATCH, model.length)) for _ in range(STEPS)]
    return model, training, batches, lambda data: model.loss(*data), (mae_loss, adamw, facts | wrong)


def moco_v3_case(backbone, **wrong):
    """The same for MoCo v3: a ViT with AdamW, with weight decay of vectors, or a ResNet with LARS, without it."""
    is_vit = backbone == "vit_mini"
    size, tau = ((8, 16), 0.2) if is_vit else ((32, 32), 1.0)
    optimizer, lr, decay = ("adamw", 0.05, 0.1) if is_vit else ("lars", 32.0, 0.01)
    training = Training(EPOCHS, BATCH, optimizer, lr, decay, decay_all=is_vit, warmup_epochs=WARMUP)
    config = moco_v3.Config(backbone, size, dim=32, hidden=64, tau=tau, ema_momentum=0.9, training=training)
    model = moco_v3.build(config).double()
    facts = {
        "encoder": vit if is_vit else resnet,
        "ln_eps": 1e-6,
        "tau": tau,
        "scale": 2,
        "momentum": 0.9,
        "momentum_rises": True,
        "frozen": ("patch_embed.proj.weight", "patch_embed.proj.bias"),
        "lr": lr,
        "weight_decay": decay,
        "betas": (0.9, 0.999),
        "decay_vectors": is_vit,
    }
    batches = [tuple(torch.randn(2, BATCH, 3, *size).double()) for _ in range(STEPS)]
    transcription = (moco_v3_loss, adamw if is_vit else lars, facts | wrong)
    return model, training, batches, lambda views: model(Batch(views, None, None))[0], transcription


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("img_size", [(16, 16), (12, 20)])
def test_mae(img_size, norm_pix):
    model, _, batches, _, (*_, facts) = case = mae_case(img_size, norm_pix)
    p = assert_replays(*case)
    pred, mask = model.reconstruct(*batches[0])
    expected, removed = mae_predict(p, *batches[0], facts)
    assert torch.equal(mask.double(), removed)
    torch.testing.assert_close(pred[mask > 0], expected[mask > 0], **STATE)


def test_moco_v3_with_a_vit_and_adamw():
    case = moco_v3_case("vit_mini")
    embedding = case[0].base_encoder.patch_embed.proj
    initial = embedding.weight.clone(), embedding.bias.clone()
    assert_replays(*case)
    assert torch.equal(embedding.weight, initial[0])
    assert torch.equal(embedding.bias, initial[1])


def test_moco_v3_with_a_resnet_and_lars():
    assert_replays(*moco_v3_case("resnet_mini"))


@pytest.mark.parametrize(
    ("case", "arguments", "wrong"),
    [
        (mae_case, ((16, 16), True), {"ln_eps": 1e-5}),
        (mae_case, ((16, 16), True), {"correction": 0}),  # biased variance of a patch's pixels
        (mae_case, ((16, 16), True), {"decay_vectors": True}),
        (moco_v3_case, ("vit_mini",), {"ln_eps": 1e-5}),
        (moco_v3_case, ("vit_mini",), {"momentum_rises": False}),
        (moco_v3_case, ("vit_mini",), {"scale": 1}),
        (moco_v3_case, ("vit_mini",), {"frozen": ()}),
        (moco_v3_case, ("vit_mini",), {"decay_vectors": False}),
        (moco_v3_case, ("resnet_mini",), {"decay_vectors": True}),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_wrong_reference_fails(case, arguments, wrong):
    with pytest.raises(AssertionError, match="loss of step"):
        assert_replays(*case(*arguments, **wrong))
