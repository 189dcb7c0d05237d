"""How the tiny model was made; `examples/recipes/tiny_model/run.py` is the command."""
