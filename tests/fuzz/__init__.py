"""Feeds every reader with damaged and hostile input. `python -m fuzz`, from `tests/`, runs it."""
