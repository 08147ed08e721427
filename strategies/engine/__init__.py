"""Trace once, call per device."""
