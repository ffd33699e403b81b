"""snugfit: quantize a language model to fit the GPU you have, in formats that stock engines run."""

__version__ = "0.1.0"
