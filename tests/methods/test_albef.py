import pytest
import torch

from fastssl.contract import Batch
from fastssl.methods import albef
from fastssl.methods.albef import MatchingALBEF, parameter_groups
from fastssl.nn.bert import PAD, BertForMaskedLM
from fastssl.nn.pairs import distilled_contrast, negative_weights
from fastssl.nn.vit import ViT
from fastssl.train.config import Training
from tests.support.golden import part, read


def golden_model(meta, **changes):
    vit, bert = meta["vit"], meta["bert"]
    sizes = tuple(vit["img_size"]), vit["patch"], 3, vit["embed_dim"], vit["depth"], vit["heads"]
    images = ViT(*sizes, pos_embed="learn", global_pool="", norm_eps=vit["eps"])
    text = BertForMaskedLM(
        bert["encoder_width"],
        bert["hidden_size"],
        bert["num_hidden_layers"],
        bert["num_attention_heads"],
        bert["fusion_layer"],
        vocabulary=bert["vocab_size"],
        positions=bert["max_position_embeddings"],
        hidden=bert["intermediate_size"],
        dropout=0.0,
    )
    config = albef.Config(dim=meta["embed_dim"], queue_size=meta["queue_size"], ema_momentum=meta["momentum"])
    config.mlm_probability = meta["mlm_probability"]
    config.training = Training(2, meta["batch"], "adamw", 2e-2, 0.02)
    for name, value in changes.items():
        setattr(config, name, value)
    return MatchingALBEF(images, text, config)


def golden_batch(golden, step, model, dtype):
    """A batch of the golden file, whose draws replace those of the model."""
    inputs = {name: x.long() for name, x in part(golden, f"step{step}.input.").items() if name != "images"}
    negatives = inputs["neg_image_of_text"], inputs["neg_text_of_image"]
    model.negatives = lambda student, twin, seed: negatives
    model.mask = lambda tokens, seed: (inputs["mlm_input_ids"], inputs["mlm_labels"] >= 0)
    tokens = inputs["input_ids"]
    assert torch.equal(inputs["attention_mask"], (tokens != PAD).long())
    return Batch((golden[f"step{step}.input.images"].to(dtype),), None, None, None, {"tokens": tokens})


def contrast_of_the_reference(student, twin, keys, tau, alpha):
    """The reference keeps the share of the true key in float32, also in float64."""
    soft, hard = (distilled_contrast(student, twin, keys, tau, share) for share in (1.0, 0.0))
    return alpha * soft + (1 - alpha).float().to(hard.dtype) * hard


@pytest.mark.parametrize(
    ("dtype", "contrast", "bound"),
    [
        (torch.float64, contrast_of_the_reference, 1e-9),
        (torch.float64, distilled_contrast, 2e-7),
        (torch.float32, distilled_contrast, 2e-4),
    ],
)
def test_three_golden_steps(dtype, contrast, bound, monkeypatch):
    """Losses, gradients, the temperature, both queues, which wrap, momentum encoders, weights of the negatives; AdamW
    with the official rule of weight decay."""
    monkeypatch.setattr(albef, "distilled_contrast", contrast)
    golden, meta = read("albef")
    model = golden_model(meta).to(dtype)
    model.load_state_dict(part(golden, "state."), strict=True)
    groups = parameter_groups(model)
    for group in groups:
        group["weight_decay"] = 0.02 * group.pop("weight_decay_scale", 1.0)
    optimizer = torch.optim.AdamW(groups, lr=2e-2)

    def check(name, ours, expected):
        expected = expected.to(dtype)
        torch.testing.assert_close(ours.detach(), expected, rtol=bound, atol=bound / 10, msg=lambda m: f"{name}: {m}")

    model.update_twins()  # the reference updates them in its forward pass, also in the first
    for step in range(3):
        expected = part(golden, f"step{step}.")
        batch = golden_batch(golden, step, model, dtype)
        model.before_step(step / 4)
        check("alpha", model.alpha, expected["alpha"])
        check("temp", model.temp[0], expected["temp"])
        check("twin", model.vision_proj_m.module.weight, expected["momentum.vision_proj_m.weight"])
        tokens = batch.extras["tokens"]
        student, twin = model.encode(batch.views[0], tokens), model.encode(batch.views[0], tokens, twin=True)
        for name, ours in (("", student), ("_m", twin)):
            check(f"image_feat{name}", ours.image_z, expected[f"image_feat{name}"])
            check(f"text_feat{name}", ours.text_z, expected[f"text_feat{name}"])
        matched, _ = model.fuse(student, tokens != PAD, model.negatives(student, twin, None))
        check("itm_logits", matched, expected["itm_logits"])
        for name, queries, keys in (("t2i", student.text_z, twin.image_z), ("i2t", student.image_z, twin.text_z)):
            weights = negative_weights(queries, keys, model.temp)
            raised = 1e-4 * (1 - torch.eye(4, dtype=torch.float64))
            check(f"weights_{name}", weights.to(dtype), expected[f"weights_{name}"] + raised)
        loss, metrics = model(batch)
        loss.backward()
        check("loss_ita", metrics["loss_itc"], expected["loss_ita"])
        check("loss_itm", metrics["loss_itm"], expected["loss_itm"])
        check("loss_mlm", metrics["loss_mlm"], expected["loss_mlm"])
        total = sum(expected[f"loss_{name}"] for name in ("ita", "itm", "mlm"))
        check("loss", loss, total)
        for name, gradient in part(expected, "grad.").items():
            check(f"gradient of {name}", model.get_parameter(name).grad.reshape(gradient.shape), gradient)
        optimizer.step()
        optimizer.zero_grad()
        check("temp after the step", model.temp[0], expected["stepped.temp"])
        check("weight after the step", model.vision_proj.weight, expected["stepped.vision_proj.weight"])
        model.after_step((step + 1) / 4)
        state = model.state_dict()
        for name in ("image_queue", "text_queue"):
            check(name, state[name], expected[name])
        assert torch.equal(state["queue_ptr"], expected["queue_ptr"].long())
