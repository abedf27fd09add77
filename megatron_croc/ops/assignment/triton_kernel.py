"""Exact assignment on the GPU: one Triton program per image, all images of a call at once.

The algorithm of `shortest_paths`, without races between threads: duals, distances and matching are
vectors over the columns, in registers. Memory is only read until the last stores. Threads exchange
values through reductions only, which synchronise. A masked sum reads a scalar from a vector. No
barrier is needed, and any number of warps is safe.

A row is identified by its column, so reverse paths need no vector over the rows. Of equal columns
an unmatched one is taken, then the lowest. This keeps paths short and makes the result independent
of the order of threads. All arithmetic is float64; the number of rows or columns bounds every loop.

Only `on_gpu` imports this module, and only where it is used, because Triton is optional.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# Triton kernels have Python's syntax, but not its types.

import triton
import triton.language as tl


@triton.jit
def _pick(values, columns, column):
    """Element of `values` at `column`."""
    return tl.sum(tl.where(columns == column, values, 0), axis=0)


@triton.jit
def _first_least(values, columns, avoided, NUM_PADDED: tl.constexpr):
    """Minimum of `values`, and the lowest column that has it, an `avoided` one only if all are."""
    least = tl.min(values, axis=0)
    preference = tl.where(avoided, columns + NUM_PADDED, columns)
    first = tl.min(tl.where(values == least, preference, 2 * NUM_PADDED), axis=0)
    return least, first & (NUM_PADDED - 1)


@triton.jit
def solve_images(
    cost,  # float32 or float64 [B, n, P]
    lengths,  # int32 [B], 0: an image to skip
    initial_duals,  # float64 [B, P], at most 0
    start_row_of,  # int32 [B, P], row of each column at the start; -1: none
    unmatched,  # int32 [B, n], rows without a column at the start
    num_unmatched,  # int32 [B]
    index,  # int64 [B, n], output: column of each row
    duals,  # float64 [B, P], output
    num_steps,  # int32 [B], output
    num_rows,
    num_columns,
    NUM_PADDED: tl.constexpr,
):
    """Solve one image: match the unmatched rows, then the unmatched columns with a dual below 0."""
    image = tl.program_id(0).to(tl.int64)
    matrix = cost + image * num_rows * num_columns
    columns = tl.arange(0, NUM_PADDED)
    exists = columns < num_columns
    place = image * num_columns + columns
    dual = tl.load(initial_duals + place, mask=exists, other=0.0)
    row_of = tl.load(start_row_of + place, mask=exists, other=-1)
    length = tl.load(lengths + image)
    to_match = tl.load(num_unmatched + image)
    steps = tl.full((), 0, tl.int32)
    infinity = float("inf")

    # Forward paths: Dijkstra over the columns from each unmatched row.
    for number in range(to_match):
        row = tl.load(unmatched + image * num_rows + number)
        line = tl.load(matrix + row * num_columns + columns, mask=exists, other=infinity)
        distance = line.to(tl.float64) - dual
        comes_from = tl.zeros([NUM_PADDED], tl.int32) + row
        scanned = columns < 0
        least, column = _first_least(distance, columns, row_of >= 0, NUM_PADDED)
        owner = _pick(row_of, columns, column)
        budget = length  # every iteration but the last scans one more matched column
        while (owner >= 0) & (budget > 0):
            budget -= 1
            scanned = scanned | (columns == column)
            line = tl.load(matrix + owner * num_columns + columns, mask=exists, other=infinity)
            slack = line.to(tl.float64) - dual
            reached = slack + (least - _pick(slack, columns, column))
            nearer = (reached < distance) & (scanned == 0)
            distance = tl.where(nearer, reached, distance)
            comes_from = tl.where(nearer, owner, comes_from)
            frontier = tl.where(scanned, infinity, distance)
            least, column = _first_least(frontier, columns, row_of >= 0, NUM_PADDED)
            owner = _pick(row_of, columns, column)
        steps += length - budget + 1
        dual = tl.where(scanned, dual + (distance - least), dual)
        # Each row of the path takes the column it reached, and leaves its own to the next row.
        mover = _pick(comes_from, columns, column)
        left = tl.max(tl.where(row_of == mover, columns, -1), axis=0)
        row_of = tl.where(columns == column, mover, row_of)
        budget = length
        while (left >= 0) & (budget > 0):
            budget -= 1
            column = left
            mover = _pick(comes_from, columns, column)
            left = tl.max(tl.where(row_of == mover, columns, -1), axis=0)
            row_of = tl.where(columns == column, mover, row_of)

    # Reverse paths: raise the dual of each unmatched column to 0, or match it and free another.
    start = tl.min(tl.where((row_of < 0) & (dual < 0), columns, NUM_PADDED), axis=0)
    to_settle = num_columns * (length > 0)
    while (start < NUM_PADDED) & (to_settle > 0):
        to_settle -= 1
        matched = row_of >= 0
        line = matrix + row_of * num_columns
        own = tl.load(line + columns, mask=matched, other=0.0)
        best = own.to(tl.float64) - dual
        start_dual = _pick(dual, columns, start)
        first = tl.load(line + start, mask=matched, other=infinity)
        distance = first.to(tl.float64) - start_dual - best
        goes_to = tl.zeros([NUM_PADDED], tl.int32) + start
        scanned = columns < 0
        freed = start
        rise = -start_dual
        least, column = _first_least(distance, columns, scanned, NUM_PADDED)
        budget = length
        while (least < rise) & (budget > 0):
            budget -= 1
            scanned = scanned | (columns == column)
            column_dual = _pick(dual, columns, column)
            until_zero = least - column_dual
            freed = tl.where(until_zero < rise, column, freed)
            rise = tl.minimum(rise, until_zero)
            entry = tl.load(line + column, mask=matched, other=infinity)
            reached = least + (entry.to(tl.float64) - column_dual - best)
            nearer = (reached < distance) & (scanned == 0)
            distance = tl.where(nearer, reached, distance)
            goes_to = tl.where(nearer, column, goes_to)
            frontier = tl.where(scanned, infinity, distance)
            least, column = _first_least(frontier, columns, scanned, NUM_PADDED)
        steps += length - budget + 1
        dual = tl.where(scanned, dual + (rise - distance), dual)
        dual = tl.where(columns == start, dual + rise, dual)
        dual = tl.where(columns == freed, 0.0, tl.minimum(dual, 0.0))
        # The row of the freed column moves to another, and so on, up to the column `start`.
        old_row_of = row_of
        row_of = tl.where((columns == freed) & (freed != start), -1, row_of)
        column = freed
        budget = length
        while (column != start) & (budget > 0):
            budget -= 1
            row = _pick(old_row_of, columns, column)
            column = _pick(goes_to, columns, column)
            row_of = tl.where(columns == column, row, row_of)
        start = tl.min(tl.where((row_of < 0) & (dual < 0), columns, NUM_PADDED), axis=0)

    tl.store(index + image * num_rows + row_of, columns.to(tl.int64), mask=row_of >= 0)
    tl.store(duals + place, dual, mask=exists)
    tl.store(num_steps + image, steps)
