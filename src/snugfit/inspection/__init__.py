"""What is in a checkpoint, from headers alone."""
