"""From a picture to a scene."""
