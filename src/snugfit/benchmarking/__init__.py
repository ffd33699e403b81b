"""Speed and memory of running servers: what is asked, how it is timed, what other tools measured."""
