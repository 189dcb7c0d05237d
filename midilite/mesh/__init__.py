"""Triangles, points and fields: geometry, nearest points, surface extraction, scenes to files."""
