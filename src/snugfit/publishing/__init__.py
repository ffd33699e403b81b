"""Publish a quantized model: report, card, page, and the upload."""
