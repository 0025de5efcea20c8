"""What a training step holds and how long it takes."""
