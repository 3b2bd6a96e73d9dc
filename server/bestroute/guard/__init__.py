"""Who may call, and how much.

tls             the server's certificates, read again when they change
authentication  API keys and JWTs, around every RPC
keys            callers by their API keys
tokens          callers by their JWTs
refreshed       what is read again and again, and kept where that fails
connections     what one connection may take
exposure        what is exposed that likely should not be
callers         who a call is from, and what its caller may have
allowance       rates and spend
"""
