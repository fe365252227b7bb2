"""Trains models: one step as a pure function, the loop around it, and new tokenizers.

May import the words, `core`, `models`, `texts`, `storage` and `weights`; Optax is used here alone.
"""
