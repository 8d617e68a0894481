"""MoCo in your own training loop: a torchvision ResNet, `InfoNCELoss`, `MomentumEncoder` and the two-view loader.

python docs/examples/moco_loop.py --data folder:PATH --size 224 --epochs 10
python docs/examples/moco_loop.py                       # a minute on embedded shapes
"""

import argparse

import torch
from torchvision.models import resnet18

from fastssl.data.augmentation import Augmentation, View
from fastssl.data.loader import Loader
from fastssl.data.source import open_source
from fastssl.nn import InfoNCELoss, MomentumEncoder


def main(arguments: list[str] | None = None) -> list[float]:
    """Trains, prints and returns the mean loss of each epoch."""
    parser = argparse.ArgumentParser(description="MoCo in a training loop")
    parser.add_argument("--data", default="shapes:count=2048,size=32", help="source of images, folder:PATH for yours")
    parser.add_argument("--size", type=int, default=32, help="side of the views in pixels")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-size", type=int, default=1024, help="number of negative keys (K)")
    parser.add_argument("--lr", type=float, default=0.06)
    options = parser.parse_args(arguments)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    view = View((options.size, options.size), crop=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, flip_p=0.5)
    loader = Loader(open_source(options.data), Augmentation((view, view)), options.batch_size, device=device)

    encoder = resnet18(num_classes=128).to(device)
    key_encoder = MomentumEncoder(encoder, momentum=0.99).to(device)
    criterion = InfoNCELoss(dim=128, queue_size=options.queue_size, tau=0.2).to(device)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=options.lr, momentum=0.9, weight_decay=1e-4)

    means = []
    for epoch in range(options.epochs):
        losses = []
        for batch in loader.epoch(epoch):
            q, k = encoder(batch.views[0]), key_encoder(batch.views[1])
            loss = criterion(q, k)  # unit vectors, InfoNCE against the queue; then the keys enter the queue
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            key_encoder.update(encoder)
            losses.append(loss.detach())
        means.append(torch.stack(losses).mean().item())
        print(f"epoch {epoch + 1}: loss {means[-1]:.3f}")
    return means


if __name__ == "__main__":
    main()
