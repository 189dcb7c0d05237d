"""The software rasteriser and charts."""
