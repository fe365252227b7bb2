"""Weights between PyTorch folders (safetensors) and our parameter trees. Never imports torch."""
