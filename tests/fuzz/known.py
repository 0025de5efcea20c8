"""Seeds whose faults are open, each with a reason."""

KNOWN: dict[int, str] = {
    54: "stored activations under the model's own checkpoint() around a host of hosts: a CheckpointError",
}
