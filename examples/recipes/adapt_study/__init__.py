"""Adapting the shipped model to one's own pictures: three studies (run.py)."""
