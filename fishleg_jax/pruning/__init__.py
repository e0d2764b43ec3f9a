"""From an inverse Fisher to a pruned network: saliency, masks, compensation, one shot."""
