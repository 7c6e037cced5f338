"""Rules on the source that no reader should have to check: imports run one way, files stay small, nothing is executed.

Every rule is a function from a parsed file to the places that break it, and is itself tested on a file that does.
"""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

MAX_LINES, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8
TEST_SHARE = 0.8  # lines of tests for each of source; this may only rise
KERNELS, MAX_KERNEL_LINES, MAX_OPERANDS = "gdn2/kernels/", 600, 12  # an operator's tensors are its parameters

# What each package may import of the others; the first prefix that fits the file counts.
ALLOWED = {
    "gdn2/": ("gdn2",),
    "evalsuite/backends/": ("evalsuite", "gdn2"),
    "evalsuite/bench/": ("evalsuite", "gdn2"),
    "evalsuite/": ("evalsuite", "gdn2.errors", "gdn2.env"),
    "tasks/": ("tasks", "evalsuite.types", "evalsuite.scorers", "evalsuite.lm_eval_bridge", "gdn2.errors", "gdn2.env"),
    "cli.py": ("evalsuite", "tasks", "gdn2"),
}
OURS = ("gdn2", "evalsuite", "tasks", "cli")

# Where everything may be caught: a score that fails costs one sample, a model that fails not the others, and a bug is
# reported with its traceback.
CATCH_ALL = {
    ("evalsuite/runner.py", "score"), ("evalsuite/runner.py", "_failed"), ("evalsuite/evaluate.py", "_several"),
    ("cli.py", "main"),
}  # fmt: skip

# Where open keywords are the point: the keys of a configuration file are the keywords of its check.
OPEN_KEYWORDS = {("gdn2/checkpoints/fields.py", "only")}

EXECUTES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}


class Source(NamedTuple):
    path: str  # from the repository root
    text: str
    tree: ast.Module


def source(path: str, text: str) -> Source:
    return Source(path, text, ast.parse(text, path))


def sources(root: Path) -> list[Source]:
    files = [root / "cli.py", *(f for p in ("gdn2", "evalsuite", "tasks") for f in sorted((root / p).rglob("*.py")))]
    return [source(str(f.relative_to(root)), f.read_text("utf-8")) for f in files]


def name_of(node: ast.AST) -> str:
    """Dotted name of an expression such as `os.environ.get`, as far as it is one."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions of the module and methods of its classes whose name has no underscore before it."""
    for owner in (tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))):
        for node in owner.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                yield node


def is_decorated(node: ast.FunctionDef | ast.AsyncFunctionDef, *endings: str) -> bool:
    names = [name_of(d.func if isinstance(d, ast.Call) else d) for d in node.decorator_list]
    return any(name.endswith(endings) for name in names)


def imported(tree: ast.Module) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: imports are absolute"
            # `from gdn2 import errors` imports gdn2.errors, `from gdn2.errors import X` a name of it.
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(file: Source) -> list[str]:
    allowed = next(rule for prefix, rule in ALLOWED.items() if file.path.startswith(prefix))
    return [
        f"line {line}: imports {name}"
        for name, line in imported(file.tree)
        if name.split(".")[0] in OURS and not any(name == a or name.startswith(f"{a}.") for a in allowed)
    ]


def too_large(file: Source) -> list[str]:
    limit, most = (MAX_LINES, MAX_PARAMETERS) if not file.path.startswith(KERNELS) else (MAX_KERNEL_LINES, MAX_OPERANDS)
    found = [f"{n} lines, more than {limit}"] if (n := file.text.count("\n")) > limit else []
    for node in functions(file.tree):
        # The parameters of a command are its options; those of a compiled kernel are its pointers and strides.
        arguments = node.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        count = len([a for a in every if a.arg not in ("self", "cls")])
        if count > most and not is_decorated(node, ".command", ".jit", ".callback"):
            found.append(f"{node.name} has {count} parameters, more than {most}")
        lines = (node.end_lineno or 0) - node.lineno + 1
        if lines > MAX_FUNCTION and not is_decorated(node, ".jit"):
            found.append(f"{node.name} has {lines} lines, more than {MAX_FUNCTION}")
    return found


def prints(file: Source) -> list[str]:
    if file.path == "cli.py":
        return []
    forbidden = ("print", "typer.echo", "sys.stdout.write", "sys.stderr.write", "rich.print")
    found = []
    for call in (node for node in ast.walk(file.tree) if isinstance(node, ast.Call)):
        name = name_of(call.func)
        # A console of rich's may fill a string; the bar, which shows numbers only, is the one on a terminal.
        to_terminal = name.endswith("Console") and "file" not in {keyword.arg for keyword in call.keywords}
        if name in forbidden or (to_terminal and file.path != "evalsuite/progress.py"):
            found.append(f"line {call.lineno}: {name}")
    return found


def reads_environment(file: Source) -> list[str]:
    if file.path == "gdn2/env.py":
        return []
    forbidden = ("os.environ", "os.getenv", "os.environb", "os.putenv")
    found = [f"line {n.lineno}: {name_of(n)}" for n in ast.walk(file.tree) if name_of(n) in forbidden]
    return found + [f"line {line}: imports {name}" for name, line in imported(file.tree) if name in forbidden]


def executes(file: Source) -> list[str]:
    loads = ((name, line) for name, line in imported(file.tree) if name != "pickle.UnpicklingError")
    found = [f"line {line}: imports {name}" for name, line in loads if name.split(".")[0] in EXECUTES]
    for node in ast.walk(file.tree):
        if not isinstance(node, ast.Call):
            continue
        name = name_of(node.func)
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        constants = {arg: value.value for arg, value in given.items() if isinstance(value, ast.Constant)}
        bad = name in (
            "eval",
            "exec",
            "compile",
            "__import__",
            "os.system",
            "os.popen",
            "yaml.load",
            "yaml.unsafe_load",
        )
        bad |= name == "torch.load" and constants.get("weights_only") is not True
        bad |= "shell" in given and constants.get("shell") is not False
        bad |= "trust_remote_code" in given and constants.get("trust_remote_code") is not False
        bad |= (
            name in ("np.load", "numpy.load") and "allow_pickle" in given and constants.get("allow_pickle") is not False
        )
        if bad:
            found.append(f"line {node.lineno}: {name}")
    return found


def catches_everything(file: Source) -> list[str]:
    found = []
    for function in functions(file.tree):
        for node in ast.walk(function):
            if not isinstance(node, ast.ExceptHandler) or (file.path, function.name) in CATCH_ALL:
                continue
            broad = node.type is None or name_of(node.type) in ("Exception", "BaseException")
            if broad and not isinstance(node.body[-1], ast.Raise):
                found.append(f"line {node.lineno}: {function.name} catches everything")
    return found


def guesses(file: Source) -> list[str]:
    found = [
        f"line {node.lineno}: hasattr"
        for node in ast.walk(file.tree)
        if isinstance(node, ast.Call) and name_of(node.func) == "hasattr"
    ]
    return found + [
        f"line {node.lineno}: {node.name} takes **{node.args.kwarg.arg}"
        for node in public_functions(file.tree)
        if node.args.kwarg and (file.path, node.name) not in OPEN_KEYWORDS
    ]


def trusts_the_locale(file: Source) -> list[str]:
    """Text that is read or written without an encoding: another machine's locale would make other bytes of it."""
    found = []
    for call in (node for node in ast.walk(file.tree) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else name_of(call.func)
        said = {keyword.arg for keyword in call.keywords} & {"encoding"}
        given = [arg.value for arg in call.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        given += [k.value.value for k in call.keywords if k.arg == "mode" and isinstance(k.value, ast.Constant)]
        modes = [value for value in given if re.fullmatch("[rwax+bt]{1,3}", str(value))]
        opens = bool(modes) if name_of(call.func) != "open" else True
        text = {"read_text": not call.args, "write_text": len(call.args) < 2}.get(name, False)
        text |= name in ("open", "fdopen") and opens and not any("b" in mode for mode in modes)
        if text and not said:
            found.append(f"line {call.lineno}: {name} without encoding")
    return found


RULES = [
    wrong_imports, too_large, prints, reads_environment, executes, catches_everything, guesses, trusts_the_locale,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(root, rule: Callable[[Source], list[str]]):
    broken = [f"{file.path}: {place}" for file in sources(root) for place in rule(file)]
    assert not broken, "\n".join(broken)


SEVEN = ", ".join("abcdefg")
BREAKS = [
    (wrong_imports, "gdn2/x.py", "import evalsuite.store"),
    (wrong_imports, "gdn2/x.py", "def f():\n    from tasks import names"),
    (wrong_imports, "evalsuite/x.py", "from gdn2.models import Decoder"),
    (wrong_imports, "evalsuite/x.py", "from gdn2 import zoo"),
    (wrong_imports, "evalsuite/backends/x.py", "import tasks"),
    (wrong_imports, "evalsuite/x.py", "import cli"),
    (wrong_imports, "tasks/x.py", "from evalsuite import store"),
    (wrong_imports, "tasks/x.py", "from gdn2.models import Decoder"),
    (too_large, "tasks/x.py", "\n" * 401),
    (too_large, "gdn2/kernels/x.py", "\n" * 601),
    (too_large, "tasks/x.py", f"def f({SEVEN}, h, *, i): ..."),
    (too_large, "tasks/x.py", "def f():\n" + "    pass\n" * 60),
    (prints, "tasks/x.py", "print(1)"),
    (prints, "gdn2/x.py", "from rich.console import Console\nConsole(stderr=True)"),
    (prints, "gdn2/x.py", "import sys\nsys.stdout.write('x')"),
    (reads_environment, "tasks/x.py", "import os\nos.environ['X']"),
    (reads_environment, "tasks/x.py", "from os import getenv"),
    (executes, "tasks/x.py", "from pickle import loads"),
    (executes, "tasks/x.py", "eval('1')"),
    (executes, "tasks/x.py", "import yaml\nyaml.load('')"),
    (executes, "tasks/x.py", "import torch\ntorch.load('x')"),
    (executes, "tasks/x.py", "run('ls', shell=True)"),
    (executes, "tasks/x.py", "load('x', trust_remote_code=flag)"),
    (catches_everything, "tasks/x.py", "def f():\n    try:\n        g()\n    except Exception:\n        pass"),
    (catches_everything, "cli.py", "def f():\n    try:\n        g()\n    except:\n        pass"),
    (trusts_the_locale, "tasks/x.py", "path.read_text()"),
    (trusts_the_locale, "tasks/x.py", "path.write_text('x')"),
    (trusts_the_locale, "tasks/x.py", "open(path)"),
    (trusts_the_locale, "tasks/x.py", "open(path, mode='a')"),
    (trusts_the_locale, "tasks/x.py", "path.open('r+')"),
    (trusts_the_locale, "tasks/x.py", "os.fdopen(descriptor, 'w')"),
    (guesses, "tasks/x.py", "hasattr(1, 'x')"),
    (guesses, "tasks/x.py", "def f(**rest): ..."),
]
KEEPS = [
    (wrong_imports, "evalsuite/x.py", "from gdn2.errors import UserError\nfrom gdn2 import env"),
    (wrong_imports, "evalsuite/backends/x.py", "from gdn2.models import Decoder"),
    (wrong_imports, "tasks/x.py", "import gdn2x\nfrom evalsuite.types import Task\nfrom tasks.ruler import words"),
    (too_large, "tasks/x.py", f"class A:\n    def f(self, {SEVEN}, h): ..."),
    (too_large, "cli.py", f"@app.command()\ndef f({SEVEN}, h, i): ..."),
    (trusts_the_locale, "tasks/x.py", "path.read_text('ascii')\npath.write_text(text, encoding='utf-8')"),
    (trusts_the_locale, "tasks/x.py", "open(path, 'rb')\npath.open('xb')\nos.open(path, os.O_RDONLY)\nsource.open()"),
    (prints, "cli.py", "print(1)"),
    (prints, "evalsuite/x.py", "Console(file=out).print('x')"),
    (guesses, "tasks/x.py", "def f():\n    def g(**rest): ..."),
    (executes, "tasks/x.py", "from pickle import UnpicklingError"),
    (reads_environment, "gdn2/env.py", "import os\nos.environ['X']"),
    (executes, "tasks/x.py", "import torch\ntorch.load('x', weights_only=True)\nmodel.eval()\nre.compile('x')"),
    (
        catches_everything,
        "tasks/x.py",
        "def f():\n    try:\n        g()\n    except BaseException:\n        h()\n        raise",
    ),
]


@pytest.mark.parametrize("rule, path, text", BREAKS, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(BREAKS)])
def test_the_rule_sees_what_breaks_it(rule, path, text):
    assert len(rule(source(path, text))) == 1


@pytest.mark.parametrize("rule, path, text", KEEPS, ids=[f"{r.__name__}-{i}" for i, (r, _, _) in enumerate(KEEPS)])
def test_the_rule_lets_pass_what_keeps_it(rule, path, text):
    assert rule(source(path, text)) == []


def test_there_is_enough_test(root):
    written = sum(file.text.count("\n") for file in sources(root))
    tested = sum(f.read_text("utf-8").count("\n") for f in (root / "tests").rglob("*.py"))
    assert tested >= TEST_SHARE * written, f"{tested} lines of tests for {written} of source"
