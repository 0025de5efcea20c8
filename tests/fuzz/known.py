"""Seeds whose faults are open, each with a reason."""

KNOWN: dict[int, str] = {}
