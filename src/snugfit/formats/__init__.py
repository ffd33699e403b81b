"""How numbers are stored: each format in both directions in plain fp32 torch. No files, no model names."""
