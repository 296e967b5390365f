"""Decisions as pure functions: how many instances each function gets, and which worker hosts them.

Called by the live loop, the simulator and `moeless plan` alike. No clock, no I/O, no randomness but from seeds that
are arguments; neither torch nor ray.
"""
