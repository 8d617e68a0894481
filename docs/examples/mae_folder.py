"""MAE on a folder of images: pretraining, kNN accuracy, features, a report. Without a folder, it draws one.

python docs/examples/mae_folder.py --folder PATH --epochs 100
python docs/examples/mae_folder.py                      # minutes: images drawn on the fly
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import fastssl


def draw_folder(folder: Path, images_per_class: int, size: int = 48) -> Path:
    """Class folders of striped images, one direction of the stripes a class."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    for name, direction in (("vertical", x), ("horizontal", y), ("diagonal", x + y)):
        (folder / name).mkdir(parents=True)
        for number in range(images_per_class):
            wave = np.sin(direction * random.uniform(0.4, 0.8) + random.uniform(0, 6))
            pixels = 128 + 100 * wave[..., None] * random.uniform(0.4, 1, 3) + random.normal(0, 8, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / name / f"{number:04d}.png")
    return folder


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Prints the features' shape and the report's path; returns the kNN accuracy for each number of neighbours."""
    parser = argparse.ArgumentParser(description="MAE on a folder of images")
    parser.add_argument("--folder", type=Path, help="images in class folders or none; drawn if not given")
    parser.add_argument("--run", type=Path, default=Path("runs/mae-example"), help="folder of the run")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--images-per-class", type=int, default=200, help="number of images to draw")
    options = parser.parse_args(arguments)

    images = options.folder or draw_folder(Path(tempfile.mkdtemp()), options.images_per_class)
    run = fastssl.pretrain(
        "mae",
        data=f"folder:{images}",
        preset="small",  # for images of at most 64 pixels; leave it out for the paper's numbers
        image_size=(32, 32),
        epochs=options.epochs,
        batch_size=options.batch_size,
        folder=options.run,
    )
    accuracies = run.knn()
    features, labels = run.embed(f"folder:{images}")
    print(f"{len(features)} features of {features.shape[1]} numbers, {len(labels.unique())} classes")
    print(f"report: {run.report()}")
    return accuracies


if __name__ == "__main__":
    main()
