"""Rows of tokens, and what is measured on them."""
