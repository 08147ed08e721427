"""Partitions the graph of a step that was traced as for one device into the program of a rank."""
