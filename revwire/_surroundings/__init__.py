"""All that a recompute must find as the forward did, and what a run must leave as it found it."""
