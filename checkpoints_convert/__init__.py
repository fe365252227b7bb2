"""Converts, describes and verifies model folders. Only `verify` and pickles import torch."""
