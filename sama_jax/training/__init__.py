"""Trains models: a step as a pure function, the loop, the run folder, and new tokenizers.

May import the words, `core`, `models`, `texts`, `storage` and `weights`; Optax is used here alone.
"""
