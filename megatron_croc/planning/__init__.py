"""Operations, memory and time of a step, and which layout fits: estimates without a GPU."""
