"""What a model is: names, files, layers, and the walk through it."""
