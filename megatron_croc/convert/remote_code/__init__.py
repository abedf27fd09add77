"""Code that an export carries with it, for transformers 4.57 and later; copied, never imported."""
