"""ALBEF's training in plain torch, written from the facts about its code: dense logits, one pass for each use, the
momentum encoders updated inside the forward pass. It shares no module with the package.

`run_albef` takes a state dict with the official names and returns what it has become, with the losses of each step.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
PARTS = ("visual_encoder", "text_encoder", "vision_proj", "text_proj")


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | float = 0.0) -> Tensor:
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def layer(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + eps).sqrt() * state[f"{name}.weight"] + state[f"{name}.bias"]


def vit(state: State, name: str, images: Tensor, heads: int) -> Tensor:
    weight, bias = state[f"{name}.patch_embed.proj.weight"], state[f"{name}.patch_embed.proj.bias"]
    x = F.conv2d(images, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{name}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{name}.pos_embed"]
    for i in range(sum(key.startswith(f"{name}.blocks.") and key.endswith(".norm1.weight") for key in state)):
        block = f"{name}.blocks.{i}"
        q, k, v = layer(state, f"{block}.attn.qkv", norm(state, f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + layer(state, f"{block}.attn.proj", attention(q, k, v, heads))
        hidden = F.gelu(layer(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x, 1e-6)))
        x = x + layer(state, f"{block}.mlp.fc2", hidden)
    return norm(state, f"{name}.norm", x, 1e-6)


def embeddings(state: State, name: str, ids: Tensor) -> Tensor:
    part = f"{name}.bert.embeddings"
    x = state[f"{part}.word_embeddings.weight"][ids] + state[f"{part}.token_type_embeddings.weight"][0]
    x = x + state[f"{part}.position_embeddings.weight"][torch.arange(ids.shape[1])]
    return norm(state, f"{part}.LayerNorm", x, 1e-12)


def bert_layer(state: State, name: str, x: Tensor, mask: Tensor, heads: int, images: Tensor | None) -> Tensor:
    bias = (1 - mask.to(x.dtype))[:, None, None] * -10000
    for part, source, added in (("attention", x, bias), ("crossattention", images, 0.0)):
        if source is None:
            continue
        source = x if part == "attention" else source
        q = layer(state, f"{name}.{part}.self.query", x)
        k, v = (layer(state, f"{name}.{part}.self.{key}", source) for key in ("key", "value"))
        out = layer(state, f"{name}.{part}.output.dense", attention(q, k, v, heads, added))
        x = norm(state, f"{name}.{part}.output.LayerNorm", out + x, 1e-12)
    hidden = F.gelu(layer(state, f"{name}.intermediate.dense", x))
    return norm(state, f"{name}.output.LayerNorm", layer(state, f"{name}.output.dense", hidden) + x, 1e-12)


def bert(state: State, name: str, x: Tensor, mask: Tensor, heads: int, images: Tensor | None = None) -> Tensor:
    """Ids through the layers without cross-attention, or embeddings through those with it."""
    x = embeddings(state, name, x) if images is None else x
    for i in range(sum(key.startswith(f"{name}.bert.") and key.endswith("intermediate.dense.bias") for key in state)):
        part = f"{name}.bert.encoder.layer.{i}"
        if (f"{part}.crossattention.self.key.weight" in state) == (images is not None):
            x = bert_layer(state, part, x, mask, heads, images)
    return x


def token_logits(state: State, name: str, x: Tensor) -> Tensor:
    head = f"{name}.cls.predictions"
    x = norm(state, f"{head}.transform.LayerNorm", F.gelu(layer(state, f"{head}.transform.dense", x)), 1e-12)
    return x @ state[f"{name}.bert.embeddings.word_embeddings.weight"].T + state[f"{head}.bias"]


def features(state: State, images: Tensor, ids: Tensor, mask: Tensor, heads: int, twin: str = ""):
    patches = vit(state, f"visual_encoder{twin}", images, heads)
    text = bert(state, f"text_encoder{twin}", ids, mask, heads)
    image_z = F.normalize(layer(state, f"vision_proj{twin}", patches[:, 0]), dim=-1)
    return patches, text, image_z, F.normalize(layer(state, f"text_proj{twin}", text[:, 0]), dim=-1)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return -(targets * logits.log_softmax(-1)).sum(-1)


def draw(weights: Tensor, noise: Tensor) -> list[int]:
    """The first entry of each row whose cumulative weight exceeds the noise's share of the whole."""
    drawn = []
    for row, u in zip(weights.tolist(), noise.tolist()):
        row, total, i = [w + 1e-4 for w in row], 0.0, -1
        row[len(drawn)] = 0.0
        while total <= u * sum(row):
            i += 1
            total += row[i]
        drawn.append(i)
    return drawn


def losses(state: State, queues: State, batch: dict[str, Tensor], alpha: float, heads: int):
    """The three losses of a batch, and the twins' keys. Draws come from the batch's uniform numbers."""
    images, ids, noise = batch["images"], batch["ids"], batch["noise"]
    mask, count = ids != 0, len(ids)
    patches, text, image_z, text_z = features(state, images, ids, mask, heads)
    with torch.no_grad():
        patches_m, _, image_m, text_m = features(state, images, ids, mask, heads, "_m")
        columns = torch.cat([image_m.T, queues["image_queue"]], 1), torch.cat([text_m.T, queues["text_queue"]], 1)
    own = torch.eye(count, columns[0].shape[1], dtype=image_z.dtype)
    ita, similarities = torch.zeros((), dtype=image_z.dtype), []
    for student, twin, keys in ((image_z, image_m, columns[1]), (text_z, text_m, columns[0])):
        targets = alpha * (twin @ keys / state["temp"].detach()).softmax(1) + (1 - alpha) * own
        similarities.append(student @ keys / state["temp"])
        ita = ita + soft_cross_entropy(similarities[-1], targets).mean() / 2
    weights = [x[:, :count].detach().softmax(1) for x in similarities]
    other_text, other_image = draw(weights[0], noise[:, 1]), draw(weights[1], noise[:, 0])
    matched = []
    for i, j in ((range(count), range(count)), (range(count), other_image), (other_text, range(count))):
        fused = bert(state, "text_encoder", text[list(i)], mask[list(i)], heads, patches[list(j)])
        matched.append(layer(state, "itm_head", fused[:, 0]))
    labels = torch.tensor([1] * count + [0] * 2 * count)
    itm = F.cross_entropy(torch.cat(matched), labels)
    logits = []
    for twin, tokens in (("", patches), ("_m", patches_m)):
        x = bert(state, f"text_encoder{twin}", batch["corrupted"], mask, heads)
        logits.append(
            token_logits(state, f"text_encoder{twin}", bert(state, f"text_encoder{twin}", x, mask, heads, tokens))
        )
    where = batch["masked"]
    hard = F.cross_entropy(logits[0][where], ids[where])
    soft = soft_cross_entropy(logits[0][where], logits[1][where].detach().softmax(-1)).mean()
    return ita, itm, (1 - alpha) * hard + alpha * soft, image_m, text_m


def run_albef(state: State, batches, *, steps_per_epoch: int, epochs: int, lr: float, heads: int, momentum: float):
    """AdamW with weight decay 0.02, 20 stairs of 2 steps in the first epoch from a tenth of the learning rate, then a
    cosine by epoch to a tenth; α grows to 0.4 over the first epoch. Returns the losses [steps, 3] and the state."""
    followed = {n: x.clone() for n, x in state.items()}
    queues = {n: followed.pop(n) for n in ("image_queue", "text_queue", "queue_ptr")}
    twins = {n: followed.pop(n) for n in [n for n in followed if n.split(".")[0].endswith("_m")]}
    moments = {n: [torch.zeros_like(x), torch.zeros_like(x)] for n, x in followed.items()}
    history = []
    for step, batch in enumerate(batches):
        epoch, i = divmod(step, steps_per_epoch)
        alpha = 0.4 * min(1.0, i / steps_per_epoch) if epoch == 0 else 0.4
        rate = lr / 10 + (lr - lr / 10) * min(max(i - 1, 0) // 2, 20) / 20
        if epoch:
            rate = lr / 10 + (lr - lr / 10) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        followed["temp"] = followed["temp"].clamp(0.001, 0.5)
        for n in twins:
            part, _, rest = n.partition(".")
            twins[n] = momentum * twins[n] + (1 - momentum) * followed[f"{part[:-2]}.{rest}"]
        leaves = {n: x.clone().requires_grad_() for n, x in followed.items()}
        *terms, image_m, text_m = losses(leaves | twins, queues, batch, alpha, heads)
        history.append(torch.stack([x.detach() for x in terms]))
        gradients = dict(zip(leaves, torch.autograd.grad(sum(terms), list(leaves.values()))))
        pointer, size = int(queues["queue_ptr"]), queues["image_queue"].shape[1]
        for name, keys in (("image_queue", image_m), ("text_queue", text_m)):
            for row, key in enumerate(keys):
                queues[name][:, (pointer + row) % size] = key
        queues["queue_ptr"] = torch.tensor([(pointer + len(image_m)) % size])
        for n, x in followed.items():
            first, second = moments[n]
            first.mul_(0.9).add_(0.1 * gradients[n])
            second.mul_(0.999).add_(0.001 * gradients[n].square())
            decay = 0.0 if x.ndim == 1 or n.endswith(".bias") else 0.02
            mean, variance = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            followed[n] = x - rate * decay * x - rate * mean / (variance.sqrt() + 1e-8)
    return torch.stack(history), followed | twins | queues
