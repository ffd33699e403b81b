"""What a number is: each format both ways in plain fp32 torch. Knows no files and no model names."""
