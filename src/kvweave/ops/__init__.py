"""Pure tensor functions: statistics of attention, budgets, selection, matching, merging.

Nothing here knows a model, a cache or a method. Letters in shape comments: `length` is the number of slots
a row holds, `rows` the number of its last tokens whose queries are at hand, `kept` what stays.
"""
