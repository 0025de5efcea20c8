"""A run of a module, written down."""
