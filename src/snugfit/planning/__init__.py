"""What a model needs of a GPU: caches, weights under tensor parallelism, an engine's other memory. Imports no torch."""
