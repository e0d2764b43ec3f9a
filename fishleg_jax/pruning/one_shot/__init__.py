"""One-shot pruning: fit, score, mask, compensate, stage by stage."""
