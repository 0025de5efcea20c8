"""What is left of a pretrained function right after conversion."""
