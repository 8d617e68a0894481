"""In which order images come, and which of them to which rank."""

import numpy as np
import torch

from .draws import mix

BUFFER = 8192  # images of sharded sources that are shuffled among themselves: files are still read nearly in a row


class Order:
    """The batches of each epoch, a function of (seed, epoch) alone.

    One order for all ranks: the batch of the whole is the next world · batch_size images, of which each rank takes a
    slice. So no image comes twice in an epoch, and two ranks with B images each see what one with 2 B sees. Sizes that
    do not divide: in training the images of the last, incomplete batch of the whole are left out (others each epoch);
    in evaluation they are dealt out as evenly as can be, and a rank may get none.

    Args:
        count: images of the source.
        batch_size: images a batch and rank.
        seed: of the shuffling.
        train: shuffled and without the incomplete batch; else in the source's order and complete.
        shards: first image of each shard, and the end [S + 1], or None. With shards their order is shuffled, and each
            image is moved by up to `BUFFER` places.
        rank, world: which part is wanted.
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
        whole = self.batch_size * self.world
        return self.count // whole if self.train else -(-self.count // whole)

    def batches(self, epoch: int, start: int = 0) -> list[np.ndarray]:
        """The image numbers [B] int64 of each batch of this rank, from batch `start` of the epoch on."""
        order, whole = self._shuffled(epoch) if self.train else np.arange(self.count), self.batch_size * self.world
        batches = (order[first : first + whole] for first in range(start * whole, len(self) * whole, whole))
        return [np.array_split(batch, self.world)[self.rank] for batch in batches]

    def _shuffled(self, epoch: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(int(mix(self.seed, epoch)[0]))
        if self.shards is None:
            return torch.randperm(self.count, generator=generator).numpy()
        shards = torch.randperm(len(self.shards) - 1, generator=generator).numpy()
        order = np.concatenate([np.arange(self.shards[s], self.shards[s + 1]) for s in shards])
        moved = np.arange(self.count) + BUFFER * torch.rand(self.count, generator=generator).numpy()
        return order[np.argsort(moved, kind="stable")]
