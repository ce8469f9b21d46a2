"""What only a box with cards can show: are they inside the containers, and are they the right ones?

How much memory a sleep frees is measured by `homegptctl doctor --gpu` itself, through the daemon.
"""

from collections.abc import Iterator

from .commands import run
from .doctor import Finding, Patient

_LIMIT_S = 60.0


def devices(patient: Patient) -> Iterator[Finding]:
    """Each card that the configuration names, looked for in each image that is to use it.

    The container is as closed as an engine's, so a card seen there is one that vLLM will have.
    """
    there = _uuids("nvidia-smi")
    wanted = dict.fromkeys(
        (model.engine.image, gpu)
        for model in patient.config.models
        if model.engine is not None
        for gpu in model.gpus
    )
    for image, gpu in wanted:
        check = f"GPU {gpu} inside"
        seen = _uuids(*_container(image, gpu))
        if isinstance(seen, str):
            mend = "sudo homegptctl doctor, then: " + " ".join(_container(image, gpu)) + " -L"
            yield Finding(check, "fail", f"{image} does not see it: {seen}", mend)
        elif isinstance(there, str) or list(seen.values()) != [there.get(gpu)]:
            mend = "sudo nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml"
            said = f"{image} sees {', '.join(seen.values()) or 'nothing'} instead"
            yield Finding(check, "fail", said, mend)
        else:
            yield Finding(check, "ok", f"{image} sees {seen[0]} and no other")


def _container(image: str, gpu: int) -> tuple[str, ...]:
    closed = ("--network=none", "--cap-drop=all", "--security-opt=no-new-privileges")
    device = (f"--device=nvidia.com/gpu={gpu}", "--security-opt=label=disable", "--pull=never")
    return ("podman", "run", "--rm", *closed, *device, "--entrypoint=nvidia-smi", image)


def _uuids(*argv: str) -> dict[int, str] | str:
    """By index, or why there are none."""
    words = ("--query-gpu=index,uuid", "--format=csv,noheader")
    done = run(*argv, *words, limit_s=_LIMIT_S)
    if done.code:
        return done.why
    rows = [row.partition(",") for row in done.out.splitlines()]
    return {int(index): uuid.strip() for index, _, uuid in rows if index.strip().isdecimal()}
