"""What `adapter_study/run.py` is made of: the domains, the work that processes share, and the report."""
