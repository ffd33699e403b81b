"""Recipes, one YAML file each, and the resolution of their rules for a model."""
