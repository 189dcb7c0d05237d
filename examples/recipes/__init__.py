"""How what ships was made and studied."""
