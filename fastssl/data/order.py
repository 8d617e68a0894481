"""Order of the images in an epoch, and their distribution over ranks."""

import numpy as np
import torch

from .draws import mix

BUFFER = 8192  # length of the shuffle buffer for sharded sources, whose files are read almost in order


class Order:
    """The batches of each epoch, a function of (seed, epoch) alone.

    All ranks share one order: the global batch is the next world · batch_size images, and each rank takes a slice of
    it. So no image occurs twice in an epoch, and two ranks with B images each see the same as one rank with 2 B. If the
    sizes do not divide, training leaves out the images of the last, incomplete global batch (different ones in each
    epoch); evaluation divides them as evenly as possible, and a rank may get none.

    Args:
        count: images of the source.
        batch_size: images per batch and rank.
        seed: seed of the shuffling.
        train: shuffle, and leave out the incomplete batch; else the source's order, complete.
        shards: [S + 1] first image of each shard, and the end, or None. With shards, the order of the shards is
            shuffled, and each image is moved by up to `BUFFER` places.
        rank, world: number of this rank, and number of ranks.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        train: bool,
        shards: np.ndarray | None = None,
        rank: int = 0,
        world: int = 1,
    ):
        self.count, self.batch_size, self.seed, self.train, self.shards = count, batch_size, seed, train, shards
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        global_size = self.batch_size * self.world
        return self.count // global_size if self.train else -(-self.count // global_size)

    def batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """The image numbers [B] int64 of each batch of this rank, from batch `start` of the epoch on."""
        order = self._shuffle(epoch) if self.train else np.arange(self.count)
        size = self.batch_size * self.world
        global_batches = (order[i * size : (i + 1) * size] for i in range(start, len(self)))
        return [np.array_split(batch, self.world)[self.rank] for batch in global_batches]

    def _shuffle(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(int(mix(self.seed, epoch)[0]))
        if self.shards is None:
            return torch.randperm(self.count, generator=generator).numpy()
        shards = torch.randperm(len(self.shards) - 1, generator=generator).numpy()
        order = np.concatenate([np.arange(self.shards[s], self.shards[s + 1]) for s in shards])
        places = np.arange(self.count) + BUFFER * torch.rand(self.count, generator=generator).numpy()
        return order[np.argsort(places, kind="stable")]
