"""Bytes: directories, the Hub, shards. No model names, no transformers."""
