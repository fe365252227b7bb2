"""Places models on devices and runs programs there: layouts, memory, compiling, processes.

May import the words, `core`, `models` (for shapes) and `storage`.
"""
