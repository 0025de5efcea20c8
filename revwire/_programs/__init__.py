"""Recorded calls as `torch.fx` graphs."""
