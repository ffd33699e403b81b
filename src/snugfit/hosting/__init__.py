"""Engines that are started here on a checkpoint, asked, measured and stopped."""
