"""Networks: their definitions, weights, training and evaluation."""
