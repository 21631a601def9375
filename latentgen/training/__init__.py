"""The training core: data, objective (pure functions), loop (a generator), checkpoint.

The scripts in `training/` are thin: each brings its model and its loss, and everything they share
is here. Nothing in this package parses arguments or prints.
"""
