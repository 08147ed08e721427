"""Runs the tests of another project under mesh strategies, and compares with single-device runs."""
