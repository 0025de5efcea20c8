"""Segments of a video: how far they overlap, and those that were detected."""
