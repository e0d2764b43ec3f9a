"""Gradual pruning: an optax transformation that prunes while training goes on."""
