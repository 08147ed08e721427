"""Graphs on ranks against one device: a harness, and a table of cases for each table of rules."""
