"""Claims: their rows, their transactions, their connections."""
