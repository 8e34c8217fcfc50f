"""What the parts of weave are worth, when a deferred cut pays, what sampling costs: docs/RESEARCH.md."""
