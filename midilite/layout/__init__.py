"""The scene laid over its photograph: a camera, and where each object stands so that it is seen where its mask is."""
