"""The optimizer update."""
