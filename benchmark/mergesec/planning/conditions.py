"""Conditions between a component's parameters, as its card writes them: ``low <= high``.

The syntax is Python's, of which names of parameters, numbers, texts, sums, products, comparisons, ``and``, ``or``
and ``not`` are taken. Nothing is executed.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

_SUMS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
}  # fmt: skip
_ORDERS: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}  # fmt: skip
_TAKEN: tuple[type, ...] = (
    ast.BoolOp, ast.BinOp, ast.Compare, ast.Constant, ast.UnaryOp, ast.And, ast.Or, ast.Not, ast.USub, ast.Load,
    *_SUMS, *_ORDERS,
)  # fmt: skip


@lru_cache(maxsize=1024)
def _parsed(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def names_in(text: str) -> tuple[str, ...]:
    """The parameters that a condition is of, in its order. ValueError for text that is not one."""
    try:
        tree = _parsed(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("not a condition") from None
    found: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            found.append((node.col_offset, node.id))
        elif not isinstance(node, _TAKEN):
            raise ValueError(f"a condition has no {type(node).__name__}")
    if not isinstance(tree, (ast.BoolOp, ast.Compare)) or not found:
        raise ValueError("a condition compares parameters")
    return tuple(dict.fromkeys(name for _, name in sorted(found)))


def is_broken(text: str, values: Mapping[str, Any]) -> bool:
    """Whether the values break a condition. One that compares a text with a number, as where a value is still
    ``"published"``, is not judged."""
    try:
        return not _value(_parsed(text), values)
    except TypeError:
        return False


def _value(node: ast.expr, values: Mapping[str, Any]) -> Any:
    match node:
        case ast.Name(id=name):
            return values[name]
        case ast.Constant(value=value):
            return value
        case ast.BoolOp(op=ast.And(), values=parts):
            return all(_value(p, values) for p in parts)
        case ast.BoolOp(values=parts):
            return any(_value(p, values) for p in parts)
        case ast.UnaryOp(op=ast.Not(), operand=part):
            return not _value(part, values)
        case ast.UnaryOp(operand=part):
            return -_value(part, values)
        case ast.BinOp(left=left, op=op, right=right):
            return _SUMS[type(op)](_value(left, values), _value(right, values))
        case ast.Compare(left=left, ops=ops, comparators=others):
            sides = [_value(n, values) for n in (left, *others)]
            return all(_ORDERS[type(o)](a, b) for o, a, b in zip(ops, sides, sides[1:], strict=False))
    raise TypeError(type(node).__name__)  # names_in has refused it
