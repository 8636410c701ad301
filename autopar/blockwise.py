"""Attention of some queries over some keys of a longer sequence, and the sum of such parts (online softmax).

The ops here are what sequence-parallel attention is made of. Queries and keys come as one or more chunks of equal
length, of which only the positions in the whole sequence are given. What a chunk of queries sees of a chunk of keys
(all, nothing, the past, a window) follows from the positions alone, so only what is seen is computed, and no mask of
the whole sequence ever exists. The numbers come from torch's fused kernels.

    block_attention           -> (out, logsumexp); a query that sees nothing gets 0 and -inf
    further_attention         such results made, in place, as if over these keys as well
    block_attention_backward  -> gradients, given out and logsumexp over *all* keys: the parts only add up
    further_attention_backward  gradients so far (of keys and values glued along the batch) and these, in place

[batch, head, sequence, width]; keys and values may have fewer heads (grouped queries). Sums are in the dtype of the
logsumexp: float32 for narrower tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import torch

from autopar import attention_kernels as kernels

ours = torch.ops.autopar
_TILE = 128  # rows of a window that share one small mask: more waste scores, fewer waste launches

_library = torch.library.Library("autopar", "FRAGMENT")
_PLACES = "SymInt[] query_starts, SymInt[] key_starts, bool is_causal, int window, float? scale"
_library.define(
    f"block_attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, {_PLACES}) -> (Tensor, Tensor)"
)
_library.define(
    "block_attention_backward(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, "
    f"Tensor? attn_mask, {_PLACES}) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "further_attention(Tensor(a!) out, Tensor(b!) logsumexp, Tensor query, Tensor key, Tensor value, "
    f"Tensor? attn_mask, {_PLACES}) -> (Tensor(a!), Tensor(b!))"
)
_library.define(
    "further_attention_backward(Tensor(a!) grad_query, Tensor(b!) grad_both, Tensor grad_out, Tensor query, "
    f"Tensor both, Tensor out, Tensor logsumexp, Tensor? attn_mask, {_PLACES}) -> (Tensor(a!), Tensor(b!))"
)


class Sight(Enum):
    """What rows see of columns: everything, a causal kernel's half, or a band that takes a mask."""

    FULL = "full"
    CAUSAL = "causal"
    BAND = "band"


@dataclass(frozen=True)
class Piece:
    """Rows (queries) and the columns (keys) that they see something of.

    rows, columns: [start, end) in the tensors at hand. ahead: of a band, the position of the first row less that of
    the first column.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    sight: Sight
    ahead: int = 0


def pieces(
    query_starts: Sequence[int], key_starts: Sequence[int], sizes: tuple[int, int], is_causal: bool, window: int
) -> list[Piece]:
    """What there is to compute. sizes: how many queries and keys the tensors hold. window: 0 if there is none."""
    rows, columns = sizes
    if not is_causal:
        return [Piece((0, rows), (0, columns), Sight.FULL)]
    starts = tuple(query_starts)
    if starts == tuple(key_starts) and rows == columns and list(starts) == sorted(starts) and not window:
        return [Piece((0, rows), (0, columns), Sight.CAUSAL)]
    height, width = rows // len(starts), columns // len(key_starts)
    found: list[Piece] = []
    for i, a in enumerate(starts):
        for j, b in enumerate(key_starts):
            found += _pair((i * height, (i + 1) * height), (j * width, (j + 1) * width), a - b, window)
    return _joined(_joined(found, by_rows=False), by_rows=True)


def _pair(rows: tuple[int, int], columns: tuple[int, int], ahead: int, window: int) -> list[Piece]:
    """A chunk of queries and one of keys."""
    height, width = rows[1] - rows[0], columns[1] - columns[0]
    nearest, farthest = ahead - (width - 1), ahead + height - 1  # distances from query back to key
    if farthest < 0 or (window and nearest >= window):
        return []
    if nearest >= 0 and (not window or farthest < window):
        return [Piece(rows, columns, Sight.FULL)]
    if ahead == 0 and height == width and (not window or window >= height):
        return [Piece(rows, columns, Sight.CAUSAL)]
    found = []
    for top in range(0, height, _TILE):
        bottom = min(top + _TILE, height)
        first = max(0, ahead + top - window + 1) if window else 0
        last = min(width, ahead + bottom)
        if first < last:
            seen = last - 1 <= ahead + top and (not window or ahead + bottom - 1 - first < window)
            place = (rows[0] + top, rows[0] + bottom), (columns[0] + first, columns[0] + last)
            found.append(Piece(*place, Sight.FULL) if seen else Piece(*place, Sight.BAND, ahead + top - first))
    return found


def _joined(found: list[Piece], *, by_rows: bool) -> list[Piece]:
    """Neighbours that are seen whole become one piece: one launch."""
    made: list[Piece] = []
    for piece in found:
        last = made[-1] if made else None
        if last is not None and last.sight is piece.sight is Sight.FULL:
            if not by_rows and last.rows == piece.rows and last.columns[1] == piece.columns[0]:
                made[-1] = replace(last, columns=(last.columns[0], piece.columns[1]))
                continue
            if by_rows and last.columns == piece.columns and last.rows[1] == piece.rows[0]:
                made[-1] = replace(last, rows=(last.rows[0], piece.rows[1]))
                continue
        made.append(piece)
    return made


def _mask_of(
    piece: Piece, attn_mask: torch.Tensor | None, key_starts: Sequence[int], window: int, query: torch.Tensor, keys: int
) -> torch.Tensor | None:
    """The additive mask of a piece; None if it needs none. attn_mask: of the keys at hand, or of all keys there are."""
    if attn_mask is not None:
        first = piece.columns[0] + (int(key_starts[0]) if attn_mask.shape[-1] != keys else 0)
        mask = attn_mask[..., first : first + piece.columns[1] - piece.columns[0]]
        return mask if mask.shape[-2] == 1 else mask[..., slice(*piece.rows), :]
    if piece.sight is not Sight.BAND:
        return None
    rows = torch.arange(piece.rows[1] - piece.rows[0], device=query.device).unsqueeze(1) + piece.ahead
    distance = rows - torch.arange(piece.columns[1] - piece.columns[0], device=query.device)
    hidden = (distance < 0) | (distance >= window) if window else distance < 0
    return torch.zeros(hidden.shape, dtype=query.dtype, device=query.device).masked_fill_(hidden, -torch.inf)


# -- forward --------------------------------------------------------------------------------


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    query_starts: Sequence[int],
    key_starts: Sequence[int],
    is_causal: bool,
    window: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    wanted = pieces(_ints(query_starts), _ints(key_starts), (rows, keys), is_causal, window)
    out, lse = _fake_attention(query)
    done: list[tuple[int, int]] = []
    for piece in wanted:
        mask = _mask_of(piece, attn_mask, key_starts, window, query, keys)
        at, seen = slice(*piece.rows), slice(*piece.columns)
        causal = piece.sight is Sight.CAUSAL
        made, made_lse = kernels.forward(query[:, :, at], key[:, :, seen], value[:, :, seen], mask, causal, scale)
        if len(wanted) == 1 and piece.rows == (0, rows):
            return made, made_lse
        if piece.rows in done:
            _merge(out[:, :, at], lse[:, :, at], made, made_lse)
            continue
        if any(a < piece.rows[1] and piece.rows[0] < b for a, b in done):
            raise ValueError(f"rows {piece.rows} overlap {done}")
        out[:, :, at], lse[:, :, at] = made, made_lse
        done.append(piece.rows)
    at_row = 0
    for first, last in [*sorted(set(done)), (rows, rows)]:
        if first > at_row:
            out[:, :, at_row:first], lse[:, :, at_row:first] = 0.0, -torch.inf
        at_row = last
    return out, lse


def _fake_attention(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Results laid out as torch's kernels do: the sequence before the heads."""
    batch, heads, rows, width = query.shape
    out = query.new_empty((batch, rows, heads, width)).transpose(1, 2)
    return out, query.new_empty((batch, rows, heads), dtype=kernels.wide(query.dtype)).transpose(1, 2)


def _attend_further(
    out: torch.Tensor,
    lse: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    query_starts: Sequence[int],
    key_starts: Sequence[int],
    is_causal: bool,
    window: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    for piece in pieces(_ints(query_starts), _ints(key_starts), (rows, keys), is_causal, window):
        mask = _mask_of(piece, attn_mask, key_starts, window, query, keys)
        at, seen, causal = slice(*piece.rows), slice(*piece.columns), piece.sight is Sight.CAUSAL
        made = kernels.forward(query[:, :, at], key[:, :, seen], value[:, :, seen], mask, causal, scale)
        _merge(out[:, :, at], lse[:, :, at], *made)
    return out, lse


def _merge(out: torch.Tensor, lse: torch.Tensor, more_out: torch.Tensor, more_lse: torch.Tensor) -> None:
    """Two results over different keys, in the place of the first.

    Of the whole sum of exponentials, exp(lse) + exp(more), the second has the share 1 / (1 + exp(lse - more)).
    """
    apart = more_lse - lse  # nan where neither sees anything
    share = apart.sigmoid().nan_to_num_(0.0)
    out.lerp_(more_out.to(out.dtype), share.unsqueeze(-1).to(out.dtype))
    torch.logaddexp(lse, more_lse, out=lse)


# -- backward -------------------------------------------------------------------------------


def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    attn_mask: torch.Tensor | None,
    query_starts: Sequence[int],
    key_starts: Sequence[int],
    is_causal: bool,
    window: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, keys = query.shape[2], key.shape[2]
    grads = _fake_gradients(query, key, value)
    wanted = pieces(_ints(query_starts), _ints(key_starts), (rows, keys), is_causal, window)
    if any(piece.rows == (0, rows) and piece.columns == (0, keys) for piece in wanted[:1]):
        first, wanted = wanted[0], wanted[1:]
        mask = _mask_of(first, attn_mask, key_starts, window, query, keys)
        made = kernels.backward(
            kernels.Results(grad_out, out, logsumexp), query, key, value, mask, first.sight is Sight.CAUSAL, scale
        )
        grads = (made[0].to(grads[0].dtype), made[1].to(grads[1].dtype), made[2].to(grads[2].dtype))
    else:
        for grad in grads:
            grad.zero_()
    results = kernels.Results(grad_out, out, logsumexp)
    _add_backward(
        grads,
        wanted,
        results,
        (query, key, value),
        lambda p: _mask_of(p, attn_mask, key_starts, window, query, keys),
        scale,
    )
    return grads


def _add_backward(
    grads: Sequence[torch.Tensor],
    wanted: Sequence[Piece],
    results: kernels.Results,
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    mask_of: Callable[[Piece], torch.Tensor | None],
    scale: float | None,
) -> None:
    """Add what pieces give to the gradients of query, key and value."""
    query, key, value = operands
    for piece in wanted:
        at, seen, causal = slice(*piece.rows), slice(*piece.columns), piece.sight is Sight.CAUSAL
        here = kernels.Results(*(x[:, :, at] for x in (results.grad_out, results.out, results.logsumexp)))
        made = kernels.backward(
            here, query[:, :, at], key[:, :, seen], value[:, :, seen], mask_of(piece), causal, scale
        )
        for grad, part, where in zip(grads, made, (at, seen, seen), strict=True):
            grad[:, :, where] += part


def _attend_further_backward(
    grad_query: torch.Tensor,
    grad_both: torch.Tensor,
    grad_out: torch.Tensor,
    query: torch.Tensor,
    both: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    attn_mask: torch.Tensor | None,
    query_starts: Sequence[int],
    key_starts: Sequence[int],
    is_causal: bool,
    window: int,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    rows, keys = query.shape[2], both.shape[2]
    (key, value), grads = both.chunk(2), (grad_query, *grad_both.chunk(2))
    wanted = pieces(_ints(query_starts), _ints(key_starts), (rows, keys), is_causal, window)
    results = kernels.Results(grad_out, out, logsumexp)
    _add_backward(
        grads,
        wanted,
        results,
        (query, key, value),
        lambda p: _mask_of(p, attn_mask, key_starts, window, query, keys),
        scale,
    )
    return grad_query, grad_both


def _fake_gradients(*like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Laid out as torch's kernels do: the sequence before the heads."""
    query, key, value = (
        x.new_empty((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), dtype=kernels.wide(x.dtype)).transpose(1, 2)
        for x in like
    )
    return query, key, value


def _ints(values: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, values))


_library.impl("block_attention", _attend, "CompositeExplicitAutograd")
_library.impl("block_attention_backward", _attend_backward, "CompositeExplicitAutograd")
_library.impl("further_attention", _attend_further, "CompositeExplicitAutograd")
_library.impl("further_attention_backward", _attend_further_backward, "CompositeExplicitAutograd")
torch.library.register_fake("autopar::block_attention", lambda query, *_: _fake_attention(query), lib=_library)
torch.library.register_fake(
    "autopar::block_attention_backward", lambda g, q, k, v, *_: _fake_gradients(q, k, v), lib=_library
)
torch.library.register_fake("autopar::further_attention", lambda out, lse, *_: (out, lse), lib=_library)
torch.library.register_fake("autopar::further_attention_backward", lambda q, both, *_: (q, both), lib=_library)
