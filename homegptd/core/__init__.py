"""What decides: phases, events, commands and `step`.

Nothing in here does I/O, reads a clock, logs or knows asyncio; `now` is always an argument.
"""
