"""Gradual pruning: an optax transformation that prunes during training."""
