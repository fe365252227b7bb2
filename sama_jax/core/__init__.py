"""Computes SAMA's mathematics: masks, token losses, votes, statistics of one text, and metrics.

May import the words (`arrays`, `config`, `errors`, `rng`) and no other folder: every function here
is pure and is written for one text.
"""
