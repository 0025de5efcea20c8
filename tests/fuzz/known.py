"""Seeds whose faults are open, each with a reason."""

KNOWN: dict[int, str] = {
    235: "in chunks: refused, as in eval mode a block writes in place to the stream and makes no residual add of it",
    3965: "a part of a chain is run again by checkpoint() around code that saves something else: refused",
}

CRASHES: dict[int, str] = {
    3697: "PyTorch ends the process where the original registers a hook on a tensor that it wrote in place before",
    4152: "as 3697",
    4489: "as 3697",
}
"""Seeds whose original cannot be run."""
