"""How the numbers are computed."""
