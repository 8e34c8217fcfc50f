"""Servers that answer alike, here or elsewhere: kvweave's behind a gateway, and vLLM's behind kvweave's.

guard.py      a command in a process group that ends with whoever started it
processes.py  servers on this machine: started, watched, started anew
replicas.py   which servers there are, which of them answer, and which one is next
tries.py      one request to one replica after the other
"""
