"""How states are held: floats, fixed point, samples, kept bits, kernels."""
