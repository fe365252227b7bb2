"""Does what each command of `sama-jax` promises, one file a command.

May import every room but `cli`.
"""
