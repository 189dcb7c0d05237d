"""glTF 2.0 files: what they say they use is checked, and read or refused by its name."""
