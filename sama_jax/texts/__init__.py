"""Reads texts from files, tokenizes them, and chooses the lengths that they are padded to.

May import the words alone.
"""
