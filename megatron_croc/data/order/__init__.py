"""Order of samples: the packs of a run, computed from a few integers."""
