"""Defines the networks and, in `families/`, each family's `config.json` and tensor names.

May import the words alone; Flax is used here and nowhere else.
"""
