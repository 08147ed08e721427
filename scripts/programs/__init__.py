"""The work of the programs, each in the module of its name: imported after flags are checked."""
