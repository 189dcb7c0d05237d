"""What `examples/benchmarks/run.py` is made of: the rows, and how they are timed and written down."""
