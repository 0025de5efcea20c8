"""Find out what may be computed piece by piece: units in chunks, and cores inside of their branches in parts."""
