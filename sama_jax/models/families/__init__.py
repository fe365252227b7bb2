"""Reads `config.json` and names the tensors of each family, one file a family."""
