"""Doctor's checks, one kind of fault a function: each takes the evidence and yields findings."""
