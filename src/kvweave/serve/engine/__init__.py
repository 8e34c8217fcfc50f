"""What runs the model: prompts are read and cut one after the other, replies decode together.

reading.py    a prompt, or a question behind a context, through the model
reply.py      one reply: from logits to text
sampling.py   a token from logits
job.py        what is asked of the engine
queue.py      jobs that wait, and the thread that works on them
loop.py       which job is next, a token for each reply, who leaves
proof.py      that rows of a pool decode as they do alone, with this model
"""
