"""From a prompt and a method to an answer."""
