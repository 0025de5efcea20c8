"""Forms of units, their costs, and the fastest mix within a budget."""
