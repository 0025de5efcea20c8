"""From dataflow to residual adds, units and chains."""
