"""Running servers: what they are asked, and what they say."""
