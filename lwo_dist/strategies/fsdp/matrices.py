"""Orthogonalises matrices that are sharded by rows: each rank computes some of them whole.

An all-to-all brings the rows of W matrices to W ranks, each of which orthogonalises one, and
another brings the rows back. On average a rank sends as much as two times its shards, and the ranks
share the work.
The Muon of the dion library (Ahn et al., 2025) divides it in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from lwo_dist import distributed
from lwo_dist.memory import padded_numel
from lwo_dist.orthogonal import matrices_at_once, orthogonalise, orthogonalise_bytes, same_shape

__all__ = ["bytes_per_rank_at_once", "exchanged_numel", "orthogonalise_shards"]


def orthogonalise_shards(
    shards: Sequence[Tensor], shape: Sequence[int], group: ProcessGroup
) -> Iterator[Tensor]:
    """This rank's rows of `orthogonalise` of each matrix, some matrices at a time. A collective.

    Args:
        shards: this rank's rows of matrices of one shape, as FSDP2 splits them: ranks at the end
            have fewer, or none. Tensors of more dimensions are split into whole matrices, which
            stay where they are.
        shape: of each whole matrix.

    Yields:
        [matrices, rows, ...]; rows beyond those of the shard are padding.
    """
    if len(shape) > 2:
        for shard in shards:
            yield (orthogonalise(shard) if shard.numel() else shard)[None]
        return
    ranks = distributed.world_size(group)
    step = ranks * matrices_at_once(-(-len(shards) // ranks), shape)
    for start in range(0, len(shards), step):
        some = shards[start : start + step]
        # How many matrices each rank orthogonalises.
        owned = [len(range(rank, len(some), ranks)) for rank in range(ranks)]
        # Nothing of this round stays while the next one is computed.
        yield _to_shards(orthogonalise(_to_owners(some, owned, shape, group)), owned, group)


def _to_owners(
    shards: Sequence[Tensor], owned: Sequence[int], shape: Sequence[int], group: ProcessGroup
) -> Tensor:
    """This rank's whole matrices, [matrices, rows, columns].

    Their rows are padded with zeros to a multiple of the ranks; orthogonalised, they stay zeros.
    """
    ranks = len(owned)
    rows = padded_numel(shape[0], ranks) // ranks
    padded = shards[0].new_zeros(len(shards), rows, shape[1])
    for target, shard in zip(padded, shards, strict=True):
        target[: len(shard)] = shard
    # To each rank the rows of its matrices, from each rank its rows of mine.
    mine = owned[distributed.rank(group)]
    parts = distributed.all_to_all(padded, owned, [mine] * ranks, group)
    parts = parts.view(ranks, mine, rows, shape[1])
    return parts.transpose(0, 1).reshape(mine, ranks * rows, shape[1])


def _to_shards(whole: Tensor, owned: Sequence[int], group: ProcessGroup) -> Tensor:
    """The inverse: this rank's rows of each matrix, [matrices, rows / ranks, columns]."""
    ranks = len(owned)
    mine, rows, columns = whole.shape
    parts = whole.view(mine, ranks, rows // ranks, columns).transpose(0, 1)
    parts = parts.reshape(ranks * mine, rows // ranks, columns)
    return distributed.all_to_all(parts, [mine] * ranks, owned, group)


def exchanged_numel(shapes: Sequence[Sequence[int]], ranks: int) -> int:
    """Elements that a rank sends and receives to orthogonalise matrices of these shapes: the mean
    over ranks, as the whole tensor of an all-gather, of which each rank sends as much.
    """
    if ranks == 1:
        return 0
    padded = [(padded_numel(shape[0], ranks), shape[1]) for shape in shapes if len(shape) == 2]
    return sum(2 * rows // ranks * columns for rows, columns in padded)


def bytes_per_rank_at_once(shapes: Sequence[Sequence[int]], ranks: int) -> int:
    """The most that `orthogonalise` needs on a rank to update matrices of these shapes."""
    most = 0
    for shape, members in same_shape(shapes).items():
        rows = padded_numel(shape[0], ranks)
        stack: tuple[int, ...] = (rows // ranks, *shape[1:])
        if len(shape) == 2:
            stack = matrices_at_once(-(-len(members) // ranks), shape), rows, shape[1]
        most = max(most, orthogonalise_bytes(stack))
    return most
