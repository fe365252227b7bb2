"""Does what each command of `sama-jax` promises, one file a command.

May import the words and every folder below it: `core`, `attacks`, `models`, `texts`, `storage`,
`validity`, `weights`, `devices`, `engine`, `training` and `reporting`.
"""
