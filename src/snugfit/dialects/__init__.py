"""What is on disk: one module a dialect. The only place that inverts a scale."""
