"""What all benchmarks share: records, tables, where real data lies."""
