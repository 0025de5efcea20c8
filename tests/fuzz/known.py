"""Seeds whose faults are open, each with a reason."""

KNOWN: dict[int, str] = {
    54: "a part of a chain is run again by checkpoint() around code that is no host: refused, also when stored",
}
