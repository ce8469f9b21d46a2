"""Who talks to us: HTTP and the control socket.

Faces ask the scheduler and render what it says; they decide nothing.
"""
