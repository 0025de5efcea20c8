"""What sits on a module instance in place of its forward."""
