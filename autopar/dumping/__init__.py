"""Every stage of the way as a file that a person can read, and that can be read back.

`source` writes a graph as Python, `parse` reads it back without running it, `problem` does both for the solver's
problem, `stages` writes the folder that `dump_dir=` names.
"""
