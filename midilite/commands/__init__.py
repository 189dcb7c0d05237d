"""What stands behind the commands in `examples/`."""
