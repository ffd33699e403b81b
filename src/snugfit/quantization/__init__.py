"""Quantize a checkpoint: plan, estimate, then layer by layer."""
