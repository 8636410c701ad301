"""Every rank of an axis sends its tensor to one other: what torch's functional collectives have no op for.

It is an all-to-all of which each rank uses one block. The sizes of the blocks follow from the rank's coordinate by
arithmetic, so that the call is the same on every rank (and works where one process simulates all of them).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

c10d = torch.ops._c10d_functional


def start_permute(x: torch.Tensor, coord: int, destinations: Sequence[int], group: str) -> torch.Tensor:
    """Start sending `x`, contiguous, to rank destinations[coord] of the group; the result, flat, is to be waited for.

    destinations: of each rank of the group, a permutation.
    """
    size, parts = x.numel(), len(destinations)
    is_me = [_equal(coord, rank, parts) for rank in range(parts)]
    sources = {destination: source for source, destination in enumerate(destinations)}
    sent = [size * is_me[sources[peer]] for peer in range(parts)]
    received = [size * is_me[destination] for destination in destinations]
    made: torch.Tensor = c10d.all_to_all_single(x.view(-1), received, sent, group)
    return made


def _equal(coord: int, rank: int, parts: int) -> int:
    """1 where coord is rank, else 0. Simulated coordinates differ between ranks: they can be added, not compared."""
    return 1 - ((coord - rank) % parts + parts - 1) // parts


def around(parts: int) -> tuple[int, ...]:
    """To the next rank, the last one to the first."""
    return tuple((rank + 1) % parts for rank in range(parts))
