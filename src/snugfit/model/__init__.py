"""What a model is and how it runs: layout, logical weights, layers, the forward pass."""
