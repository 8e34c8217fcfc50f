"""From an answer and the truth to numbers."""
