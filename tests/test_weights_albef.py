"""ALBEF's weights: its official layout, and files from which it starts."""

import torch

from fastssl.methods import albef, dino
from fastssl.nn.vit import ViT
from fastssl.weights import export, load_initial_weights, load_weights
from tests.test_weights import equal, randomise


def build():
    return albef.build(albef.Config.small())


def test_albef_checkpoints_have_the_official_layout(tmp_path):
    """With the names that Hugging Face's BERT of version 4 has twice, without which the code refuses it. Its encoder
    loads into other methods, and a ViT into ALBEF, whose momentum encoders become copies."""
    method = randomise(build())
    path = export(method, "albef", tmp_path / "ALBEF")
    state = torch.load(path, weights_only=True)["model"]
    own = method.state_dict()
    for encoder in ("text_encoder", "text_encoder_m"):
        words = state[f"{encoder}.bert.embeddings.word_embeddings.weight"]
        assert torch.equal(state.pop(f"{encoder}.cls.predictions.decoder.weight"), words)
        bias = state.pop(f"{encoder}.cls.predictions.decoder.bias")
        assert torch.equal(bias, own[f"{encoder}.cls.predictions.bias"])
        assert torch.equal(state.pop(f"{encoder}.bert.embeddings.position_ids"), torch.arange(512)[None])
    assert equal(state, own)
    assert {name: list(state[name].shape) for name in ("image_queue", "text_queue", "queue_ptr", "temp")} == {
        **{"image_queue": [128, 16], "text_queue": [128, 16], "queue_ptr": [1], "temp": []}
    }
    encoder = method.encoder.state_dict()
    sizes = {"pos_embed": "learn", "patch_size": 8, "img_size": 32, "embed_dim": 128, "depth": 4, "num_heads": 4}
    vit = ViT(**sizes)
    load_weights(vit, path, encoder_only=True)
    assert equal(vit.state_dict(), encoder)
    other = dino.build(dino.Config("vit_mini", 8, (32, 32), (16, 16), prototypes=24, hidden=16, bottleneck=8))
    assert "text_encoder" in "".join(load_initial_weights(other, path))
    assert equal(other.encoder.state_dict(), encoder)
    torch.save(encoder, tmp_path / "vit.pth")
    started = build()
    notes = load_initial_weights(started, tmp_path / "vit.pth")
    assert "visual_encoder_m is a copy of visual_encoder" in notes[0]
    assert "text_proj_m is a copy of text_proj" in notes[0]
    assert equal(started.encoder.state_dict(), encoder)
    for name in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
        assert equal(getattr(started, f"{name}_m").state_dict(), getattr(started, name).state_dict())
    small = {n: x[:, :8] if n.endswith("_queue") else x for n, x in own.items()}
    torch.save({"model": small}, path)
    notes = load_initial_weights(started, path)
    assert notes == [f"{path} has queue of another size: left out, so that they start at random"]
    assert torch.equal(started.temp, method.temp)


def test_albef_starts_from_a_vit_and_a_bert(tmp_path):
    """The lines of docs/methods.md."""
    method, source, path = build(), randomise(build()), tmp_path / "start.pth"
    torch.save(source.encoder.state_dict(), path)
    load_weights(method, path, encoder_only=True)
    bert = {name: x for name, x in source.text_encoder.state_dict().items() if "crossattention" not in name}
    unknown = method.text_encoder.load_state_dict(bert | {"bert.pooler.dense.bias": torch.zeros(1)}, strict=False)
    assert unknown.missing_keys and all("crossattention" in name for name in unknown.missing_keys)
    torch.save({n: x for n, x in method.state_dict().items() if "_m." not in n and "queue" not in n}, path)
    other = build()
    (note,) = load_initial_weights(other, path)
    assert note.startswith(
        f"{path} has no queue, text_encoder_m, text_proj_m, vision_proj_m and visual_encoder_m: queue "
    )
    state = other.state_dict()
    assert equal({name: state[f"text_encoder.{name}"] for name in bert}, bert)
    assert equal(other.encoder.state_dict(), source.encoder.state_dict())
    twins = [name for name in state if "_m." in name]
    assert twins and all(torch.equal(state[name], state[name.replace("_m.", ".", 1)]) for name in twins)
