"""Bugs planted on purpose, to show that the normal run finds them."""
