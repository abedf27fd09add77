"""Exact assignment on the GPU: one Triton program per image, all images of a call at once.

The search of `shortest_paths`, laid out so that threads have nothing to race for: duals,
distances and the matching are vectors over the columns that live in registers, memory is only
read until the last store, and all that one thread learns from another passes through a reduction,
which synchronises. Scalars are read out of a vector by a masked sum. No barrier is needed, and
any number of warps is safe.

A row is known by the column it holds, so reverse paths need no vector over the rows. A tie goes
to a column that is free, then to the lowest: paths stay short, and the result does not depend on
the order of threads. Arithmetic is float64 whatever the costs are in; every loop is bounded by
the number of rows or columns.

Imported by `on_gpu` alone, and only where it is used: Triton is optional.
"""

# pyright: basic, reportArgumentType=false, reportOperatorIssue=false
# The kernel language looks like Python but types as something else.

import triton
import triton.language as tl


@triton.jit
def _pick(values, columns, column):
    """The element of `values` at `column`."""
    return tl.sum(tl.where(columns == column, values, 0), axis=0)


@triton.jit
def _first_least(values, columns, avoided, NUM_PADDED: tl.constexpr):
    """The least of `values`, and the lowest column that has it, if possible not an avoided one."""
    least = tl.min(values, axis=0)
    preference = tl.where(avoided, columns + NUM_PADDED, columns)
    first = tl.min(tl.where(values == least, preference, 2 * NUM_PADDED), axis=0)
    return least, first & (NUM_PADDED - 1)


@triton.jit
def solve_images(
    cost,  # float32 or float64 [B, n, P]
    lengths,  # int32 [B], 0: nothing to do
    start_prices,  # float64 [B, P], at most 0
    start_row_of,  # int32 [B, P], the row that holds each column at the start; -1: none
    unmatched,  # int32 [B, n], the rows without a column at the start
    num_unmatched,  # int32 [B]
    index,  # int64 [B, n], written: the column of each row
    duals,  # float64 [B, P], written
    num_steps,  # int32 [B], written
    num_rows,
    num_columns,
    NUM_PADDED: tl.constexpr,
):
    """One image: match the rows still unmatched, then settle the columns still priced."""
    image = tl.program_id(0).to(tl.int64)
    matrix = cost + image * num_rows * num_columns
    columns = tl.arange(0, NUM_PADDED)
    exists = columns < num_columns
    place = image * num_columns + columns
    price = tl.load(start_prices + place, mask=exists, other=0.0)
    row_of = tl.load(start_row_of + place, mask=exists, other=-1)
    length = tl.load(lengths + image)
    to_match = tl.load(num_unmatched + image)
    steps = tl.full((), 0, tl.int32)
    infinity = float("inf")

    # Forward paths: Dijkstra over the columns from each unmatched row.
    for number in range(to_match):
        row = tl.load(unmatched + image * num_rows + number)
        line = tl.load(matrix + row * num_columns + columns, mask=exists, other=infinity)
        distance = line.to(tl.float64) - price
        comes_from = tl.zeros([NUM_PADDED], tl.int32) + row
        scanned = columns < 0
        least, column = _first_least(distance, columns, row_of >= 0, NUM_PADDED)
        owner = _pick(row_of, columns, column)
        budget = length  # each pass but the last scans one more matched column
        while (owner >= 0) & (budget > 0):
            budget -= 1
            scanned = scanned | (columns == column)
            line = tl.load(matrix + owner * num_columns + columns, mask=exists, other=infinity)
            slack = line.to(tl.float64) - price
            reached = slack + (least - _pick(slack, columns, column))
            nearer = (reached < distance) & (scanned == 0)
            distance = tl.where(nearer, reached, distance)
            comes_from = tl.where(nearer, owner, comes_from)
            frontier = tl.where(scanned, infinity, distance)
            least, column = _first_least(frontier, columns, row_of >= 0, NUM_PADDED)
            owner = _pick(row_of, columns, column)
        steps += length - budget + 1
        price = tl.where(scanned, price + (distance - least), price)
        # Each row on the path takes the column it reached; the next one seeks for the one left.
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

    # Reverse paths: raise each unmatched column to 0, or match it and free another.
    start = tl.min(tl.where((row_of < 0) & (price < 0), columns, NUM_PADDED), axis=0)
    to_settle = num_columns * (length > 0)
    while (start < NUM_PADDED) & (to_settle > 0):
        to_settle -= 1
        matched = row_of >= 0
        line = matrix + row_of * num_columns
        own = tl.load(line + columns, mask=matched, other=0.0)
        best = own.to(tl.float64) - price
        start_price = _pick(price, columns, start)
        first = tl.load(line + start, mask=matched, other=infinity)
        distance = first.to(tl.float64) - start_price - best
        goes_to = tl.zeros([NUM_PADDED], tl.int32) + start
        scanned = columns < 0
        freed = start
        rise = -start_price
        least, column = _first_least(distance, columns, scanned, NUM_PADDED)
        budget = length
        while (least < rise) & (budget > 0):
            budget -= 1
            scanned = scanned | (columns == column)
            column_price = _pick(price, columns, column)
            until_zero = least - column_price
            freed = tl.where(until_zero < rise, column, freed)
            rise = tl.minimum(rise, until_zero)
            entry = tl.load(line + column, mask=matched, other=infinity)
            reached = least + (entry.to(tl.float64) - column_price - best)
            nearer = (reached < distance) & (scanned == 0)
            distance = tl.where(nearer, reached, distance)
            goes_to = tl.where(nearer, column, goes_to)
            frontier = tl.where(scanned, infinity, distance)
            least, column = _first_least(frontier, columns, scanned, NUM_PADDED)
        steps += length - budget + 1
        price = tl.where(scanned, price + (rise - distance), price)
        price = tl.where(columns == start, price + rise, price)
        price = tl.where(columns == freed, 0.0, tl.minimum(price, 0.0))
        # The row of the freed column moves on, and so each after it, up to the column `start`.
        old_row_of = row_of
        row_of = tl.where((columns == freed) & (freed != start), -1, row_of)
        column = freed
        budget = length
        while (column != start) & (budget > 0):
            budget -= 1
            row = _pick(old_row_of, columns, column)
            column = _pick(goes_to, columns, column)
            row_of = tl.where(columns == column, row, row_of)
        start = tl.min(tl.where((row_of < 0) & (price < 0), columns, NUM_PADDED), axis=0)

    tl.store(index + image * num_rows + row_of, columns.to(tl.int64), mask=row_of >= 0)
    tl.store(duals + place, price, mask=exists)
    tl.store(num_steps + image, steps)
