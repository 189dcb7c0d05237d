"""How the tiny model was made; `examples/make_tiny_model.py` is the command."""
