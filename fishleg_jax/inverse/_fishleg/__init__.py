"""FishLeg: the learned inverse Fisher."""
