"""Reads and writes model folders: safetensors, Orbax, LoRA adapters, and the checks on them.

May import the words, `models`, `texts` and `storage`; safetensors and Orbax are used here alone.
"""
