"""Prompts are read and cut here; stock engines (vLLM), here or elsewhere, decode on from what is kept.

files.py     compressed prompts as files that the engines read
decoders.py  tokens from one engine, and on from another where that one breaks
vllm.py      how an engine is started
engine.py    which prompt is read next, and what becomes of its replies
"""
