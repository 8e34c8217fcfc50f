"""Measured quality: which method answers how well at which budget."""
