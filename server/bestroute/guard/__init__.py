"""Who may call, and how much.

callers     who a call is from, and what its caller may have
"""
