"""How the names of our modules are changed for the wheel: in imports, in strings, nowhere else."""

import pytest

from scripts.wheel_names import OurNames, UnhandledName, rename_modules

MODULES = ("modules.losses", "system.files", "gt.eval_utils")
OURS = OurNames(("modules", "system", "gt", "app"), MODULES.__contains__)


def rename(source: str) -> str:
    return rename_modules(source, "file.py", OURS)


@pytest.mark.parametrize(
    ("source", "renamed"),
    [
        ("from modules.losses import x\n", "from clip4idc.modules.losses import x\n"),
        ("from modules import losses", "from clip4idc.modules import losses"),
        ("import system\n", "from clip4idc import system\n"),
        ("import app as page  # a, b\n", "from clip4idc import app as page  # a, b\n"),
        ("import system.files as f\n", "import clip4idc.system.files as f\n"),
        (
            "def f():\n    if a: from gt.eval_utils import (\n        b)\n",
            "def f():\n    if a: from clip4idc.gt.eval_utils import (\n        b)\n",
        ),
        (
            "import re; from system import files\n",
            "import re; from clip4idc.system import files\n",
        ),
        ("load('gt.eval_utils:main')\n", "load('clip4idc.gt.eval_utils:main')\n"),
        ("load('app:main')\n", "load('clip4idc.app:main')\n"),
        ("getLogger('system.files')\n", "getLogger('clip4idc.system.files')\n"),
        ("x = f'{a} system.files.sync'\n", "x = f'{a} clip4idc.system.files.sync'\n"),
        (
            '"""é, an example:\n\n    from modules.losses import x\n    from gt import b\n"""\n',
            '"""é, an example:\n\n    from clip4idc.modules.losses import x\n'
            '    from clip4idc.gt import b\n"""\n',
        ),
    ],
)
def test_imports_and_strings_are_renamed(source: str, renamed: str) -> None:
    assert rename(source) == renamed


@pytest.mark.parametrize(
    "source",
    [
        "import numpy, torch\nfrom numpy import modules\nfrom systematic import app\n",
        "system.files.sync()\n",
        "def f():\n    yield from modules\n",
        "try:\n    pass\nexcept E as app:\n    raise F from app\n",
        "open('modules/losses.py')\nopen('gt.json')\nopen('app.py')\n",
        "choices = ['gt', 'modules']\n",
        "'my.system.files'\n'/gt.eval_utils'\n",
        "# from modules.losses import x\n",
        "'''It is a file of the system.'''\n",
        "from clip4idc.modules.losses import x\n",
    ],
)
def test_all_else_stays(source: str) -> None:
    assert rename(source) == source


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("\nimport app, re\n", "file.py:2: import our modules one by one"),
        ("import system.files\n", "import system.files with `from` or `as`"),
        ("load('modules.' + name)\n", "'modules.' is only a part of a module's name"),
        ("load(f'modules.{name}')\n", "is only a part of a module's name"),
        ("importlib.import_module('system')\n", "'system' is only a part"),
        ("logging.getLogger('modules')\n", "'modules' is only a part"),
    ],
)
def test_names_that_cannot_be_followed_end_the_build(source: str, reason: str) -> None:
    with pytest.raises(UnhandledName) as refused:
        rename(source)
    assert reason in str(refused.value)
