"""The loops behind the CPU implementation, compiled by numba. All compiled code is in this file: numba's cache on disk
is renewed when the file that holds a function changes, and only then.

Every loop works on one token of one sequence at a time, in one order, so no result depends on what else is in the
batch. Arrays are C-contiguous fp32 and boundaries int64; `begin` and `end` say which part of the work is this call's,
so that several threads can share it.

Axes: N sequences, T tokens, H key heads, Hv value heads, K key width, V value width, C channels, W taps.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16  # values of one vector; widths are filled up to a multiple of it
_ROWS = 4  # vectors that are carried through a sweep together

_ZERO, _ONE, _TWO, _INF = np.float32(0), np.float32(1), np.float32(2), np.float32(np.inf)

# exp: round to a power of two by adding a number whose last bit is one, then a polynomial on +- ln(2) / 2 (Cephes).
_LOG2E, _SNAP = np.float32(1.44269504), np.float32(12582912.0)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_E5, _E4, _E3 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_E2, _E1, _E0 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_LOWEST, _HIGHEST = np.float32(-87.33), np.float32(88.37)  # beyond them zero and infinity
_BIAS, _SHIFT = np.int32(127), np.int32(23)
# log(1 + u) = 2 atanh(u / (2 + u)): odd terms of the series, exact to rounding for u in [0, 1].
_L3, _L5, _L7 = np.float32(1 / 3), np.float32(1 / 5), np.float32(1 / 7)
_L9, _L11, _L13 = np.float32(1 / 9), np.float32(1 / 11), np.float32(1 / 13)


@intrinsic
def _bits(_context: Any, bits: Any) -> Any:
    """The float whose bits an int32 holds."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


_float_of_bits: Any = _bits


@intrinsic
def _word(_context: Any, x: Any) -> Any:
    """The bits of a float as an int32."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


_bits_of: Any = _word


def _sweep(*, decay: bool, write: bool, read: bool) -> Any:
    """One pass over a state: for each key i, s_i = [a_i] s_i [+ k_i w]; [o = sum_i p_i s_i].

    s is flat, [keys, lanes]; a, k, p are [keys], w and o [lanes]. Written as vector instructions, since a compiler
    cannot know that the arrays lie apart, and the sum over keys is then always made in the same order.
    """

    @intrinsic
    def sweep(_context: Any, s: Any, keys: Any, lanes: Any, a: Any, k: Any, w: Any, p: Any, o: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            arrays = [arguments[n] for n in (0, 3, 4, 5, 6, 7)]
            kinds = [signature.args[n] for n in (0, 3, 4, 5, 6, 7)]
            at = [target.make_array(kind)(target, builder, x).data for kind, x in zip(kinds, arrays, strict=True)]
            code = _Sweep(builder, at, arguments[1], arguments[2], (decay, write, read))
            code.emit()
            return target.get_dummy_value()

        return types.void(s, types.intp, types.intp, a, k, w, p, o), generate

    return sweep


class _Sweep:
    """Writes the instructions of one sweep."""

    def __init__(self, builder: Any, at: Any, keys: Any, lanes: Any, parts: tuple[bool, bool, bool]) -> None:
        self.builder, self.keys, self.lanes = builder, keys, lanes
        self.state, self.a, self.k, self.w, self.p, self.o = at
        self.decay, self.write, self.read = parts
        self.vector = ir.VectorType(ir.FloatType(), LANES)
        kind = ir.FunctionType(self.vector, [self.vector] * 3)
        self.fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")

    def emit(self) -> None:
        number = ir.IntType(64)
        wide = ir.Constant(number, _ROWS * LANES)
        whole = self.builder.mul(self.builder.sdiv(self.lanes, wide), wide)
        with cgutils.for_range_slice(self.builder, ir.Constant(number, 0), whole, wide) as (base, _):
            self._columns(base, _ROWS)
        with cgutils.for_range_slice(self.builder, whole, self.lanes, ir.Constant(number, LANES)) as (base, _):
            self._columns(base, 1)

    def _columns(self, base: Any, count: int) -> None:
        """`count` vectors of columns from `base` on, for every key."""
        b, zero = self.builder, ir.Constant(self.vector, [0.0] * LANES)
        columns = [b.add(base, ir.Constant(ir.IntType(64), LANES * c)) for c in range(count)]
        sums = [cgutils.alloca_once_value(b, zero) for _ in columns]
        for total in sums:
            b.store(zero, total)
        values = [self._load(self.w, c) for c in columns] if self.write else []
        with cgutils.for_range(b, self.keys) as loop:
            row = b.mul(loop.index, self.lanes)
            a = self._spread(self.a, loop.index) if self.decay else None
            k = self._spread(self.k, loop.index) if self.write else None
            p = self._spread(self.p, loop.index) if self.read else None
            for n, column in enumerate(columns):
                place = b.add(row, column)
                x = self._load(self.state, place)
                x = b.fmul(x, a) if self.decay else x
                x = b.call(self.fma, [k, values[n], x]) if self.write else x
                if self.decay or self.write:
                    self._store(x, self.state, place)
                if self.read:
                    b.store(b.call(self.fma, [p, x, b.load(sums[n])]), sums[n])
        if self.read:
            for total, column in zip(sums, columns, strict=True):
                self._store(b.load(total), self.o, column)

    def _spread(self, array: Any, index: Any) -> Any:
        b, nothing, first = self.builder, ir.Constant(self.vector, ir.Undefined), ir.Constant(ir.IntType(32), 0)
        x = b.insert_element(nothing, b.load(b.gep(array, [index])), first)
        return b.shuffle_vector(x, nothing, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))

    def _load(self, array: Any, index: Any) -> Any:
        x = self.builder.load(self.builder.bitcast(self.builder.gep(array, [index]), self.vector.as_pointer()))
        x.align = 4
        return x

    def _store(self, x: Any, array: Any, index: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(array, [index]), self.vector.as_pointer())
        self.builder.store(x, place).align = 4


_decay_read = _sweep(decay=True, write=False, read=True)
_write_read = _sweep(decay=False, write=True, read=True)
_decay_write_read = _sweep(decay=True, write=True, read=True)
_decay = _sweep(decay=True, write=False, read=False)
_write = _sweep(decay=False, write=True, read=False)
_read = _sweep(decay=False, write=False, read=True)


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _exp(x):
    c = x if x > _LOWEST else _LOWEST  # what is not a number must not be converted to an integer
    c = c if c < _HIGHEST else _HIGHEST
    n = (c * _LOG2E + _SNAP) - _SNAP
    r = c - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_E5 * r + _E4) * r + _E3) * r + _E2) * r + _E1) * r + _E0
    y = (p * r * r + r + _ONE) * _float_of_bits((np.int32(n) + _BIAS) << _SHIFT)
    y = _ZERO if x < _LOWEST else (_INF if x > _HIGHEST else y)
    return y if x == x else x


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _sigmoid(x):
    return _ONE / (_ONE + _exp(-x))


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _softplus(x):
    """log(1 + e^x), exact to rounding also where e^x is tiny."""
    u = _exp(-abs(x))
    s = u / (_TWO + u)
    q = s * s
    series = ((((((_L13 * q + _L11) * q + _L9) * q + _L7) * q + _L5) * q + _L3) * q + _ONE) * s
    return (x if x > _ZERO else _ZERO) + _TWO * series


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _exps(x, y):
    for i in range(x.shape[0]):
        y[i] = _exp(x[i])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _silus(x, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * _sigmoid(x[i])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _dot(x, y):
    total = _ZERO
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _add_scaled(y, weight, x):
    for i in range(y.shape[0]):
        y[i] += weight[i] * x[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def delta(q, k, e, z, g, diag, rank, starts, slots, state, o, begin, end):
    """Rows of the heads begin..end of N Hv; `state` [P, Hv, K, V] moves on in place, `o` [T, Hv, V] is filled.

    Absent inputs have no rows. q, k, e [T, H or Hv, K]; g [T, heads, K or 1]; starts [N + 1] counts rows; slots [N].
    """
    heads, keys, width = z.shape[1], q.shape[2], z.shape[2]
    lanes = (width + LANES - 1) // LANES * LANES
    s, a = np.zeros(keys * lanes, np.float32), np.ones(keys, np.float32)
    w, out = np.zeros((rank, lanes), np.float32), np.zeros(lanes, np.float32)
    share, decays = heads // q.shape[1], g.shape[0] > 0
    for item in range(begin, end):
        n, h = item // heads, item % heads
        slot, key = slots[n], h // share
        if slot < 0 or starts[n] == starts[n + 1]:
            continue
        for i in range(keys):
            for j in range(width):
                s[i * lanes + j] = state[slot, h, i, j]
        for t in range(starts[n], starts[n + 1], rank):
            if decays:
                gate = g[t, h // (heads // g.shape[1])]
                if gate.shape[0] == keys:
                    _exps(gate, a)
                else:
                    a[:] = _exp(gate[0])
            if e.shape[0] > 0:
                probe = e[t, h // (heads // e.shape[1])]
                _decay_read(s, keys, lanes, a, a, out, probe, out)
                for j in range(width):
                    w[0, j] = z[t, h, j] - out[j]
                if diag.shape[0] == 0:
                    _write_read(s, keys, lanes, a, k[t, key], w[0], q[t, key], out)
                    for j in range(width):
                        o[t, h, j] = out[j]
                    continue
            else:
                for r in range(rank):
                    for j in range(width):
                        w[r, j] = z[t + r, h, j]
                if rank == 1 and diag.shape[0] == 0:
                    _decay_write_read(s, keys, lanes, a, k[t, key], w[0], q[t, key], out)
                    for j in range(width):
                        o[t, h, j] = out[j]
                    continue
                if decays:
                    _decay(s, keys, lanes, a, a, out, a, out)
            _several(q, k, diag, rank, t, key, h, s, keys, lanes, a, w, out, o)
        for i in range(keys):
            for j in range(width):
                state[slot, h, i, j] = s[i * lanes + j]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def _several(q, k, diag, rank, t, key, h, s, keys, lanes, a, w, out, o):
    """Writes and reads of a token of several rows, or of one whose own write counts by another weight."""
    own = diag.shape[0] > 0
    if own:
        for r in range(rank):
            _read(s, keys, lanes, a, a, out, q[t + r, key], out)
            for p in range(rank):
                weight = diag[t + p, h] * _dot(q[t + r, key], k[t + p, key])
                for j in range(out.shape[0]):
                    out[j] += weight * w[p, j]
            o[t + r, h] = out[: o.shape[2]]
    for r in range(rank):
        _write(s, keys, lanes, a, k[t + r, key], w[r], a, out)
    if not own:
        for r in range(rank):
            _read(s, keys, lanes, a, a, out, q[t + r, key], out)
            o[t + r, h] = out[: o.shape[2]]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def conv(x, column, taps, bias, window, starts, activate, y, after, begin, end):
    """Causal convolution of sequences begin..end: C columns of x from `column` on to y [T, C].

    taps [W, C], bias [C]; windows [N, C, W - 1].
    """
    past, channels = taps.shape[0] - 1, taps.shape[1]
    stop = column + channels
    earlier, out = np.empty((past, channels), np.float32), np.empty(channels, np.float32)
    for n in range(begin, end):
        first, last = starts[n], starts[n + 1]
        for i in range(past):
            for c in range(channels):
                earlier[i, c] = window[n, c, i]
        for t in range(first, last):
            out[:] = bias
            for j in range(past + 1):
                source = t - past + j
                row = x[source, column:stop] if source >= first else earlier[past + source - first]
                _add_scaled(out, taps[j], row)
            if activate:
                _silus(out, y[t])
            else:
                y[t] = out
        for i in range(past):
            source = last - past + i
            row = x[source, column:stop] if source >= first else earlier[past + source - first]
            for c in range(channels):
                after[n, c, i] = row[c]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _scaled(x, factor, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * factor


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _gated(gate, x, factor, y):
    for i in range(x.shape[0]):
        y[i] = factor * _sigmoid(gate[i]) * x[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def fold(q, k, v, b, w, scale, erase_max, eps, qn, kn, e, z, begin, end):
    """Tokens begin..end: q, k normalised, e = erase_max sigmoid(b) k, z = sigmoid(w) v.

    q, k [T, H, K]; v [T, Hv, V]; b [T, H or Hv, K], or [T, Hv, 1] for one beta a head, and then w has no rows.
    """
    heads, writers = q.shape[1], v.shape[1]
    for t in range(begin, end):
        for h in range(heads):
            _scaled(q[t, h], scale / np.sqrt(_dot(q[t, h], q[t, h]) + eps), qn[t, h])
            _scaled(k[t, h], _ONE / np.sqrt(_dot(k[t, h], k[t, h]) + eps), kn[t, h])
        for h in range(b.shape[1]):
            key = kn[t, h // (b.shape[1] // heads)]
            if b.shape[2] == 1:
                _scaled(key, erase_max * _sigmoid(b[t, h, 0]), e[t, h])
            else:
                _gated(b[t, h], key, erase_max, e[t, h])
        for h in range(writers):
            if w.shape[0] == 0:
                _scaled(v[t, h], erase_max * _sigmoid(b[t, h, 0]), z[t, h])
            else:
                _gated(w[t, h], v[t, h], _ONE, z[t, h])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def decay(f, bias, rate, bounded, bound, g, begin, end):
    """Log-decays of tokens begin..end [T, n]: -rate softplus(f + bias), or bound * sigmoid(rate (f + bias))."""
    for t in range(begin, end):
        if bounded:
            for i in range(f.shape[1]):
                g[t, i] = bound * _sigmoid(rate[i] * (f[t, i] + bias[i]))
        else:
            for i in range(f.shape[1]):
                g[t, i] = -rate[i] * _softplus(f[t, i] + bias[i])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _normed(x, factor, weight, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * factor * weight[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _normed_silu(x, factor, weight, gate, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * factor * weight[i] * (gate[i] * _sigmoid(gate[i]))


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _normed_sigmoid(x, factor, weight, gate, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * factor * weight[i] * _sigmoid(gate[i])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def rms_norm(x, weight, gate, kind, eps, y, begin, end):
    """Rows begin..end of x [n, D]: x / rms(x) * weight; kind 1 times silu(gate), 2 times sigmoid(gate).

    weight [m, D]: row r takes the (r mod m)th.
    """
    width, groups = x.shape[1], weight.shape[0]
    for row in range(begin, end):
        factor = _ONE / np.sqrt(_dot(x[row], x[row]) / np.float32(width) + eps)
        if kind == 1:
            _normed_silu(x[row], factor, weight[row % groups], gate[row], y[row])
        elif kind == 2:
            _normed_sigmoid(x[row], factor, weight[row % groups], gate[row], y[row])
        else:
            _normed(x[row], factor, weight[row % groups], y[row])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _silu_times(x, by, y):
    for i in range(x.shape[0]):
        y[i] = x[i] * _sigmoid(x[i]) * by[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def silu_times(x, by, y, begin, end):
    """Rows begin..end of silu(x) * by, all [n, D]."""
    for row in range(begin, end):
        _silu_times(x[row], by[row], y[row])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def _moved(x, y):
    for i in range(x.shape[0]):
        y[i] = x[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _plus_scaled(x, factor, by, y):
    for i in range(x.shape[0]):
        y[i] = x[i] + factor * by[i]


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def mamba2_inputs(x, u, bias, rate, low, high, q, k, z, g, begin, end):
    """Tokens begin..end of Mamba-2, from the projection x, whose last H columns are dt, and the convolved u (v, B, C).

    dt = clamp(softplus(dt + bias)); z = dt v [T, H, P], g = -rate dt [T, H]; k and q are B and C, [T, G K].
    """
    heads, width, keys = z.shape[1], z.shape[2], k.shape[1]
    inner, last = heads * width, x.shape[1] - heads
    for t in range(begin, end):
        _moved(u[t, inner : inner + keys], k[t])
        _moved(u[t, inner + keys :], q[t])
        for h in range(heads):
            dt = min(max(_softplus(x[t, last + h] + bias[h]), low), high)
            g[t, h] = -rate[h] * dt
            _scaled(u[t, h * width : (h + 1) * width], dt, z[t, h])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def mamba2_outputs(x, u, o, skip, weight, groups, late, eps, y, begin, end):
    """Tokens begin..end of Mamba-2: y [T, H P] from o [T, H, P], v in u and the gate in x's first columns.

    y = norm((o + skip v) silu(gate)), or norm(o + skip v) silu(gate) where the gate is `late`; the norm is over each of
    `groups` parts, and there is none where `weight` has no rows.
    """
    heads, width, inner = o.shape[1], o.shape[2], y.shape[1]
    mixed, gated = np.empty(inner, np.float32), np.empty(inner, np.float32)
    size = inner // groups
    for t in range(begin, end):
        for h in range(heads):
            a, b = h * width, (h + 1) * width
            _plus_scaled(o[t, h], skip[h], u[t, a:b], mixed[a:b])
        if weight.shape[0] == 0:
            _silu_times(x[t, :inner], mixed, y[t])
            continue
        if not late:
            _silu_times(x[t, :inner], mixed, gated)
        for i in range(groups):
            a, b = i * size, (i + 1) * size
            source = mixed[a:b] if late else gated[a:b]
            factor = _ONE / np.sqrt(_dot(source, source) / np.float32(size) + eps)
            if late:
                _normed_silu(source, factor, weight[a:b], x[t, a:b], y[t, a:b])
            else:
                _normed(source, factor, weight[a:b], y[t, a:b])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def activation(x, kind, y, begin, end):
    """Rows begin..end of x [n, D]: kind 0 is silu, 1 sigmoid, 2 softplus."""
    for row in range(begin, end):
        if kind == 0:
            _silus(x[row], y[row])
        elif kind == 1:
            for i in range(x.shape[1]):
                y[row, i] = _sigmoid(x[row, i])
        else:
            for i in range(x.shape[1]):
                y[row, i] = _softplus(x[row, i])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _largest(x):
    top = x[0]
    for i in range(x.shape[0]):
        top = x[i] if x[i] > top else top
    return top


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _weights(x, top):
    for i in range(x.shape[0]):
        x[i] = _exp(x[i] - top)


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc"})
def _sum(x):
    total = _ZERO
    for i in range(x.shape[0]):
        total += x[i]
    return total


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def attend(scores, firsts, lasts, top, total, shrink, begin, end):
    """Rows begin..end of scores [n, S] become softmax weights: those of keys firsts..lasts, zero elsewhere.

    `top` and `total` [n] hold the highest score and the sum of weights so far and move on; what was summed before must
    be multiplied by `shrink` [n].
    """
    for row in range(begin, end):
        first, last = firsts[row], lasts[row]
        if last <= first:
            scores[row] = _ZERO
            shrink[row] = _ONE
            continue
        seen = scores[row, first:last]
        highest = max(top[row], _largest(seen))
        _weights(seen, highest)
        shrink[row] = _exp(top[row] - highest)
        total[row] = total[row] * shrink[row] + _sum(seen)
        top[row] = highest
        scores[row, :first] = _ZERO
        scores[row, last:] = _ZERO


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def attend_cached(q, k, v, filled, scale, o, begin, end):
    """Heads begin..end of N G: one query q [N, G, R, d] over the first `filled` [N] slots of k, v [N, G, L, d]."""
    groups, share, slots = q.shape[1], q.shape[2], k.shape[2]
    weights = np.empty(slots, np.float32)
    for item in range(begin, end):
        n, g = item // groups, item % groups
        count = filled[n]
        for r in range(share):
            for i in range(count):
                weights[i] = scale * _dot(q[n, g, r], k[n, g, i])
            seen = weights[:count]
            _weights(seen, _largest(seen))
            _weighted(seen, v[n, g], _ONE / _sum(seen), o[n, g, r])


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy", fastmath={"contract"})
def _weighted(weights, v, scale, o):
    o[:] = _ZERO
    for i in range(weights.shape[0]):
        w = weights[i] * scale
        for j in range(o.shape[0]):
            o[j] += w * v[i, j]


# The noise of `gdn2.kernels.noise`, operation by operation: no two of them may become one, so nothing is contracted.
_MIX1, _MIX2, _WORD = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35), np.int64(0xFFFFFFFF)
_S13, _S16, _S23, _S31, _S32 = np.uint32(13), np.uint32(16), np.int32(23), np.int32(31), np.int64(32)
_MANTISSA, _HALF_BITS, _TOP = np.int32(0x7FFFFF), np.int32(0x3F000000), np.int32(126)
_HALF, _UNIT, _LN2, _NOT = np.float32(0.5), np.float32(2.0**-32), np.float32(0.6931471824645996), np.int32(0)
_N6, _N5, _N4 = np.float32(0.9904405474662781), np.float32(-0.6377930045127869), np.float32(0.5227294564247131)
_N3, _N2 = np.float32(0.18751747906208038), np.float32(0.33891603350639343)
_N1, _N0 = np.float32(0.49981626868247986), np.float32(1.0000009536743164)


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _mixed(x, key):
    x = np.uint32(np.uint32(np.uint32(x ^ (x >> _S16)) * _MIX1) + key)
    x = np.uint32(np.uint32(x ^ (x >> _S13)) * _MIX2)
    return np.uint32(x ^ (x >> _S16))


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _minus_log(power, t):
    series = (((((_N6 * t + _N5) * t + _N4) * t + _N3) * t + _N2) * t + _N1) * t + _N0
    return series * t + np.float32(power) * _LN2


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _power(y):
    return np.int32(_TOP - np.int32(_bits_of(y) >> _S23))


@numba.jit(nopython=True, inline="always", error_model="numpy")
def _rest(y):
    return _ONE - _float_of_bits(np.int32(np.int32(_bits_of(y) & _MANTISSA) | _HALF_BITS))


@numba.jit(nopython=True, nogil=True, cache=True, error_model="numpy")
def gumbel(keys, y, begin, end):
    """Rows begin..end of noise y [N, V], of keys int64 [N]."""
    for row in range(begin, end):
        low, high = np.uint32(keys[row] & _WORD), np.uint32((keys[row] >> _S32) & _WORD)
        out = y[row]
        for v in range(out.shape[0]):
            x = np.int32(_mixed(np.uint32(_mixed(np.uint32(v), np.uint32(0)) ^ low), high))
            near = (np.float32(np.int32(x ^ (x >> _S31))) + _HALF) * _UNIT
            power, rest = (_power(near), _rest(near)) if x < _NOT else (_NOT, near)
            exponential = _minus_log(power, rest)
            out[v] = _minus_log(_power(exponential), _rest(exponential))
