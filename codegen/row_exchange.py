"""Exchanges of rows whose number only the run knows, as ops, so that graphs around them keep static shapes.

A rank's rows stand in the order of the groups; `ends` says where its own part of each group
ends. Of G groups, rank i of n holds groups i * G / n and on. First the ranks tell each other
how many rows of each group they will send (`exchange_counts`), then each sends the rows
(`dispatch_rows`) and gets results back (`combine_rows`); no row is dropped, none is padded.
A rank puts what it received in the order of its groups, and within a group in the order of
the ranks. `declared` is the number of rows that a rank gets if all groups are alike: the
size in plans and memory simulations.

Simulated ranks (`autopar.verification`) exchange the same blocks within one process.

Rows are taken by index_select, which copies them a row at a time: a quarter of the time of indexing on a CPU (torch
2.13, 1,024 rows of 256).
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from autopar._torch_compat import resolve_process_group, simulate_exchange

Tensor = torch.Tensor

_library = torch.library.Library("autopar", "FRAGMENT")
_library.define("exchange_counts(Tensor ends, int parts, str group) -> Tensor")
_library.define("dispatch_rows(Tensor rows, Tensor ends, Tensor received, int declared, str group) -> Tensor")
_library.define("combine_rows(Tensor rows, Tensor ends, Tensor received, int count, str group) -> Tensor")
_library.define("own_rows(Tensor x, Tensor source, Tensor ends, int parts, SymInt part, int declared) -> Tensor")
_library.define("add_own_rows(Tensor rows, Tensor target, Tensor ends, int size, int parts, SymInt part) -> Tensor")


# -- what is sent, and how it is put in order ---------------------------------------------------


def counts_of(ends: Tensor, parts: int) -> Tensor:
    """[parts, groups of one rank]: how many of a rank's rows belong to each group."""
    return torch.diff(ends, prepend=ends.new_zeros(1)).to(torch.int64).view(parts, -1)


def sizes(counts: Tensor) -> list[int]:
    """Rows for or from each rank."""
    found: list[int] = counts.sum(1).tolist()
    return found


def in_order(rows: Tensor, received: list[list[int]]) -> Tensor:
    """Rows that came rank by rank, in the order of the groups. received: [ranks][groups] counts.

    They move as whole blocks, one for each rank and group: rows one by one would have to be found by sorting.
    """
    return _blocks_turned(rows, received)


def by_rank(rows: Tensor, received: list[list[int]]) -> Tensor:
    """The inverse: rows in the order of the groups, as they came, rank by rank."""
    return _blocks_turned(rows, [list(of_group) for of_group in zip(*received, strict=True)])


def _blocks_turned(rows: Tensor, counts: list[list[int]]) -> Tensor:
    """Blocks of rows that stand by first and second index, by second and first."""
    blocks = rows.split([count for of_one in counts for count in of_one])
    width = len(counts[0])
    return torch.cat([block for second in range(width) for block in blocks[second::width]])


# -- between processes ----------------------------------------------------------------------------


def _exchanged(rows: Tensor, sent: list[int], got: list[int], group: str) -> Tensor:
    out = rows.new_empty([sum(got), *rows.shape[1:]])
    dist.all_to_all_single(out, rows.contiguous(), got, sent, group=resolve_process_group(group))  # type: ignore[arg-type]
    return out


def _exchange_counts(ends: Tensor, parts: int, group: str) -> Tensor:
    sent = counts_of(ends, parts).contiguous()
    got = torch.empty_like(sent)
    dist.all_to_all_single(got, sent, group=resolve_process_group(group))  # type: ignore[arg-type]
    return got


def _dispatch_rows(rows: Tensor, ends: Tensor, received: Tensor, declared: int, group: str) -> Tensor:
    sent, got = sizes(counts_of(ends, received.shape[0])), received.tolist()
    return in_order(_exchanged(rows, sent, [sum(of_rank) for of_rank in got], group), got)


def _combine_rows(rows: Tensor, ends: Tensor, received: Tensor, count: int, group: str) -> Tensor:
    sent, got = sizes(counts_of(ends, received.shape[0])), received.tolist()
    return _exchanged(by_rank(rows, got), [sum(of_rank) for of_rank in got], sent, group)


# -- between simulated ranks: one list entry per member of a group, in order ------------------------


def _simulated_counts(ends: list[Tensor]) -> list[Tensor]:
    sent = [counts_of(e, len(ends)) for e in ends]
    return [torch.stack([s[i] for s in sent]) for i in range(len(ends))]


def _simulated_dispatch(rows: list[Tensor], ends: list[Tensor], received: list[Tensor]) -> list[Tensor]:
    blocks = [r.split(sizes(counts_of(e, len(rows)))) for r, e in zip(rows, ends, strict=True)]
    return [in_order(torch.cat([b[i] for b in blocks]), got.tolist()) for i, got in enumerate(received)]


def _simulated_combine(rows: list[Tensor], ends: list[Tensor], received: list[Tensor]) -> list[Tensor]:
    blocks = [by_rank(r, got.tolist()).split(sizes(got)) for r, got in zip(rows, received, strict=True)]
    return [torch.cat([b[i] for b in blocks]) for i in range(len(rows))]


# -- without an exchange: every rank has all rows, and takes those of its groups --------------------


def _own(ends: Tensor, parts: int, part: int) -> slice:
    groups, limits = ends.shape[0] // parts, [0, *ends.tolist()]
    return slice(limits[part * groups], limits[(part + 1) * groups])


def _own_rows(x: Tensor, source: Tensor, ends: Tensor, parts: int, part: int, declared: int) -> Tensor:
    return x.index_select(0, source[_own(ends, parts, int(part))])


def _add_own_rows(rows: Tensor, target: Tensor, ends: Tensor, size: int, parts: int, part: int) -> Tensor:
    made = rows.new_zeros([size, *rows.shape[1:]])
    return made.index_add(0, target[_own(ends, parts, int(part))], rows)


def _fake_counts(ends: Tensor, parts: int, group: str) -> Tensor:
    return ends.new_empty([parts, ends.shape[0] // parts], dtype=torch.int64)


def _fake_rows(x: Tensor, count: int) -> Tensor:
    return x.new_empty([count, *x.shape[1:]])


for _name, _kernel, _fake in (
    ("exchange_counts", _exchange_counts, _fake_counts),
    ("dispatch_rows", _dispatch_rows, lambda rows, ends, received, declared, group: _fake_rows(rows, declared)),
    ("combine_rows", _combine_rows, lambda rows, ends, received, count, group: _fake_rows(rows, count)),
    ("own_rows", _own_rows, lambda x, source, ends, parts, part, declared: _fake_rows(x, declared)),
    ("add_own_rows", _add_own_rows, lambda rows, target, ends, size, parts, part: _fake_rows(rows, size)),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"autopar::{_name}", _fake, lib=_library)

simulate_exchange(_library, "exchange_counts", _simulated_counts)
simulate_exchange(_library, "dispatch_rows", _simulated_dispatch)
simulate_exchange(_library, "combine_rows", _simulated_combine)

EXCHANGES = frozenset(
    {
        torch.ops.autopar.exchange_counts.default,
        torch.ops.autopar.dispatch_rows.default,
        torch.ops.autopar.combine_rows.default,
    }
)
