"""The global graph that is partitioned: its ops with shapes, and placements of their values."""
