"""What may run in chunks and in parts."""
