"""Compiled loops that read, sum and update table rows on the host; they own no memory and choose nothing.

Three rules make what becomes of a row a function of its own gradients alone, wherever the row is, whatever else is in
the table and however many threads work: gradients are added in the order of the batch's rows and, within one, of its
features; no product is fused with a sum; one thread adds up and updates a row.

Rows are read and written four floats at a time, by vector instructions that numba has no words for, and are asked for
ahead of time, because a table is larger than every cache. Widths are multiples of four, as FBGEMM's are.

All compiled functions are in this one file, because numba's cache on disk does not notice changes in another.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from trainer.bag_kernels import Numbers
from trainer.kernels import Integer, Integers, Slots, compiled

Floats = NDArray[np.float32]
Real: TypeAlias = Any  # a float32, in Python too: a double would make the arithmetic double

_LANES = 4  # floats in one vector
_LINE = 16  # floats in one cache line
_AHEAD = 16  # rows between asking for one and using it

_FLOAT, _BYTES = ir.FloatType(), 4
_VECTOR = ir.VectorType(_FLOAT, _LANES)


def _address(context: Any, builder: Any, arrays: Any, array: Any, place: Any) -> Any:
    """Of element ``place`` of a float32 array, as if it were flat."""
    data = context.make_array(arrays)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [place]), _VECTOR.as_pointer())


def _read(builder: Any, address: Any) -> Any:
    return builder.load(address, typ=_VECTOR, align=_BYTES)


def _root(builder: Any, vector: Any) -> Any:
    """Correctly rounded, as in every other code of the same formula."""
    function = builder.module.declare_intrinsic("llvm.sqrt.v4f32", (), ir.FunctionType(_VECTOR, [_VECTOR]))
    return builder.call(function, [vector])


def _spread(builder: Any, number: Any) -> Any:
    """The number in every lane."""
    vector = ir.Constant(_VECTOR, ir.Undefined)
    for lane in range(_LANES):
        vector = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), lane))
    return vector


def _vector_copy(typing: Any, to: Any, place: Any, source: Any, start: Any) -> Any:
    """``to[place : place + 4] = source[start : start + 4]``."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        to, source = signature.args[0], signature.args[2]
        values = _read(builder, _address(context, builder, source, given[2], given[3]))
        builder.store(values, _address(context, builder, to, given[0], given[1]), align=_BYTES)
        return context.get_dummy_value()

    return types.void(to, types.uint64, source, types.uint64), build


def _vector_add(typing: Any, to: Any, place: Any, source: Any, start: Any) -> Any:
    """``to[place : place + 4] += source[start : start + 4]``."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        to, source = signature.args[0], signature.args[2]
        address = _address(context, builder, to, given[0], given[1])
        values = _read(builder, _address(context, builder, source, given[2], given[3]))
        builder.store(builder.fadd(_read(builder, address), values), address, align=_BYTES)
        return context.get_dummy_value()

    return types.void(to, types.uint64, source, types.uint64), build


def _vector_descend(typing: Any, weights: Any, place: Any, sums: Any, start: Any, rate: Any) -> Any:
    """``weights[place : place + 4] -= rate * sums[start : start + 4]``."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        weights, sums = signature.args[0], signature.args[2]
        address = _address(context, builder, weights, given[0], given[1])
        gradient = _read(builder, _address(context, builder, sums, given[2], given[3]))
        step = builder.fmul(_spread(builder, given[4]), gradient)
        builder.store(builder.fsub(_read(builder, address), step), address, align=_BYTES)
        return context.get_dummy_value()

    return types.void(weights, types.uint64, sums, types.uint64, types.float32), build


def _vector_adagrad(
    typing: Any, weights: Any, place: Any, moments: Any, moment: Any, sums: Any, start: Any, rate: Any, eps: Any
) -> Any:
    """Adagrad of four weights: ``m += g * g; w -= rate * g / (sqrt(m) + eps)``."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        weights, moments, sums = signature.args[0], signature.args[2], signature.args[4]
        address = _address(context, builder, weights, given[0], given[1])
        moment = _address(context, builder, moments, given[2], given[3])
        gradient = _read(builder, _address(context, builder, sums, given[4], given[5]))
        squares = builder.fadd(_read(builder, moment), builder.fmul(gradient, gradient))
        builder.store(squares, moment, align=_BYTES)
        divisor = builder.fadd(_root(builder, squares), _spread(builder, given[7]))
        step = builder.fdiv(builder.fmul(_spread(builder, given[6]), gradient), divisor)
        builder.store(builder.fsub(_read(builder, address), step), address, align=_BYTES)
        return context.get_dummy_value()

    index, real = types.uint64, types.float32
    return types.void(weights, index, moments, index, sums, index, real, real), build


def _ask(typing: Any, array: Any, place: Any) -> Any:
    """Have the cache line of element ``place`` fetched, to be read and written soon."""

    def build(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [byte], kind)
        address = builder.bitcast(_address(context, builder, signature.args[0], given[0], given[1]), byte)
        builder.call(function, [address, *(ir.Constant(number, flag) for flag in (0, 3, 1))])
        return context.get_dummy_value()

    return types.void(array, types.uint64), build


_copy: Any = intrinsic(_vector_copy)
_add: Any = intrinsic(_vector_add)
_descend: Any = intrinsic(_vector_descend)
_adagrad: Any = intrinsic(_vector_adagrad)
_prefetch: Any = intrinsic(_ask)


@compiled
def _prefetch_row(table: Floats, begin: Integer, width: Integer) -> None:
    for column in range(np.uint64(0), np.uint64(width), np.uint64(_LINE)):
        _prefetch(table, np.uint64(begin) + column)


@compiled
def look_up(
    table: Floats,
    width: Integer,
    ids: Numbers,
    bounds: Slots,
    pooled: Floats,
    first_column: Integer,
    first_row: Integer,
    end_row: Integer,
) -> None:
    """Writes the sums of the bags of some rows of the batch to ``pooled``.

    ``table``: float32 [rows * width]. ``pooled``: float32 [B, columns]; feature f takes ``width`` columns from
    ``first_column + f * width`` on.
    """
    num_features = (bounds.size - 1) // max(pooled.shape[0], 1)
    wide, last = np.uint64(width), ids.size - 1
    for b in range(first_row, end_row):
        place = np.uint64(b) * np.uint64(pooled.shape[1]) + np.uint64(first_column)
        for bag in range(b * num_features, (b + 1) * num_features):
            begin, end = bounds[np.uint64(bag)], bounds[np.uint64(bag + 1)]
            for i in range(begin, end):
                _prefetch_row(table, ids[np.uint64(min(i + _AHEAD, last))] * width, width)
                row = np.uint64(ids[np.uint64(i)]) * wide
                for c in range(np.uint64(0), wide, np.uint64(_LANES)):
                    if i == begin:
                        _copy(pooled, place + c, table, row + c)
                    else:
                        _add(pooled, place + c, table, row + c)
            if begin == end:
                for c in range(wide):
                    pooled[b, np.uint64(first_column + (bag - b * num_features) * width) + c] = np.float32(0)
            place += wide


@compiled
def add_up(
    gradient: Floats,
    width: Integer,
    bounds: Slots,
    inverse: Slots,
    first_column: Integer,
    sums: Floats,
    first: Integer,
    end: Integer,
) -> None:
    """Adds up the gradients of the distinct rows ``first`` to ``end`` - 1 in ``sums``, float32 [m * width]."""
    num_features = (bounds.size - 1) // max(gradient.shape[0], 1)
    wide = np.uint64(width)
    sums[first * width : end * width] = np.float32(0)
    for b in range(gradient.shape[0]):
        place = np.uint64(b) * np.uint64(gradient.shape[1]) + np.uint64(first_column)
        for bag in range(b * num_features, (b + 1) * num_features):
            for i in range(bounds[np.uint64(bag)], bounds[np.uint64(bag + 1)]):
                number = inverse[np.uint64(i)]
                if first <= number < end:
                    for c in range(np.uint64(0), wide, np.uint64(_LANES)):
                        _add(sums, np.uint64(number) * wide + c, gradient, place + c)
            place += wide


@compiled
def add_up_readers(
    gradient: Floats, width: Integer, readers: Slots, ends: Slots, sums: Floats, first: Integer, end: Integer
) -> None:
    """Adds up the gradients of the distinct rows ``first`` to ``end`` - 1 in ``sums``, float32 [m * width].

    ``gradient``: float32 [N * width], of the bags. ``readers``, ``ends``: the bags of each row, see ``find_readers``.
    """
    wide, last = np.uint64(width), readers.size - 1
    begin = ends[np.uint64(first - 1)] if first else np.int32(0)
    for u in range(first, end):
        sum_, until = np.uint64(u) * wide, ends[np.uint64(u)]
        for i in range(begin, until):
            _prefetch_row(gradient, readers[np.uint64(min(i + _AHEAD, last))] * width, width)
            bag = np.uint64(readers[np.uint64(i)]) * wide
            for c in range(np.uint64(0), wide, np.uint64(_LANES)):
                if i == begin:
                    _copy(sums, sum_ + c, gradient, bag + c)
                else:
                    _add(sums, sum_ + c, gradient, bag + c)
        if begin == until:
            sums[sum_ : sum_ + wide] = np.float32(0)
        begin = until


SGD, ADAGRAD, ROWWISE_ADAGRAD = range(3)
"""Formulas of ``update``."""


@compiled
def update(
    formula: Integer,
    table: Floats,
    moments: Floats,
    width: Integer,
    rate: Real,
    eps: Real,
    decay: Real,
    rows: Integers,
    gradient: Floats,
    bounds: Slots,
    inverse: Slots,
    first_column: Integer,
    sums: Floats,
    first: Integer,
    end: Integer,
) -> None:
    """Updates the distinct rows ``first`` to ``end`` - 1 of ``rows`` with the sums of their gradients: see ``descend``.

    ``gradient``: float32 [B, columns], of what ``look_up`` wrote. ``inverse``: int32, where each id of the batch stands
    in ``rows``. ``sums``: float32 [m * width], written.
    """
    add_up(gradient, width, bounds, inverse, first_column, sums, first, end)
    descend(formula, table, moments, width, rate, eps, decay, rows, sums, first, end)


@compiled
def descend(
    formula: Integer,
    table: Floats,
    moments: Floats,
    width: Integer,
    rate: Real,
    eps: Real,
    decay: Real,
    rows: Integers,
    sums: Floats,
    first: Integer,
    end: Integer,
) -> None:
    """Updates the distinct rows ``first`` to ``end`` - 1 of ``rows``; ``sums``: gradients, float32 [m * width].

    SGD: ``w -= rate * g``. Adagrad (Duchi et al., 2011): ``m += g * g; w -= rate * g / (sqrt(m) + eps)``. Row-wise
    Adagrad has one moment a row: ``m += mean(g * g); w -= rate / (sqrt(m) + eps) * g``. Before all:
    ``g += decay * w``.

    ``moments``: float32 [rows * width], [rows], or any for SGD. Where there is ``decay``, ``sums`` is written.
    """
    if decay != np.float32(0):
        _add_decay(table, width, decay, rows, sums, first, end)
    if formula == ADAGRAD:
        _update_adagrad(table, moments, width, rate, eps, rows, sums, first, end)
    elif formula == ROWWISE_ADAGRAD:
        _update_rowwise(table, moments, width, rate, eps, rows, sums, first, end)
    else:
        _update_sgd(table, width, rate, rows, sums, first, end)


@compiled
def _add_decay(
    table: Floats, width: Integer, decay: Real, rows: Integers, sums: Floats, first: Integer, end: Integer
) -> None:
    for u in range(first, end):
        for c in range(width):
            sums[u * width + c] += decay * table[rows[u] * width + c]


@compiled
def _update_sgd(
    table: Floats, width: Integer, rate: Real, rows: Integers, sums: Floats, first: Integer, end: Integer
) -> None:
    wide = np.uint64(width)
    for u in range(first, end):
        _prefetch_row(table, rows[np.uint64(min(u + _AHEAD, end - 1))] * width, width)
        row, sum_ = np.uint64(rows[np.uint64(u)]) * wide, np.uint64(u) * wide
        for c in range(np.uint64(0), wide, np.uint64(_LANES)):
            _descend(table, row + c, sums, sum_ + c, rate)


@compiled
def _update_adagrad(
    table: Floats,
    moments: Floats,
    width: Integer,
    rate: Real,
    eps: Real,
    rows: Integers,
    sums: Floats,
    first: Integer,
    end: Integer,
) -> None:
    wide = np.uint64(width)
    for u in range(first, end):
        soon = rows[np.uint64(min(u + _AHEAD, end - 1))] * width
        _prefetch_row(table, soon, width)
        _prefetch_row(moments, soon, width)
        row, sum_ = np.uint64(rows[np.uint64(u)]) * wide, np.uint64(u) * wide
        for c in range(np.uint64(0), wide, np.uint64(_LANES)):
            _adagrad(table, row + c, moments, row + c, sums, sum_ + c, rate, eps)


@compiled
def _update_rowwise(
    table: Floats,
    moments: Floats,
    width: Integer,
    rate: Real,
    eps: Real,
    rows: Integers,
    sums: Floats,
    first: Integer,
    end: Integer,
) -> None:
    wide = np.uint64(width)
    for u in range(first, end):
        soon = rows[np.uint64(min(u + _AHEAD, end - 1))]
        _prefetch_row(table, soon * width, width)
        _prefetch(moments, np.uint64(soon))
        row, sum_ = np.uint64(rows[np.uint64(u)]), np.uint64(u) * wide
        moments[row] += _sum_of_squares(sums, sum_, wide) / np.float32(width)
        scaled = rate / (np.sqrt(moments[row]) + eps)
        for c in range(np.uint64(0), wide, np.uint64(_LANES)):
            _descend(table, row * wide + c, sums, sum_ + c, scaled)


@compiled
def _sum_of_squares(sums: Floats, begin: Integer, width: Integer) -> np.float32:
    """In four chains of additions, which do not wait for each other."""
    first = second = third = fourth = np.float32(0)
    for c in range(begin, begin + width, np.uint64(_LANES)):
        first += sums[c] * sums[c]
        second += sums[c + np.uint64(1)] * sums[c + np.uint64(1)]
        third += sums[c + np.uint64(2)] * sums[c + np.uint64(2)]
        fourth += sums[c + np.uint64(3)] * sums[c + np.uint64(3)]
    return (first + second) + (third + fourth)
