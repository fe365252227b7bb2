"""Turns scores into results, tables, figures and a report.

May import the words, `core` and `storage`; only `figures` imports Matplotlib.
"""
