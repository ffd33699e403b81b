"""What servers demand, as data. Imports no torch."""
