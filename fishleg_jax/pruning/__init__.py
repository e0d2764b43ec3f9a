"""Second-order pruning: scores, masks, compensation, one-shot and gradual pruning."""
