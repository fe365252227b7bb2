"""Keeps what a run produces: atomic files, the loss store, the run folder, replay files.

May import the words alone, and no JAX but in `replay`.
"""
