"""Summing gradients over the mesh."""
