"""What fits a GPU, and with which recipe. Imports no torch."""
