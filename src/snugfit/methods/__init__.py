"""How codes are chosen for a format."""
