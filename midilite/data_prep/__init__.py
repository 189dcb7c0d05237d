"""From meshes to training data."""
