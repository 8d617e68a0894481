"""A timm model with its attention replaced: same outputs, same state dict, and a training step timed.

python docs/examples/accelerate_timm.py --model vit_base_patch16_224 --batch-size 16 --precision bf16
"""

import argparse
import copy
import time

import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.nn import accelerate


def seconds_per_step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int, bf16: bool) -> float:
    """The shortest time of a forward and backward pass."""
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()
        if images.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])  # the first pass allocates and compiles


def main(arguments: list[str] | None = None) -> list[str]:
    """Prints both times and returns the names of the replaced modules."""
    parser = argparse.ArgumentParser(description="fastssl.nn.accelerate on a timm model")
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = timm.create_model(options.model, pretrained=False, num_classes=10).to(device)
    side = model.patch_embed.img_size[0]
    images = torch.randn(options.batch_size, 3, side, side, device=device)
    labels = torch.randint(10, (options.batch_size,), device=device)

    original = copy.deepcopy(model)
    replaced = accelerate(model)
    print(f"replaced: {', '.join(replaced)}")
    assert model.state_dict().keys() == original.state_dict().keys()
    with torch.no_grad():
        difference = (model.eval()(images) - original.eval()(images)).abs().max().item()
    print(f"largest difference of the outputs: {difference:.1e}")
    for name, candidate in (("timm", original), ("accelerated", model)):
        duration = seconds_per_step(candidate.train(), images, labels, options.steps, options.precision == "bf16")
        print(f"{name}: {1000 * duration:.1f} ms a step")
    return replaced


if __name__ == "__main__":
    main()
