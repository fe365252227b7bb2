"""Model families (Flax Linen lives here and nowhere else)."""
