"""The studio: one local page from a photograph to a scene, and to what a training run does."""
