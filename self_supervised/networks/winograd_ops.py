"""Loops of winograd.py, compiled by Numba: a convolution and the gradient of its weight, for some tiles and channels.

A tile of 4 x 4 output pixels depends on 6 x 6 input pixels x. With the matrices of Lavin and Gray (arXiv:1509.09308),
it is A [(G w G') * (B x B')] A'. The sum over channels is 36 matrix products, one per element of a transformed tile.

A unit of work is a range of tiles and some panels of channels. Its intermediate values stay in the processor's cache.
All addresses and steps are in bytes; tensors are [N, H, W, C] in memory.
"""

from collections.abc import Callable

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from self_supervised.views.compiled_ops import compiled

INPUT = [[4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0]]
INPUT += [[0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1]]
OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
WEIGHT = [[1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]]
WEIGHT += [[1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]]
# Numbers in a register, and rows of a product whose sums are held in registers: 32 with AVX-512, otherwise 16
LANES, PRODUCT_ROWS = (16, 8) if torch.backends.cpu.get_cpu_capability() == "AVX512" else (8, 4)
PANEL = 2 * LANES  # channels: two registers
POINTS = 36  # elements of a transformed tile
# What a unit needs: addresses of tensors, their sizes, and the plan of work. `taken` counts units that have begun.
WORK = np.dtype(
    [(name, np.int64) for name in (
        "taken", "started", "x", "y", "weight", "mirrored", "height", "width", "inputs", "outputs", "tiles", "ranges",
        "units", "panels", "block", "zeros", "unused", "space", "space_size",
    )]
)  # fmt: skip


# ---- vectors: instructions for LANES numbers at once, which Numba's own loops would not get ----

FLOAT, INTEGER = ir.FloatType(), ir.IntType(64)
VECTOR = ir.VectorType(FLOAT, LANES)
FAST = ("fast",)  # allows fused multiply-adds


def whole(value: int) -> ir.Constant:
    return ir.Constant(INTEGER, value)


def repeated(value: float) -> ir.Constant:
    return ir.Constant(VECTOR, [value] * LANES)


def read_lanes(builder: ir.IRBuilder, address: ir.Value, kind: ir.Type = VECTOR) -> ir.Value:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def write_lanes(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, builder.inttoptr(address, VECTOR.as_pointer()), align=4)


def combined(builder: ir.IRBuilder, matrix: list[list[float]], vectors: list[ir.Value]) -> list[ir.Value]:
    """Return the matrix times the vectors."""
    sums = []
    for row in matrix:
        total = None
        for weight, vector in zip(row, vectors, strict=True):
            if weight != 0:
                term = vector if weight == 1 else builder.fmul(vector, repeated(weight), flags=FAST)
                total = term if total is None else builder.fadd(total, term, flags=FAST)
        sums.append(total)
    return sums


def transform(matrix: list[list[float]], table_of: str) -> Callable:
    """Return a compiled function (table, offset, slab, step) that transforms tiles, LANES channels at once.

    It reads or writes the tile's pixels at table[i] + offset (`table_of` is "source" or "target"), and the other end at
    slab + i * step.
    """

    @intrinsic
    def transformed_tile(_, table, offset, slab, step):
        def generate(context, builder, signature, arguments):
            table, offset, slab, step = arguments
            places = (
                lambda i: builder.add(read_lanes(builder, builder.add(table, whole(8 * i)), INTEGER), offset),
                lambda i: builder.add(slab, builder.mul(step, whole(i))),
            )
            source, target = places if table_of == "source" else places[::-1]
            side = range(len(matrix[0]))
            tile = [[read_lanes(builder, source(len(side) * i + j)) for i in side] for j in side]
            columns = [combined(builder, matrix, column) for column in tile]
            for i in range(len(matrix)):
                for j, value in enumerate(combined(builder, matrix, [column[i] for column in columns])):
                    write_lanes(builder, value, target(len(matrix) * i + j))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 4), generate

    return transformed_tile


def matrix_transpose(matrix: list[list[float]]) -> list[list[float]]:
    return [list(row) for row in zip(*matrix, strict=True)]


transform_input = transform(INPUT, "source")
transform_output = transform(OUTPUT, "target")
transform_gradient = transform(matrix_transpose(OUTPUT), "source")
transform_weight = transform(WEIGHT, "source")
transform_mirrored = transform([row[::-1] for row in WEIGHT], "source")
transform_weight_gradient = transform(matrix_transpose(WEIGHT), "target")


@intrinsic
def multiply(_, a, a_row, a_step, panel, out, out_row, length, add):
    """Write the product of rows a [PRODUCT_ROWS, length] and a panel [length, PANEL] to out, or add it to out."""

    def generate(context, builder, signature, arguments):
        a, a_row, a_step, panel, out, out_row, length, add = arguments
        first = ir.VectorType(ir.IntType(32), LANES)([0] * LANES)
        halves = [whole(0), whole(4 * LANES)]
        rows = [builder.mul(a_row, whole(row)) for row in range(PRODUCT_ROWS)]
        outs = [builder.add(out, builder.mul(out_row, whole(row))) for row in range(PRODUCT_ROWS)]
        places = [[builder.add(begin, half) for half in halves] for begin in outs]
        adds = builder.icmp_signed("!=", add, whole(0))
        sums = [[cgutils.alloca_once(builder, VECTOR) for _ in halves] for _ in rows]  # become registers
        for row in range(PRODUCT_ROWS):
            for total, place in zip(sums[row], places[row], strict=True):
                builder.store(builder.select(adds, read_lanes(builder, place), repeated(0.0)), total)
        with cgutils.for_range(builder, length) as loop:
            line = builder.add(panel, builder.mul(loop.index, whole(4 * PANEL)))
            lines = [read_lanes(builder, builder.add(line, half)) for half in halves]
            column = builder.add(a, builder.mul(loop.index, a_step))
            for row in range(PRODUCT_ROWS):
                number = read_lanes(builder, builder.add(column, rows[row]), FLOAT)
                vector = builder.insert_element(VECTOR(ir.Undefined), number, ir.IntType(32)(0))
                vector = builder.shuffle_vector(vector, VECTOR(ir.Undefined), first)
                for total, values in zip(sums[row], lines, strict=True):
                    product = builder.fmul(vector, values, flags=FAST)
                    builder.store(builder.fadd(builder.load(total), product, flags=FAST), total)
        for row in range(PRODUCT_ROWS):
            for total, place in zip(sums[row], places[row], strict=True):
                write_lanes(builder, builder.load(total), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 8), generate


@intrinsic
def take(_, work, counter):
    """Add one to a counter of the work, and return what it was: for several threads at once."""

    def generate(context, builder, signature, arguments):
        address = builder.add(builder.ptrtoint(arguments[0], INTEGER), builder.mul(arguments[1], whole(8)))
        return builder.atomic_rmw("add", builder.inttoptr(address, INTEGER.as_pointer()), whole(1), "monotonic")

    return types.int64(work, types.int64), generate


@intrinsic
def pointer(_, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), generate


# ---- loops ----


@compiled
def locate(pixels, outside, tile, border, size, height, width, channels, table):
    """Write the addresses of the pixels of a tile to the table; of those beyond the image, that of `outside`.

    Args:
        border: pixels by which the tile begins before its 4 x 4 output pixels.
        size: height and width of the tile.
    """
    places = carray(pointer(table), POINTS, np.int64)
    down, across = (height + 3) // 4, (width + 3) // 4
    image = tile // (down * across)
    top, left = tile // across % down * 4 - border, tile % across * 4 - border
    for i in range(size):
        for j in range(size):
            y, x = top + i, left + j
            inside = 0 <= y < height and 0 <= x < width
            places[i * size + j] = pixels + 4 * channels * ((image * height + y) * width + x) if inside else outside


@compiled
def transform_weights(w, first, panels, u, step, scratch):
    """Write the transformed weights of some panels of the convolution's output channels to u [36, panels, C, PANEL].

    The weights are [outputs, 3, 3, inputs] in memory, but those of the gradient of x are [inputs, 3, 3, outputs].
    """
    table, turned = scratch, scratch + 512
    if w.mirrored:
        for k in range(panels * w.inputs):
            locate(w.weight, 0, k % w.inputs, 0, 3, 3, 3, w.outputs, table)
            for half in range(0, PANEL, LANES):
                channel = (first + k // w.inputs) * PANEL + half
                transform_mirrored(table, 4 * channel, u + 4 * (k * PANEL + half), step)
        return
    weights = carray(pointer(w.weight), (w.outputs, 9, w.inputs), np.float32)
    lines = carray(pointer(turned), (LANES, 9, PANEL), np.float32)
    for k in range(0, panels * w.inputs, LANES):
        begin, output = k % w.inputs, (first + k // w.inputs) * PANEL
        for j in range(PANEL):
            for tap in range(9):
                for i in range(LANES):
                    lines[i, tap, j] = weights[output + j, tap, begin + i]
        for i in range(LANES):
            locate(turned, 0, i, 0, 3, 3, 3, PANEL, table)
            for half in range(0, PANEL, LANES):
                transform_weight(table, 4 * half, u + 4 * ((k + i) * PANEL + half), step)


@compiled
def convolve_units(work):
    """Take units of a convolution until none is left: y [N, H, W, outputs] of x [N, H, W, inputs]."""
    w = carray(work, 1)[0]
    width = w.panels * PANEL  # channels of a unit
    u_step, v_step, m_step = 4 * w.inputs * width, 4 * w.block * w.inputs, 4 * w.block * width
    u = w.space + take(work, 1) * w.space_size
    v = u + POINTS * u_step
    m = v + POINTS * v_step
    scratch = m + POINTS * m_step
    transformed = -1
    unit = take(work, 0)
    while unit < w.units:
        first = unit // w.ranges * w.panels
        panels = min(w.panels, w.outputs // PANEL - first)
        if first != transformed:
            transform_weights(w, first, panels, u, u_step, scratch)
            transformed = first
        begin, end = w.tiles * (unit % w.ranges) // w.ranges, w.tiles * (unit % w.ranges + 1) // w.ranges
        for start in range(begin, end, w.block):
            n = min(w.block, end - start)
            for t in range(n):
                locate(w.x, w.zeros, start + t, 1, 6, w.height, w.width, w.inputs, scratch)
                for c in range(0, w.inputs, LANES):
                    transform_input(scratch, 4 * c, v + 4 * (t * w.inputs + c), v_step)
            for point in range(POINTS):
                for p in range(panels):
                    panel = u + point * u_step + 4 * p * w.inputs * PANEL
                    for t in range(0, n, PRODUCT_ROWS):
                        row = v + point * v_step + 4 * t * w.inputs
                        out = m + point * m_step + 4 * (t * width + p * PANEL)
                        multiply(row, 4 * w.inputs, 4, panel, out, 4 * width, w.inputs, 0)
            for t in range(n):
                locate(w.y, w.unused, start + t, 0, 4, w.height, w.width, w.outputs, scratch)
                for c in range(0, panels * PANEL, LANES):
                    transform_output(scratch, 4 * (first * PANEL + c), m + 4 * (t * width + c), m_step)
        unit = take(work, 0)


@compiled
def sum_weight_gradients(work):
    """Take units of the weight's gradient until none is left: weight [ranges, outputs, 3, 3, inputs] of x and y."""
    w = carray(work, 1)[0]
    u_step, v_step, m_step = 4 * w.outputs * w.panels * PANEL, 4 * w.block * w.panels * PANEL, 4 * w.block * w.outputs
    u = w.space + take(work, 1) * w.space_size
    v = u + POINTS * u_step
    m = v + POINTS * v_step
    scratch = m + POINTS * m_step
    unit = take(work, 0)
    while unit < w.units:
        first = unit // w.ranges * w.panels
        panels = min(w.panels, w.inputs // PANEL - first)
        begin, end = w.tiles * (unit % w.ranges) // w.ranges, w.tiles * (unit % w.ranges + 1) // w.ranges
        for start in range(begin, end, w.block):
            n = min(w.block, end - start)
            for t in range(n):
                locate(w.x, w.zeros, start + t, 1, 6, w.height, w.width, w.inputs, scratch)
                for c in range(0, panels * PANEL, LANES):
                    line = c // PANEL * w.block + t
                    transform_input(scratch, 4 * (first * PANEL + c), v + 4 * (line * PANEL + c % PANEL), v_step)
                locate(w.y, w.zeros, start + t, 0, 4, w.height, w.width, w.outputs, scratch)
                for c in range(0, w.outputs, LANES):
                    transform_gradient(scratch, 4 * c, m + 4 * (t * w.outputs + c), m_step)
            for point in range(POINTS):
                for p in range(panels):
                    panel = v + point * v_step + 4 * p * w.block * PANEL
                    for k in range(0, w.outputs, PRODUCT_ROWS):
                        out = u + point * u_step + 4 * (p * w.outputs + k) * PANEL
                        rows = m + point * m_step + 4 * k
                        multiply(rows, 4, 4 * w.outputs, panel, out, 4 * PANEL, n, int(start > begin))
        for k in range(panels * w.outputs):
            tile = unit % w.ranges * w.outputs + k % w.outputs
            locate(w.weight, 0, tile, 0, 3, 3, 3, w.inputs, scratch)
            for half in range(0, PANEL, LANES):
                channel = (first + k // w.outputs) * PANEL + half
                transform_weight_gradient(scratch, 4 * channel, u + 4 * (k * PANEL + half), u_step)
        unit = take(work, 0)
