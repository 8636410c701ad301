"""The planning problem as a linear model.

Indices: o, w ops; c choices; v values; q the state a value is made in; p a state it is
wanted in; e a use (of one value by one op; `Use.rerun` if by an op that runs again).
All columns are >= 0; (B) marks the binary ones, the others are then integral by themselves
in some optimal solution, as argued below.

    x[o,c] (B)      op o takes choice c. Ops tied together share it        `_add_choices`
                    (twins share all columns, and so do values that
                    twins make and use: identical layers cost one)         `_value_rows`
    y[o,c], R[o](B) op o takes choice c and runs again; R = sum_c y        `_add_reruns`
    f[e,q,q]        use e takes v as it was made                           `_add_value`
    f[e,q,p]        use e takes a copy converted from q to p               `add_own`, `add_later`
    W[v,q,p]        the copy is made in the pass that makes v              `add_own`
    KC[v,q,p] (B)   that copy is kept for the backward pass                `add_own`
    WB[v,q,p]       the copy is made in the backward pass                  `add_later`
    KO[v,q]         the original is kept for the backward pass             `_add_value`
    A[v,q], B[v](B) it waits for the backward pass on the host; B = sum_q A`_add_offload`

    minimise  sum cost_s (x + y) + sum convert_s (W + WB) + sum offload_s A   subject to
    one choice      sum_c x[o,c] = 1                                       `_add_choices`
    rerun           y[o,c] <= x[o,c],  sum_c y[o,c] = R[o]                 `_add_reruns`
    made            sum_p f[e,q,p] = made[v,q]  (<= if rerun)              `_add_use`
    wanted          sum_q f[e,q,p] = wanted[e,p]                           `_add_use`
    copies          f <= W, f <= KC or f <= WB, as served                  `add_own`, `add_later`
    kept copies     KC <= W <= sum_e f[e,q,p]                              `add_own`
    availability    f[e,q,q] + sum_p fB[e,q,p] <= KO[q] + A[q] + Y[q]      `_add_use`
                    (fB: served by WB; Y = made by y; left out if e is early)
    offload         A[v,q] <= made[v,q],  sum_q A[v,q] = B[v]              `_add_offload`
    host            sum of bytes of A and x on the host <= its capacity    `_add_host`
    memory          sum of bytes alive at t <= capacity, as they bind      `LinearModel.add_memory_row`

where made[v,q] sums x over the choices that make q, and wanted[e,p] sums x (y for a rerun
use) over the choices that take p. Why the rest is integral: with x, y integral, made and
wanted are unit vectors, hence f is; with KC integral too, the flow of a backward use is
served wholly by KC where KC = 1 and by WB where not (any other split costs at least as
much), A = made where B = 1, and W, WB, KO are the largest of some integral flows, in cost and in memory.

Where memory is free (`memory=False`) everything is kept: y, R, KO, A, B, KC and availability
fall away, and a backward use may take any copy that the forward pass made.

Columns W, KC, f and WB, f come in *groups*, one per (v, q, p), and only when they pay:
there are some 600 per value with 25 states. `price` finds those that do: group gains
bound what forcing the group in can save, since the duals of the group's own rows can be
chosen best after the fact.
"""

from __future__ import annotations

import numpy as np

from autopar.solver.lifetimes import Kinds, Span, Use, ValueLife, distinct_uses, value_kinds
from autopar.solver.linear import Floats, LinearModel
from autopar.solver.problem import Op, Problem, Value
from autopar.solver.rows import Held, Terms, UseRows, ValueRows, sized, terms

HOST_UNITS = 1e4  # the largest of the host's capacity and what is put there, in the model's unit


class Formulation:
    """The model of a problem, and the way from its columns back to decisions.

    memory: whether memory is limited at all. cost_scale: model cost per second. kinds: if known, see
    `lifetimes.value_kinds`.
    """

    def __init__(
        self,
        problem: Problem,
        lives: tuple[ValueLife, ...],
        model: LinearModel,
        cost_scale: float,
        *,
        memory: bool,
        kinds: Kinds | None = None,
    ) -> None:
        self.problem, self.lives, self.model = problem, lives, model
        self.cost_scale, self.memory = cost_scale, memory
        self.x: list[list[int]] = []
        self.y: dict[int, list[int]] = {}
        self.reruns: dict[int, int] = {}
        self._holds: dict[tuple[int, ...], Held] = {}
        self.host_row, self.host_scale = self._add_host()
        self._add_choices()
        if memory:
            self._add_reruns()
        self._add_costs()
        self.values = self._value_rows(value_kinds(problem, lives) if kinds is None else kinds)

    # -- the host ----------------------------------------------------------------

    def _add_host(self) -> tuple[int | None, float]:
        """The row of the host's memory, and its unit per byte, such that its numbers are neither tiny nor huge."""
        limit = self.problem.host_capacity_bytes
        if limit is None:
            return None, 1.0
        values = [max(v.state_bytes, default=0) for v in self.problem.values if v.offload_s is not None]
        choices = [c.host_bytes for op in self.problem.ops for c in op.choices]
        scale = HOST_UNITS / max(limit, *values, *choices, 1)
        return self.model.add_row(-np.inf, limit * scale), scale

    def _put_on_host(self, column: int, nbytes: float) -> None:
        if self.host_row is not None and nbytes:
            self.model.add_entry(self.host_row, column, nbytes * self.host_scale)

    # -- ops ---------------------------------------------------------------------

    def _add_choices(self) -> None:
        model = self.model
        for o, op in enumerate(self.problem.ops):
            leader = op.twin_of if op.twin_of is not None else op.tied_to
            if leader is None:
                self.x.append([model.add_column(0.0, integer=True) for _ in op.choices])
                model.add_row(1.0, 1.0, [(column, 1.0) for column in self.x[o]])
            else:
                self.x.append(self.x[leader])
            held = self._held(self.x[o], op)
            held.ops += 1
            model.hold_all(held.persistent, (0, model.times - 1))
            model.hold_all(held.workspace, (o, o))
            for column, nbytes in zip(*held.host, strict=True):
                self._put_on_host(column, nbytes)
            for v, sizes in zip(op.results, held.results, strict=True):
                model.hold_all(sizes, self.lives[v].base)

    def _add_reruns(self) -> None:
        model = self.model
        for o, op in enumerate(self.problem.ops):
            if op.recompute_time is None:
                continue
            at = (op.recompute_time, op.recompute_time)
            if op.twin_of is None:
                self._add_rerun(o)
            else:
                self.y[o], self.reruns[o] = self.y[op.twin_of], self.reruns[op.twin_of]
            held = self._held(self.y[o], op)
            held.ops += 1
            model.hold_all(held.workspace, at)
            for v, sizes in zip(op.results, held.results, strict=True):
                model.hold_all(sizes, self.lives[v].rerun)

    def _held(self, columns: list[int], op: Op) -> Held:
        """What the choices of an op cost and hold if these are their columns; identical layers share it."""
        sizes = [self.problem.values[v].state_bytes for v in op.results]
        key = (id(columns), id(op.choices), *map(id, sizes))
        if key not in self._holds:
            persistent = sized(columns, [c.persistent_bytes for c in op.choices])
            workspace = sized(columns, [c.workspace_bytes for c in op.choices])
            host = sized(columns, [c.host_bytes for c in op.choices])
            results = [sized(columns, [of[c.makes[r]] for c in op.choices]) for r, of in enumerate(sizes)]
            seconds = [c.cost_s for c in op.choices]
            self._holds[key] = Held(columns, seconds, persistent, workspace, host, results)
        return self._holds[key]

    def _add_costs(self) -> None:
        for held in self._holds.values():
            for column, seconds in zip(held.columns, held.seconds, strict=True):
                self.model.cost[column] += self.cost_scale * seconds * held.ops

    def _add_rerun(self, o: int) -> None:
        model, op = self.model, self.problem.ops[o]
        self.y[o] = [model.add_column(0.0) for _ in op.choices]
        self.reruns[o] = model.add_column(0.0, integer=True)
        model.add_row(0.0, 0.0, [(self.reruns[o], -1.0), *((column, 1.0) for column in self.y[o])])
        if op.must_rerun:
            model.add_row(1.0, 1.0, [(self.reruns[o], 1.0)])
        for column, once in zip(self.y[o], self.x[o], strict=True):
            model.add_row(-np.inf, 0.0, [(column, 1.0), (once, -1.0)])

    # -- values ------------------------------------------------------------------

    def _value_rows(self, kinds: Kinds) -> list[ValueRows]:
        """The rows of every value: its own, or those of the value that does the same in an identical layer."""
        leader = {v: members[0] for members in kinds for v in members}
        found: list[ValueRows] = []
        for v, life in enumerate(self.lives):
            if leader[v] == v:
                found.append(self._add_value(v, life))
                continue
            rows = found[leader[v]]
            rows.lives.append(life)
            self._add_waiting(v, life, rows.keep, rows.away)
            found.append(rows)
        return found

    def _add_value(self, v: int, life: ValueLife) -> ValueRows:
        value = self.problem.values[v]
        made = terms(self.x[life.made_by], [c.makes[life.result] for c in self.problem.ops[life.made_by].choices])
        again: Terms = {}
        if life.made_by in self.y:
            again = terms(self.y[life.made_by], [c.makes[life.result] for c in self.problem.ops[life.made_by].choices])
        sources = sorted(made)
        keep: dict[int, int] = {}
        away: dict[int, int] = {}
        offloaded: int | None = None
        if self.memory and life.needs_keeping:
            if value.may_keep:
                keep = {q: self.model.add_column(0.0) for q in sources}
            away, offloaded = self._add_offload(value, made)
            self._add_waiting(v, life, keep, away)
        waits = {q: [some[q] for some in (keep, away) if q in some] for q in sources}
        ways = [waits, {q: [*waits[q], *again.get(q, ())] for q in sources}]  # to be there; for early uses, for others
        limited = self.memory and life.needs_keeping
        own = [self._add_use(v, use, made, sources, None) for use in distinct_uses(self.problem, life.own_uses)]
        later = [
            self._add_use(v, use, made, sources, ways[not use.early] if limited else None)
            for use in distinct_uses(self.problem, life.later_uses)
            if not use.rerun or self.memory
        ]
        n = len(value.state_bytes)
        blocked = np.isinf(value.convert_s) | np.eye(n, dtype=bool)
        return ValueRows(v, [life], sources, own, later, blocked.copy(), blocked.copy(), keep, away, offloaded)

    def _add_offload(self, value: Value, made: Terms) -> tuple[dict[int, int], int | None]:
        """Columns A of the states in which a value may be offloaded, and B, if there are any."""
        seconds = value.offload_s or (np.inf,) * len(value.state_bytes)
        states = [q for q in sorted(made) if seconds[q] < np.inf]
        if not states:
            return {}, None
        away = {q: self.model.add_column(0.0) for q in states}
        for q, column in away.items():
            self.model.add_row(-np.inf, 0.0, [(column, 1.0), *((c, -1.0) for c in made[q])])
        offloaded = self.model.add_column(0.0, integer=True)
        self.model.add_row(0.0, 0.0, [(offloaded, -1.0), *((column, 1.0) for column in away.values())])
        return away, offloaded

    def _add_waiting(self, v: int, life: ValueLife, keep: dict[int, int], away: dict[int, int]) -> None:
        """What columns KO and A cost and hold for one of the values that share them."""
        value = self.problem.values[v]
        for q, column in keep.items():
            self.model.hold(column, life.kept, value.state_bytes[q])
        for q, column in away.items():
            assert value.offload_s is not None
            self.model.cost[column] += self.cost_scale * value.offload_s[q]
            self.model.hold(column, life.fetched, value.state_bytes[q])
            self._put_on_host(column, value.state_bytes[q])

    def _add_use(self, v: int, use: Use, made: Terms, sources: list[int], ways: Terms | None) -> UseRows:
        """The rows of a use. ways: columns by which the original is there, per state; None if it always is."""
        model, op = self.model, self.problem.ops[use.op]
        wanted = terms(self.y[use.op] if use.rerun else self.x[use.op], [c.uses[use.slot] for c in op.choices])
        low = -np.inf if use.rerun else 0.0
        made_rows = np.array([model.add_row(low, 0.0, [(c, -1.0) for c in made[q]]) for q in sources], dtype=np.int64)
        wanted_rows = np.full(len(self.problem.values[v].state_bytes), -1, dtype=np.int64)
        for p, columns in wanted.items():
            wanted_rows[p] = model.add_row(0.0, 0.0, [(c, -1.0) for c in columns])
        available = None
        if ways is not None:
            available = np.array(
                [model.add_row(-np.inf, 0.0, [(c, -1.0) for c in ways[q]]) for q in sources], dtype=np.int64
            )
        for i, q in enumerate(sources):
            if wanted_rows[q] >= 0:
                rows = [(int(made_rows[i]), 1.0), (int(wanted_rows[q]), 1.0)]
                model.add_column(0.0, rows if available is None else [*rows, (int(available[i]), 1.0)])
        return UseRows(use, made_rows, wanted_rows, available, self._alias_bytes(v, use))

    def _alias_bytes(self, v: int, use: Use) -> Floats | None:
        if not use.alias:
            return None
        op = self.problem.ops[use.op]
        result = self.problem.values[op.results[0]]
        size = np.zeros(len(self.problem.values[v].state_bytes))
        for choice in op.choices:
            size[choice.uses[0]] = 0 if result.always_available else result.state_bytes[choice.makes[0]]
        return size

    def owners(self) -> list[tuple[int, ValueRows]]:
        """The values that have rows of their own, with these."""
        return [(v, rows) for v, rows in enumerate(self.values) if rows.owner == v]

    # -- groups of conversions ---------------------------------------------------

    def add_own(self, v: int, q: int, p: int) -> None:
        """Let v be converted from q to p in the pass that makes it (and the copy be kept, if v has later uses)."""
        rows, value = self.values[v], self.problem.values[v]
        rows.own_there[q, p] = True
        takers = [u for u in rows.own if u.wanted[p] >= 0]
        if not takers or q not in rows.sources:
            return
        cost = self.cost_scale * float(value.convert_s[q, p]) * len(rows.lives)
        spans = [life.own_copy for life in rows.lives]
        copy, flows = self._add_copy(rows, takers, q, p, cost, spans, value.copy_bytes(q, p))
        later = [u for u in rows.later if u.wanted[p] >= 0]
        if not later or not value.keeps_copy(p):
            return
        source = copy
        if self.memory:
            if flows != [copy]:
                self.model.add_row(-np.inf, 0.0, [(copy, 1.0), *((f, -1.0) for f in flows)])
            source = rows.kept_copies[q, p] = self.model.add_column(0.0, integer=True)
            for life in rows.lives:
                self.model.hold(source, life.kept_copy, value.state_bytes[p])
            self.model.add_row(-np.inf, 0.0, [(source, 1.0), (copy, -1.0)])
        for taker in later:
            flow = self._add_flow(rows, taker, q, p)
            self.model.add_row(-np.inf, 0.0, [(flow, 1.0), (source, -1.0)])

    def add_later(self, v: int, q: int, p: int) -> None:
        """Let the forward value v be converted from q to p in the backward pass."""
        rows, value = self.values[v], self.problem.values[v]
        rows.later_there[q, p] = True
        takers = [u for u in rows.later if u.wanted[p] >= 0]
        if takers and q in rows.sources:
            cost = self.cost_scale * float(value.convert_s[q, p]) * len(rows.lives)
            spans = [life.later_copy for life in rows.lives]
            _, flows = self._add_copy(rows, takers, q, p, cost, spans, value.copy_bytes(q, p))
            for flow, taker in zip(flows, takers, strict=True):
                if taker.available is not None:
                    self.model.add_entry(int(taker.available[rows.sources.index(q)]), flow, 1.0)

    def _add_copy(
        self, rows: ValueRows, takers: list[UseRows], q: int, p: int, cost: float, spans: list[Span | None], size: int
    ) -> tuple[int, list[int]]:
        """The column of one converted copy, and the flows of its takers (the column itself if there is one taker)."""
        model = self.model
        counted = [u.alias_bytes is None for u in takers]
        flows = [self._add_flow(rows, taker, q, p) for taker in takers]
        if len(takers) == 1:
            copy = flows[0]
            model.cost[copy] = cost
            for span in spans:
                model.hold(copy, span, size if counted[0] else 0)
            return copy, flows
        copy = model.add_column(cost)
        holder = copy
        if any(counted) and not all(counted):
            holder = model.add_column(0.0)
            model.add_row(-np.inf, 0.0, [(holder, 1.0), (copy, -1.0)])
        for span in spans:
            model.hold(holder, span, size if any(counted) else 0)
        for flow, counts in zip(flows, counted, strict=True):
            model.add_row(-np.inf, 0.0, [(flow, 1.0), (holder if counts else copy, -1.0)])
        return copy, flows

    def _add_flow(self, rows: ValueRows, taker: UseRows, q: int, p: int) -> int:
        made, wanted = int(taker.made[rows.sources.index(q)]), int(taker.wanted[p])
        column = self.model.add_column(0.0, [(made, 1.0), (wanted, 1.0)])
        workspace = self.problem.values[rows.owner].workspace_bytes(q, p)
        if taker.alias_bytes is not None:
            for op in taker.ops(rows.lives):
                self.model.hold(column, (op, op), float(taker.alias_bytes[p]) + workspace)
        return column

    # -- back --------------------------------------------------------------------

    def decisions(self, values: Floats) -> tuple[tuple[int, ...], list[int], list[tuple[int, int]], list[int]]:
        """(choices, recomputed, kept copies, offloaded) of an integral solution; the likeliest of any other."""
        choices = tuple(int(np.argmax(values[columns])) for columns in self.x)
        recomputed = [o for o, column in self.reruns.items() if values[column] > 0.5]
        copies: list[tuple[int, int]] = []
        for v, rows in enumerate(self.values):
            if not self.memory:
                copies.extend((v, p) for p in range(len(rows.own_there)))
            copies.extend((v, p) for (_, p), column in rows.kept_copies.items() if values[column] > 0.5)
        away = [v for v, rows in enumerate(self.values) if rows.offloaded is not None and values[rows.offloaded] > 0.5]
        return choices, recomputed, copies, away
