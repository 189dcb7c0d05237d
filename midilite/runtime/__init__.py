"""How a network runs: eight bits, offloading, sharding, compilation, CUDA graphs."""
