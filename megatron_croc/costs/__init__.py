"""Operations that samples cost in training, computed from the settings alone."""
