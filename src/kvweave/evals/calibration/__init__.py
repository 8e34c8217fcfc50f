"""A model's profile: which heads want how much of a prompt (SPEC 17.7).

`shares` takes the mean over prompts of what kvzip's score gives each head; `fit` goes on from there by what it costs
to cut.
"""
