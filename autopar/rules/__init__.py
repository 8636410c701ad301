"""Operator knowledge as data: which placements an ATen op may take on one mesh axis."""

from autopar.rules.registry import axis_rules, compatible
from autopar.rules.schema import is_random, is_view, may_be_random, operands, results
from autopar.rules.types import AxisRule, InnerCollective, RuleSet

__all__ = [
    "AxisRule",
    "InnerCollective",
    "RuleSet",
    "axis_rules",
    "compatible",
    "is_random",
    "is_view",
    "may_be_random",
    "operands",
    "results",
]
