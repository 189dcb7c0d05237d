"""The networks, their weights and folders, and what they see of a picture."""
