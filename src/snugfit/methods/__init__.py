"""Choosing the codes and scales of weights."""
