"""Rectified flow as pure functions; the model is an argument."""
