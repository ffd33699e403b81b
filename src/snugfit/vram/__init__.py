"""What a served model needs of a GPU. Imports no torch."""
