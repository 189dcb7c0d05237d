"""The version, where setup.py, the face and the metadata of adapters read it."""

__version__ = "0.1.0"
