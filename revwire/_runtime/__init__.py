"""A forward and a backward through chains: units, tape, recompute, rewind."""
