"""What nobody may: other users, the daemon's own user, programs outside; and what nobody may see.

At the end the package goes again, and leaves nothing but the weights.
"""

import re
import urllib.error
import urllib.request

import pytest

from .appliance import CONFIG, PACKAGE, WEBUI, WRITER, Appliance, Sim
from .lab.images import load_engine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
TOKEN = "hf_pssst-1234567890"
AS_DAEMON = ("runuser", "-u", "homegpt", "--")


def _as_daemon(box: Appliance, *words: str) -> int:
    return box.machine.run(*AS_DAEMON, *words, check=False).code


def test_the_daemons_user_runs_its_engines_and_nothing_else(running: Appliance) -> None:
    assert _as_daemon(running, "systemctl", "stop", "vllm-writer") == 0
    assert _as_daemon(running, "systemctl", "stop", "dbus") != 0
    assert _as_daemon(running, "systemctl", "restart", "homegpt") != 0
    assert _as_daemon(running, "systemctl", "daemon-reload") != 0
    assert _as_daemon(running, "systemd-run", "--unit=vllm-evil", "id") != 0
    assert _as_daemon(running, "systemd-run", "--unit=vllm-coder", "id") != 0
    assert _as_daemon(running, "systemd-run", "--unit=vllm-writer", "id") != 0
    limit = ("systemctl", "set-property", "vllm-writer.service", "MemoryMax=1G")
    assert _as_daemon(running, *limit) != 0
    assert _as_daemon(running, "mv", "/run/homegpt/engines", "/run/homegpt/other") != 0
    assert _as_daemon(running, "ln", "-s", "/etc", "/run/homegpt/engines/evil") != 0
    for path in (CONFIG, "/etc/containers/systemd/homegpt", "/etc/polkit-1/rules.d"):
        assert _as_daemon(running, "test", "-w", path) != 0


def test_a_listed_unit_whose_quadlet_is_broken_is_no_way_to_root(running: Appliance) -> None:
    running.systemctl("stop", "vllm-writer")
    path = "/etc/containers/systemd/vllm-writer.container.d/90-local.conf"
    running.machine.write(path, "[Container]\nNoSuchKey=1\n")
    running.machine.systemctl("daemon-reload")
    assert running.show("vllm-writer", "LoadState") == "not-found"
    assert "vllm-writer.service" in running.machine.read("/etc/polkit-1/rules.d/50-homegpt.rules")
    assert _as_daemon(running, "systemd-run", "--unit=vllm-writer", "touch", "/root/evil") != 0
    assert not running.machine.path("/root/evil").exists()
    running.ctl("apply", "--yes", "--files-only", check=False)
    running.machine.path(path).unlink()
    running.machine.systemctl("daemon-reload")


def test_others_reach_neither_engines_nor_control(running: Appliance) -> None:
    folder = "/run/homegpt/engines/coder"
    told = running.machine.run("stat", "-c", "%A %U:%G", folder, f"{folder}/engine.sock").out
    assert told == "drwxr-s--- root:homegpt\nsrwxrwx--- root:homegpt\n"
    for path in ("/run/homegpt/engines/coder/engine.sock", "/run/homegpt/control.sock"):
        connect = f"import socket; socket.socket(socket.AF_UNIX).connect('{path}')"
        words = ("runuser", "-u", "nobody", "--", "python3", "-c", connect)
        assert "PermissionError" in running.machine.run(*words, check=False).err
    listening = running.machine.run("cat", "/proc/net/tcp", "/proc/net/tcp6").out
    ports = {int(port, 16) for port in re.findall(r":([0-9A-F]{4}) \S+ 0A ", listening)}
    assert 9000 in ports
    assert 8000 not in ports
    for path in ("/sleep?level=1", "/collective_rpc", "/v1/../sleep"):
        ask = urllib.request.Request(f"{running.url}{path}", data=b"{}")
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(ask, timeout=5)
        assert error.value.code in {404, 405}
        error.value.close()


def test_a_secret_is_seen_nowhere(appliance: Appliance) -> None:
    machine = appliance.machine
    machine.run("podman", "secret", "create", "--replace", "hf", "-", stdin=TOKEN)
    online = Sim("coder", "active", engine="network: true")
    appliance.configure(online, WRITER, head="secrets: {hf_token: hf}\n")
    appliance.start()
    told = machine.run("podman", "exec", "vllm-coder", "busybox", "env", service=True).out
    assert f"HF_TOKEN={TOKEN}" in told
    shown = [
        machine.run("podman", "inspect", "vllm-coder").out,
        machine.run("sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' '").out,
        machine.run("journalctl", "--no-pager").out,
        machine.run("systemctl", "show", "vllm-coder").out,
        machine.run("sh", "-c", "cat /run/systemd/generator/* 2>/dev/null; :").out,
        machine.run("sh", "-c", "cat /etc/containers/systemd/homegpt/*").out,
    ]
    assert not [text for text in shown if TOKEN in text]
    machine.run("podman", "secret", "rm", "hf")


def test_the_sandbox_is_tight(appliance: Appliance) -> None:
    told = appliance.machine.run("systemd-analyze", "security", "--no-pager", "homegpt").out
    found = re.search(r"exposure level for homegpt\.service: ([\d.]+)", told)
    assert found is not None
    print(f"appliance: systemd-analyze security homegpt: {found[1]}")
    assert float(found[1]) <= 1.5


# ------------------------------------------------------------ the package goes


def _left(box: Appliance) -> set[str]:
    """Files that carry our name, where packages and daemons put theirs."""
    places = "/etc /usr/bin /usr/lib /usr/share /var/lib /var/cache /run"
    prune = "-path /run/systemd -o -path /var/lib/containers -o -path /var/lib/dpkg"
    words = (
        f"find {places} \\( {prune} \\) -prune -o -name '*homegpt*' -print -o -name 'vllm-*' -print"
    )
    found = box.machine.run("sh", "-c", words).out.split()
    return {path for path in found if not path.startswith("/usr/src")}


@pytest.mark.parametrize("way", ["remove", "purge"])
def test_the_package_goes_and_leaves_only_the_weights(running: Appliance, way: str) -> None:
    machine = running.machine
    machine.write("/var/cache/homegpt/hf/hub/weights", "hours of download")
    machine.run("podman", "network", "create", "--ignore", "homegpt")  # as Open WebUI's unit does
    machine.run("podman", "volume", "create", "open-webui")
    try:
        machine.run("apt-get", "-qq", "-y", way, "homegpt", timeout=90)
        assert running.containers() == set()
        words = ("systemctl", "list-units", "--all", "--no-legend", "homegpt*", "vllm-*")
        units = machine.run(*words)
        assert units.out == ""
        assert machine.read("/var/cache/homegpt/hf/hub/weights")
        kept = {"/var/cache/homegpt"}
        if way == "remove":
            kept |= {"/etc/homegpt", "/etc/homegpt/vllm-logging.json", "/var/lib/homegpt"}
            kept |= {"/etc/containers/networks/homegpt.json"}
        assert _left(running) == kept
        held = machine.run("sh", "-c", "podman volume ls -q; podman images --noheading").out
        assert ("open-webui" in held.split(), "homegpt-sim" in held) == (way == "remove",) * 2
        if way == "purge":
            assert "homegpt" not in machine.read("/etc/passwd")
    finally:
        machine.run("sh", "-c", "podman volume rm -f open-webui")
        machine.run("dpkg", "-i", PACKAGE)
        if way == "purge":
            load_engine(machine, WEBUI)
