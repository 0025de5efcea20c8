"""Benchmarks: each leaves a record in results/, and every published table is made from the records. Run from the
repository root.
"""
