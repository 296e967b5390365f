"""The function runtime: an expert's feed-forward on grouped tokens, and the instances that a process hosts.

Used by the workers (through dispatch.server) and by the engine's own process (through dispatch.dispatcher).
"""
