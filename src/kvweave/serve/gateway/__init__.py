"""One address for several servers: each request goes to one of them, and on to another where that one breaks.

forward.py    what is asked of replicas, and a stream that outlives the one that began it
holders.py    which replica holds which context
metrics.py    what is counted, here and by the replicas
app.py        the endpoints
"""
