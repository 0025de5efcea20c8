"""Models that nobody wrote, with the odd Python that people write.

A seed makes the source text of a model (`program`), from the statements in `grammar`: residual blocks in a loop, in an
`nn.Sequential`, in one another, with what the code of such blocks has been seen to do: early returns, writes in place,
buffers, random draws, lists that are filled, decisions on values, globals. `runner` calls it three times, in training
and evaluation, with other arguments, globals and flags in each, and asks:

- converted with the plain rule (`toys.Plain`), is it the original? Outputs, gradients, buffers, generators, what it
  counts, logs and keeps; and does it raise only where the original does?
- converted exactly, is a reversible step one with stored activations, to the bit?
- does converting leave the model as found, and `revert` give the original back, to the bit, and leave nothing behind?

Warnings are allowed. `pytest tests/fuzz` runs the first 300 seeds; many more, from the root of the repository:

    python -m tests.fuzz --seeds 0:5000          each fault, and a summary in JSON; --record for one that is committed
    python -m tests.fuzz --seeds 17 --show       the source text of a model, and what became of it
    python -m tests.fuzz --seeds 17 --shrink     the same, without the statements that do not matter

Faults that are open stand in `known.py`, by seed, with a reason.
"""
