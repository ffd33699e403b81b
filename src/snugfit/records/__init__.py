"""Every result file, one a module, with its schema."""
