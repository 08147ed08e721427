"""The SPMD program that a device runs, and the keys of its collectives."""
