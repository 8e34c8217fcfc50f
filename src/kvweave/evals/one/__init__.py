"""A single question, answered by several methods and drawn."""
