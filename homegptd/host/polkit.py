"""The polkit rule that lets the unprivileged daemon work with its engines' units, and no others.

Names are exact, never a pattern: StartTransientUnit asks for the same right as StartUnit, so a name
without a unit on disk would let the daemon's user run anything as root. For the same reason each
name is listed only while its unit's file is there, and the rule looks again when it is asked.
"""

import json
from collections.abc import Mapping

VERBS = ("start", "stop", "restart", "kill", "reset-failed")


def rule(fragments: Mapping[str, str], *, mark: str) -> str:
    """`fragments`: unit names and the files that systemd loaded them from."""
    units = json.dumps(dict(sorted(fragments.items())), indent=4).replace("\n", "\n    ")
    return f"""\
{mark.replace("#", "//", 1)}
polkit.addRule(function (action, subject) {{
    if (action.id !== "org.freedesktop.systemd1.manage-units" || subject.user !== "homegpt")
        return polkit.Result.NOT_HANDLED;
    var files = {units};
    var verbs = {json.dumps(VERBS)};
    var unit = action.lookup("unit");
    if (!Object.prototype.hasOwnProperty.call(files, unit))
        return polkit.Result.NOT_HANDLED;
    if (verbs.indexOf(action.lookup("verb")) < 0)
        return polkit.Result.NOT_HANDLED;
    try {{
        polkit.spawn(["/usr/bin/test", "-e", files[unit]]);
    }} catch (error) {{
        polkit.log("homegpt: " + unit + " has no file any more");
        return polkit.Result.NOT_HANDLED;
    }}
    return polkit.Result.YES;
}});
"""
