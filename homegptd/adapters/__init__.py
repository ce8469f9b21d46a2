"""One class for one outside thing. Time limits and error translation live here; decisions do not.

Adapters fit the protocols of `homegptd.runtime.ports` by shape and import nothing from there.
"""
