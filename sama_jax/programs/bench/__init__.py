"""Measures what scoring costs on this machine, and beside a plain PyTorch form of the attack."""
