"""What `examples/study_adapters.py` is made of: the domains, the work that processes share, and the report."""
