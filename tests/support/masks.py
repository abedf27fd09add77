"""Random rows for tests of the mixed mask: packed samples of text and spans, and padding."""

from hypothesis import strategies as st

# Samples of pieces (length, whether it is a span), and padding. Neighbouring pieces that are both
# spans touch; a piece of length 1 is a span of one token; a leading span is a prefix.
piece = st.tuples(st.integers(1, 5), st.booleans())
rows = st.tuples(
    st.lists(st.lists(piece, min_size=1, max_size=5), min_size=1, max_size=4), st.integers(0, 6)
)


def lay_out(samples, padding):
    """(cu_seqlens, spans, length) of a row."""
    cu, spans, position = [0], [], 0
    for pieces in samples:
        for length, is_span in pieces:
            if is_span:
                spans.append((position, position + length))
            position += length
        cu.append(position)
    return cu, spans, position + padding
