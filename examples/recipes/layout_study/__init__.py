"""How much the layout fit gains: with the true layout plus noise, and with the shipped model."""
