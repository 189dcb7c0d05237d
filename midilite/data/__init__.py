"""Training data: from disk to encoded scenes."""
