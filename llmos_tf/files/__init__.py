"""Files on disk: bounded reads, atomic writes, locks, and errors that name the file."""
