"""Turns scores into results, tables, figures and a report.

May import the words, `core`, `storage` and `validity`; only `figures` imports Matplotlib.
"""
