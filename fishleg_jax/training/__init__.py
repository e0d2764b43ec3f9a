"""Training with an estimate of the inverse Fisher, as optax transformations."""
