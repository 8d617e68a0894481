"""Embeddings of the images of an epoch, kept from one epoch to the next."""

from typing import Any

import torch
from torch import Tensor, nn

from fastssl.distributed import all_gather, rank, world_size


class EmbeddingMemory(nn.Module):
    """For each image of an epoch the embeddings of C crops, on each rank those of its own images.

    Rows are written in turn, so that an epoch overwrites all. `embeddings` [C, R, D] and `index` [R] int64, the number
    of each row's image, are no buffers, because DistributedDataParallel would overwrite them with those of rank 0.
    State dicts hold the rows of all ranks, in the order of one process, and load on any number of ranks that divides
    the batch; so all ranks must call `state_dict()` together.

    Args:
        crops: C.
        dim: D.

    Source: Caron et al., 2020 (SwAV), the code of DeepCluster-v2.
    """

    tables = ("embeddings", "index", "place")  # whose shapes may differ from those of a file, see `ViT.tables`

    def __init__(self, crops: int, dim: int):
        super().__init__()
        self.embeddings, self.index = torch.zeros(crops, 0, dim), torch.zeros(0, dtype=torch.int64)
        self.batch, self.place = 0, 0  # rows of a batch on this rank; the row that is written next
        self.register_state_dict_post_hook(_save)
        self.register_load_state_dict_pre_hook(_load)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raises: a memory is written by `write` and read as `embeddings` and `index`; it is not called."""
        raise TypeError("EmbeddingMemory: write rows by write(embeddings, index): no call")

    def __len__(self) -> int:
        """Rows of this rank."""
        return len(self.index)

    def resize(self, batches: int, batch: int) -> None:
        """Make room for an epoch of `batches` batches of `batch` images of this rank; rows so far are forgotten."""
        crops, _, dim = self.embeddings.shape
        self.embeddings = self.embeddings.new_zeros(crops, batches * batch, dim)
        self.index = self.index.new_zeros(batches * batch)
        self.batch, self.place = batch, 0

    def numbers(self) -> Tensor:
        """Number [R] int64 of each row among those of all ranks, in the order of one process."""
        rows, batch = torch.arange(len(self), device=self.index.device), max(1, self.batch)
        return (rows // batch * world_size() + rank()) * batch + rows % batch

    @torch.no_grad()
    def write(self, embeddings: Tensor, index: Tensor) -> None:
        """Overwrite the next rows by the embeddings [C, B, D] of images [B]; rows that are not finite are left out."""
        rows = torch.arange(self.place, self.place + len(index), device=index.device) % max(1, len(self))
        finite = embeddings.isfinite().all(2).all(0)
        old = self.embeddings[:, rows]
        self.embeddings[:, rows] = torch.where(finite[:, None], embeddings.to(old.dtype), old)
        self.index[rows] = torch.where(finite, index, self.index[rows])
        self.place = (self.place + len(index)) % max(1, len(self))

    def _apply(self, fn, recurse: bool = True) -> "EmbeddingMemory":
        """Also moves and converts the rows, which are no buffers, for `.to(…)` and the like."""
        super()._apply(fn, recurse)
        self.embeddings, self.index = fn(self.embeddings), fn(self.index)
        return self


def _save(module: EmbeddingMemory, state: dict, prefix: str, metadata: dict) -> None:
    batch, world = module.batch, world_size()

    def whole(x: Tensor) -> Tensor:  # rows of this rank in dimension 0
        if not batch:
            return x
        return all_gather(x.contiguous()).unflatten(0, (world, -1, batch)).transpose(0, 1).flatten(0, 2)

    state[f"{prefix}embeddings"] = whole(module.embeddings.transpose(0, 1)).transpose(0, 1).contiguous()
    state[f"{prefix}index"] = whole(module.index)
    state[f"{prefix}place"] = torch.tensor([batch * world, module.place * world])


def _load(module: EmbeddingMemory, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, *_) -> None:
    names = [f"{prefix}{name}" for name in ("embeddings", "index", "place")]
    tensors = [state.pop(name) for name in names if name in state]
    if len(tensors) < 3:
        missing.extend(names)
        return
    embeddings, index, place = tensors
    (whole, row), world = place.tolist(), world_size()
    crops, dim = module.embeddings.shape[0], module.embeddings.shape[2]
    if embeddings.shape != (crops, len(index), dim) or whole % world or (len(index) % whole if whole else len(index)):
        raise ValueError(
            f"EmbeddingMemory: the rows to load must be [{crops}, R, {dim}] in batches that {world} ranks divide, got "
            f"{list(embeddings.shape)} in batches of {whole}"
        )
    module.batch, module.place = whole // world, row // world

    def own(x: Tensor) -> Tensor:  # of the rows of all ranks in dimension 0
        return x.unflatten(0, (-1, world, module.batch))[:, rank()].flatten(0, 1) if whole else x

    rows = own(embeddings.transpose(0, 1)).transpose(0, 1)
    module.embeddings = rows.to(module.embeddings, copy=True).contiguous()
    module.index = own(index).to(module.index, copy=True)
