"""Merge rules as compiled loops: every input is read once, and what is made of it stays in registers.

torch needs a pass over memory for every elementary operation; here a rule takes ``WIDTH`` entries of
the base and of all experts through all of its operations at once. Needs numba (extra ``fast``);
``tensorwise`` imports this module when a merge is large enough to pay for it, and everything works
without it. The loops are written with explicit vectors, so that nothing hangs on a compiler's guess.

**Same bits.** Each kernel does torch's operations in torch's order and with torch's roundings: no
reassociation, and a fused multiply-add exactly where torch's vector code has one. Only where an input
is not finite, or zeros of both signs meet, may bits differ (torch then differs from itself).

All arrays are float32 ``[n]``, contiguous, n a multiple of ``LANES``, and given as addresses; ``others``
are the experts', int64 ``[T]``. Who calls keeps the tensors alive. ``after`` and ``reach`` say what
follows the rule: ``RAW`` nothing, ``ADD`` base + reach · rule, ``LERP`` base + reach · (rule − base).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

Function = TypeVar("Function", bound=Callable[..., Any])
Array = np.ndarray[Any, Any]

WIDTH = 32
"""Entries that go through a rule together: four vectors of 256 bits, so that additions need not wait."""
LANES = 64
"""torch adds up the rows of a matrix one after the other, except in what is left of so many columns."""
MOST_ROWS = 15
"""Beyond so many rows torch adds in groups."""
STRIP = 1024
"""Entries after which a loop that writes a row per expert turns to the next row."""
LOOK = 1 << 16
"""Entries for which a loop without such rows stays with an expert: the base's are near, the expert's come in order."""
SQUEEZES = bool(get_host_cpu_features().get("avx512f")) and not (
    numba.config.CPU_NAME or numba.config.CPU_FEATURES
)
"""Whether the processor has an instruction that puts marked entries side by side."""
RAW, ADD, LERP = 0, 1, 2


# --------------------------------------------------------------------------- vectors in compiled code


class _Row(types.Type):  # type: ignore[misc]
    """``WIDTH`` float32 in registers."""

    def __init__(self) -> None:
        super().__init__(name=f"Row{WIDTH}")


_ROW = _Row()
_FLOATS = ir.VectorType(ir.FloatType(), WIDTH)


@register_model(_Row)
class _RowModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


def _compiled(function: Function) -> Function:
    return numba.njit(nogil=True, cache=True, error_model="numpy")(function)  # type: ignore[no-any-return]


def _inlined(function: Function) -> Function:
    return numba.njit(inline="always", error_model="numpy")(function)  # type: ignore[no-any-return]


def _operation(signature: Any, emit: Callable[..., Any]) -> Any:
    """A function for compiled code that ``emit(builder, *arguments)`` writes in LLVM's language."""

    def generate(context: Any, builder: Any, made: Any, arguments: Any) -> Any:
        found = emit(builder, *arguments)
        return context.get_dummy_value() if found is None else found

    def typed(*_: Any) -> Any:
        return signature, generate

    operation: Any = typed
    # numba counts the arguments by name
    names = ("context", *(f"a{i}" for i in range(len(signature.args))))
    plain = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
    operation.__signature__ = inspect.Signature(plain)
    return intrinsic(operation)


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any) -> Any:
    found = builder.load(_pointer(builder, address, _FLOATS))
    found.align = 4
    return found


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, _pointer(builder, address, _FLOATS)).align = 4


def _load_bits(builder: Any, address: Any) -> Any:
    found = builder.load(_pointer(builder, address, ir.IntType(WIDTH)))
    found.align = 4
    return builder.uitofp(builder.bitcast(found, ir.VectorType(ir.IntType(1), WIDTH)), _FLOATS)


def _splat(builder: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), zeros)


def _built_in(name: str) -> Callable[..., Any]:
    def emit(builder: Any, *rows: Any) -> Any:
        kind = ir.FunctionType(_FLOATS, [_FLOATS] * len(rows))
        made = cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v{WIDTH}f32")
        return builder.call(made, rows)

    return emit


def _compare(how: str) -> Callable[..., Any]:
    return lambda builder, left, right, then, other: builder.select(
        builder.fcmp_ordered(how, left, right), then, other
    )


def _bits(how: str) -> Callable[..., Any]:
    def emit(builder: Any, left: Any, right: Any) -> Any:
        found = builder.bitcast(builder.fcmp_ordered(how, left, right), ir.IntType(WIDTH))
        return builder.zext(found, ir.IntType(64))

    return emit


def _store_bits(builder: Any, value: Any, address: Any) -> None:
    kind = ir.IntType(WIDTH)
    builder.store(builder.trunc(value, kind), _pointer(builder, address, kind)).align = 1


def _store_marked(builder: Any, row: Any, bits: Any, address: Any) -> None:
    """The marked entries side by side; what follows them, up to ``WIDTH`` entries, is overwritten. AVX-512 only."""
    half, marks = ir.VectorType(ir.FloatType(), 16), ir.VectorType(ir.IntType(1), 16)
    kind = ir.FunctionType(half, [half, half, marks])
    squeeze = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.mask.compress.v16f32")
    for start in range(0, WIDTH, 16):
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), 16), list(range(start, start + 16)))
        part = builder.shuffle_vector(row, row, lanes)
        own = builder.trunc(builder.lshr(bits, bits.type(start)), ir.IntType(16))
        found = builder.call(squeeze, [part, ir.Constant(half, [0.0] * 16), builder.bitcast(own, marks)])
        builder.store(found, _pointer(builder, address, half)).align = 4
        count = builder.zext(builder.ctpop(own), address.type)
        address = builder.add(address, builder.mul(count, address.type(4)))


_PAIR = _ROW(_ROW, _ROW)
_load_row = _operation(_ROW(types.int64), _load)
_load_one = _operation(types.float32(types.int64), lambda b, x: b.load(_pointer(b, x, ir.FloatType())))
_load_coins = _operation(_ROW(types.int64), _load_bits)
_store_row = _operation(types.none(_ROW, types.int64), _store)
_all = _operation(_ROW(types.float32), _splat)
_add = _operation(_PAIR, lambda b, x, y: b.fadd(x, y))
_sub = _operation(_PAIR, lambda b, x, y: b.fsub(x, y))
_mul = _operation(_PAIR, lambda b, x, y: b.fmul(x, y))
_div = _operation(_PAIR, lambda b, x, y: b.fdiv(x, y))
_fma = _operation(_ROW(_ROW, _ROW, _ROW), _built_in("fma"))
_abs = _operation(_ROW(_ROW), _built_in("fabs"))
_if_greater = _operation(_ROW(_ROW, _ROW, _ROW, _ROW), _compare(">"))
_if_at_least = _operation(_ROW(_ROW, _ROW, _ROW, _ROW), _compare(">="))
_greater = _operation(types.int64(_ROW, _ROW), _bits(">"))
_at_least = _operation(types.int64(_ROW, _ROW), _bits(">="))
_store_mask = _operation(types.none(types.int64, types.int64), _store_bits)
_store_squeezed = _operation(types.none(_ROW, types.int64, types.int64), _store_marked)
_ones = _operation(types.int64(types.int64), lambda b, x: b.ctpop(x))
_first = _operation(types.int64(types.int64), lambda b, x: b.cttz(x, ir.IntType(1)(0)))


@_inlined
def _finished(base: Any, rule: Any, after: Any, reach: Any) -> Any:
    """The rule's value, or where it leads from the base; lerp as torch writes it."""
    if after == 1:
        return _fma(rule, _all(reach), base)
    if after == 2:
        if abs(reach) < np.float32(0.5):
            return _fma(_all(reach), _sub(rule, base), base)
        return _fma(_all(reach - np.float32(1.0)), _sub(rule, base), rule)
    return rule


# --------------------------------------------------------------------------- rules


@_compiled
def mean(base: int, others: Array, out: int, size: int, after: int, reach: np.float32, shares: Array) -> None:
    """The running mean of the experts' weights; ``shares`` float32 ``[T]``: 1, 1/2, 1/3, ..."""
    for at in range(0, 4 * size, 4 * WIDTH):
        rule = _load_row(others[0] + at)
        for index in range(1, others.size):
            own, share = _load_row(others[index] + at), shares[index]
            if share < np.float32(0.5):
                rule = _fma(_all(share), _sub(own, rule), rule)
            else:
                rule = _fma(_all(share - np.float32(1.0)), _sub(own, rule), own)
        _store_row(_finished(_load_row(base + at), rule, after, reach), out + at)


@_compiled
def furthest(base: int, others: Array, out: int, size: int, after: int, reach: np.float32) -> None:
    """The weight that is furthest from the base; the larger of two equally far."""
    zero = _all(np.float32(0.0))
    for at in range(0, 4 * size, 4 * WIDTH):
        origin = _load_row(base + at)
        high = low = _load_row(others[0] + at)
        for index in range(1, others.size):
            own = _load_row(others[index] + at)
            high = _if_greater(high, own, high, own)
            low = _if_greater(own, low, low, own)
        picked = _if_at_least(_sub(high, origin), _sub(origin, low), high, low)
        picked = _add(picked, _mul(zero, _sub(high, low)))  # as lerp with weight 0 or 1
        _store_row(_finished(origin, picked, after, reach), out + at)


@_compiled
def elected(
    base: int, others: Array, out: int, size: int, after: int, reach: np.float32, below: Array
) -> None:
    """TIES' sum; entries up to ``below`` ``[T]`` in magnitude count as 0. See ``_ties.ties_into``."""
    zero, half = _all(np.float32(0.0)), _all(np.float32(0.5))
    for at in range(0, 4 * size, 4 * WIDTH):
        origin, total, mass = _load_row(base + at), zero, zero
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + at), origin)
            tau = _if_greater(_abs(tau), _all(below[index]), tau, zero)
            total = _add(total, tau)
            mass = _add(mass, _abs(tau))
        total = _mul(_if_at_least(total, zero, _add(total, mass), _sub(total, mass)), half)
        _store_row(_finished(origin, total, after, reach), out + at)


@_compiled
def elected_mean(
    base: int, others: Array, out: int, size: int, after: int, reach: np.float32, below: Array
) -> None:
    """TIES' disjoint mean."""
    zero, half = _all(np.float32(0.0)), _all(np.float32(0.5))
    one, minus = _all(np.float32(1.0)), _all(np.float32(-1.0))
    for at in range(0, 4 * size, 4 * WIDTH):
        origin, total, mass, surplus, agreeing = _load_row(base + at), zero, zero, zero, zero
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + at), origin)
            tau = _if_greater(_abs(tau), _all(below[index]), tau, zero)
            total = _add(total, tau)
            mass = _add(mass, _abs(tau))
            sign = _if_greater(tau, zero, one, _if_greater(zero, tau, minus, zero))
            surplus = _add(surplus, sign)
            agreeing = _add(agreeing, _abs(sign))
        count = _if_at_least(total, zero, _add(agreeing, surplus), _sub(agreeing, surplus))
        count = _mul(count, half)
        total = _mul(_if_at_least(total, zero, _add(total, mass), _sub(total, mass)), half)
        total = _div(total, _if_greater(count, one, count, one))
        _store_row(_finished(origin, total, after, reach), out + at)


@_compiled
def banded(
    base: int, others: Array, out: int, size: int, after: int, reach: np.float32, below: Array, top: Array
) -> None:
    """The sum of the task vectors' entries above ``below`` ``[T]`` and up to ``top`` ``[T]`` in magnitude."""
    zero = _all(np.float32(0.0))
    for at in range(0, 4 * size, 4 * WIDTH):
        origin, total = _load_row(base + at), zero
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + at), origin)
            length = _abs(tau)
            tau = _if_greater(length, _all(below[index]), tau, zero)
            total = _add(total, _if_greater(length, _all(top[index]), zero, tau))
        _store_row(_finished(origin, total, after, reach), out + at)


@_compiled
def thinned(
    base: int,
    others: Array,
    out: int,
    size: int,
    after: int,
    reach: np.float32,
    coins: Array,
    factor: np.float32,
) -> None:
    """``factor`` times the sum of the task vectors' kept entries; ``coins`` ``[T]``: addresses of bits."""
    for at in range(0, size, WIDTH):
        origin, total = _load_row(base + 4 * at), _all(np.float32(0.0))
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + 4 * at), origin)
            total = _fma(_mul(tau, _load_coins(coins[index] + at // 8)), _all(factor), total)
        _store_row(_finished(origin, total, after, reach), out + 4 * at)


@_compiled
def agreed(
    base: int,
    others: Array,
    out: int,
    size: int,
    after: int,
    reach: np.float32,
    lambdas: Array,
    agree: np.float32,
) -> None:
    """Consensus: the task vectors' sum where ``agree`` TALL masks or more have the entry; T ≤ ``MOST_ROWS``."""
    zero, one = _all(np.float32(0.0)), _all(np.float32(1.0))
    for at in range(0, 4 * size, 4 * WIDTH):
        origin, total, votes = _load_row(base + at), zero, zero
        for index in range(others.size):
            total = _add(total, _sub(_load_row(others[index] + at), origin))
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + at), origin)
            rest = _mul(_abs(_sub(total, tau)), _all(lambdas[index]))
            votes = _add(votes, _if_at_least(_abs(tau), rest, one, zero))
        total = _mul(total, _if_at_least(votes, _all(agree), one, zero))
        _store_row(_finished(origin, total, after, reach), out + at)


@_compiled
def localized(
    base: int,
    others: Array,
    out: int,
    size: int,
    vector: int,
    scaling: np.float32,
    masks: Array,
    lambdas: Array,
) -> None:
    """TALL masks: the task vectors' sum to ``vector``, base + scaling · sum to ``out``, packed masks to the
    addresses ``masks`` ``[T]``; T ≤ ``MOST_ROWS``."""
    zero = _all(np.float32(0.0))
    for start in range(0, size, WIDTH):
        at = 4 * start
        origin, total = _load_row(base + at), zero
        for index in range(others.size):
            total = _add(total, _sub(_load_row(others[index] + at), origin))
        for index in range(others.size):
            tau = _sub(_load_row(others[index] + at), origin)
            rest = _mul(_abs(_sub(total, tau)), _all(lambdas[index]))
            _store_mask(_at_least(_abs(tau), rest), masks[index] + start // 8)
        _store_row(total, vector + at)
        _store_row(_fma(total, _all(scaling), origin), out + at)


@_compiled
def unified(
    base: int,
    others: Array,
    size: int,
    out: int,
    vector: int,
    scaling: np.float32,
    masks: Array,
    kept: Array,
    own: Array,
    held: Array,
) -> None:
    """EMR: the elected vector to ``vector``, base + scaling · it to ``out``, packed masks to the addresses
    ``masks`` ``[T]``; T ≤ ``MOST_ROWS``. Magnitudes are added up in lanes, ``STRIP`` entries at a time: those of
    the elected vector where the mask is 1 to ``kept``, those of the task vectors to ``own``, ``[T, WIDTH]``.
    ``held`` ``[2, STRIP]`` is room to compute in: an array made here would be let go before its address is."""
    zero, one, minus = _all(np.float32(0.0)), _all(np.float32(1.0)), _all(np.float32(-1.0))
    signs, longest = held[0].ctypes.data, held[1].ctypes.data
    for strip in range(0, 4 * size, 4 * STRIP):
        end = min(strip + 4 * STRIP, 4 * size)
        for at in range(strip, end, 4 * WIDTH):
            origin, total = _load_row(base + at), zero
            for index in range(others.size):
                total = _add(total, _sub(_load_row(others[index] + at), origin))
            sign = _if_greater(total, zero, one, minus)
            most = _mul(_sub(_load_row(others[0] + at), origin), sign)
            for index in range(1, others.size):
                agreement = _mul(_sub(_load_row(others[index] + at), origin), sign)
                most = _if_greater(agreement, most, agreement, most)
            most = _if_greater(zero, most, zero, most)
            _store_row(sign, signs + at - strip)
            _store_row(most, longest + at - strip)
            elected = _mul(most, sign)
            _store_row(elected, vector + at)
            _store_row(_fma(elected, _all(scaling), origin), out + at)
        for index in range(others.size):  # masks are written one after the other: eight at once are slow
            left = length = zero
            for at in range(strip, end, 4 * WIDTH):
                agreement = _mul(
                    _sub(_load_row(others[index] + at), _load_row(base + at)), _load_row(signs + at - strip)
                )
                _store_mask(_greater(agreement, zero), masks[index] + at // 32)
                left = _add(left, _if_greater(agreement, zero, _load_row(longest + at - strip), zero))
                length = _add(length, _abs(agreement))
            _store_row(_add(_load_row(kept[index].ctypes.data), left), kept[index].ctypes.data)
            _store_row(_add(_load_row(own[index].ctypes.data), length), own[index].ctypes.data)


if SQUEEZES:  # guessing whether there are marks, and wrongly, costs more than writing none

    @_inlined
    def _write_marked(row: Any, marks: Any, out: Array, held: Array) -> None:
        """The marked entries one after the other to ``out``, of which ``WIDTH`` may be overwritten."""
        _store_squeezed(row, marks, out.ctypes.data)

else:

    @_inlined
    def _write_marked(row: Any, marks: Any, out: Array, held: Array) -> None:
        if marks:
            _store_row(row, held.ctypes.data)
            place = 0
            while marks:
                out[place] = held[_first(marks)]
                place += 1
                marks &= marks - 1


@_compiled
def gathered(base: int, others: Array, places: Array, found: Array) -> None:
    """|τ| at ``places`` (int64 ``[k]``) to ``found`` float32 ``[T, k]``."""
    for k in range(places.size):
        origin = _load_one(base + 4 * places[k])
        for index in range(others.size):
            found[index, k] = abs(_load_one(others[index] + 4 * places[k]) - origin)


@_compiled
def bracketed(
    base: int, others: Array, size: int, low: Array, high: Array, keep: Array, below: Array, inside: Array,
    found: Array,
) -> None:  # fmt: skip
    """Per expert and bracket, count |τ| ≤ ``low`` and low < |τ| < ``high``, and write out the latter.

    ``low``, ``high`` float32 and ``keep`` (whether to write) uint8 ``[T, J]``; counts are added to ``below``
    and ``inside``, int64 ``[T, J]``; written to ``found`` ``[T, J, n]``.
    """
    held = np.empty(WIDTH, np.float32)
    for strip in range(0, 4 * size, 4 * LOOK):
        for index in range(others.size):
            for at in range(strip, min(strip + 4 * LOOK, 4 * size), 4 * WIDTH):
                length = _abs(_sub(_load_row(others[index] + at), _load_row(base + at)))
                for k in range(low.shape[1]):
                    marks = _greater(length, _all(low[index, k]))
                    below[index, k] += WIDTH - _ones(marks)
                    marks &= _greater(_all(high[index, k]), length)
                    if keep[index, k]:
                        _write_marked(length, marks, found[index, k, inside[index, k] :], held)
                    inside[index, k] += _ones(marks)
