"""What works on the host's files: units from the configuration, and looking after the box.

Root runs it, from `homegptctl` and before the daemon starts; the daemon itself never does. Writing
a Quadlet is owning the machine, so the unprivileged daemon must not be able to.
"""
