"""Run a module once on real values, and write down what happens: calls, values, writes, and what Python decides on."""
