"""From stored samples to tables, intervals and pages."""
