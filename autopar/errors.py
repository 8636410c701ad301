"""Every error autopar raises on purpose, in one small tree.

    AutoparError
    +-- TraceError          the model could not be captured
    +-- ClusterSpecError    a cluster description is wrong (unknown preset, unknown key, impossible number)
    +-- PlanError           a plan file cannot be used (corrupt, truncated, newer)
    |   +-- PlanMismatch    a good plan, but for another model, batch or world size
    +-- PinError            a pin names nothing, or asks for something illegal
    +-- LayoutError         a layout is misspelt, or no model or cluster can be cut that way
    +-- Infeasible          no plan satisfies the limits
    +-- VerifyError         the emitted program differs from the single-device model
    +-- RuntimeFailure      a rank died, or the program was called outside torchrun

Each message says what is wrong, where, and what to do about it, in this order.
"""

from __future__ import annotations

from autopar.fixes import Fix, any_one_of


class AutoparError(Exception):
    """Base of all errors that autopar raises on purpose."""


class TraceError(AutoparError):
    """The model could not be captured; `source` is the user's line where known."""

    def __init__(self, message: str, source: str | None = None) -> None:
        super().__init__(message)
        self.source = source


class ClusterSpecError(AutoparError):
    """A cluster description is wrong."""


class PlanError(AutoparError):
    """A plan file cannot be read or used."""


class PlanMismatch(PlanError):
    """The plan was made for another model, batch or world size."""


class PinError(AutoparError):
    """A pin matches nothing or asks for an illegal placement."""


class LayoutError(AutoparError):
    """A layout is misspelt, or does not fit the cluster, the batch or the model."""


class Infeasible(AutoparError):
    """No plan fits; `needed_bytes` is the smallest limit found that would, `bound_bytes` what was proven, where known.

    short_by_bytes: beyond the limit. where: the peak is. fixes: single changes each of which was priced and fits, the
        cheapest first (`autopar.fixes.Fix`). headline: the message without them. advice: instead of them.
    The bound is that of the planner's own account of memory, which counts some bytes too long: the simulated memory of
    a program may be a little less.
    """

    def __init__(
        self,
        message: str,
        needed_bytes: int | None = None,
        where: str | None = None,
        bound_bytes: int | None = None,
        short_by_bytes: int | None = None,
        fixes: tuple[Fix, ...] = (),
        advice: str = "",
    ) -> None:
        remedy = any_one_of(fixes) or advice
        super().__init__(f"{message}; {remedy}" if remedy else message)
        self.headline, self.advice = message, advice
        self.needed_bytes = needed_bytes
        self.where = where
        self.bound_bytes = bound_bytes
        self.short_by_bytes = short_by_bytes
        self.fixes = fixes

    def with_fixes(self, fixes: tuple[Fix, ...]) -> Infeasible:
        """The same, with what would help."""
        return Infeasible(
            self.headline, self.needed_bytes, self.where, self.bound_bytes, self.short_by_bytes, fixes, self.advice
        )

    def to_dict(self) -> dict[str, object]:
        """As data."""
        return {
            "error": self.headline,
            "needed_bytes": self.needed_bytes,
            "short_by_bytes": self.short_by_bytes,
            "where": self.where,
            "fixes": [fix.to_dict() for fix in self.fixes],
        }


class VerifyError(AutoparError):
    """The emitted program is not equal to the single-device model; `node` is the first that differs."""

    def __init__(self, message: str, node: str | None = None) -> None:
        super().__init__(message)
        self.node = node


class RuntimeFailure(AutoparError):
    """The program cannot run here: no process group, or a rank died."""
