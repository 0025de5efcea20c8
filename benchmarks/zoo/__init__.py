"""Coverage over model zoos: what is rewired, what stays and why, and whether it is exact, model by model."""
