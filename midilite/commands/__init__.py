"""What stands behind the commands in `examples/`, and behind `midilite COMMAND`."""
