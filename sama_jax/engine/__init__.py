"""Runs the passes that attacks ask for, stores the losses, and scores what the store holds.

May import the words and every room below it: `core`, `attacks`, `models`, `texts`, `storage`,
`weights` and `devices`.
"""
