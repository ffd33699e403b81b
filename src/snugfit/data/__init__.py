"""Texts and token rows."""
