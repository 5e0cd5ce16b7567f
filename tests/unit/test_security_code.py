"""What the package never calls: whatever runs code that is in a file, or starts a shell."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent.parent / "cosa_ray"
# Calls that run what a file says, by their last words.
DANGEROUS = {
    *("import_module", "run_path", "run_module"),
    *("pickle.load", "pickle.loads", "Unpickler", "cloudpickle.load", "cloudpickle.loads", "dill.load", "joblib.load"),
    *("marshal.loads", "marshal.load", "shelve.open", "read_pickle", "read_hdf"),
    *("yaml.load", "yaml.load_all", "unsafe_load", "full_load", "yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader"),
    *("load_model", "load_state_dict_from_url", "hub.load", "jit.load", "Tuner.restore", "Trainer.restore"),
    *("os.system", "os.popen", "subprocess.getoutput", "extractall", "extract", "unpack_archive"),
}
BUILTINS = {"eval", "exec", "compile", "__import__"}  # as methods they are others'
# With the arguments that make them harmless.
SAFE_BY_ARGUMENT = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
# What is right all the same: file, call, number of such calls, and why.
ALLOWED = {
    ("__init__.py", "import_module"): (1, "a name of the package's own table of verbs"),
    ("data/coco.py", "pickle.loads"): (2, "bytes that this import made of JSON, from a nameless temporary file"),
}


def calls(text: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Dotted name and constant keywords of every call."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        yield name, keywords
        if keywords.get("shell"):
            yield "shell=True", {}


def found(text: str) -> list[str]:
    """Dangerous calls in a module's text."""
    bad = []
    for name, keywords in calls(text):
        word = next((word for word in DANGEROUS if name == word or name.endswith(f".{word}")), None)
        if word or name in BUILTINS or name == "shell=True":
            bad.append(word or name)
        for safe, (key, value) in SAFE_BY_ARGUMENT.items():
            if name in (safe, safe.replace("np.", "numpy.")) and keywords.get(key) is not value:
                bad.append(safe)
    return bad


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_runs_what_a_file_says(file: Path) -> None:
    bad = found(file.read_text())
    for word in set(bad):
        times, _ = ALLOWED.get((str(file.relative_to(PACKAGE)), word), (0, ""))
        assert bad.count(word) == times, f"{word} in {file.relative_to(PACKAGE)}"


def test_what_is_allowed_is_still_there() -> None:
    for (file, word), (times, why) in ALLOWED.items():
        assert found((PACKAGE / file).read_text()).count(word) == times, f"{word} in {file}: {why}"


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file)",
        "numpy.load(file, allow_pickle=True)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=yaml.Loader)",
        "mlflow.pyfunc.load_model(uri)",
        "tune.Tuner.restore(path, trainable)",
        "archive.extractall(folder)",
        "subprocess.run(words, shell=True)",
        "eval(text)",
        "importlib.import_module(given)",
    ],
)
def test_each_is_found(line: str) -> None:
    assert found(line)


def test_nothing_is_imported_under_a_name_that_hides_it() -> None:
    """`from pickle import loads` would pass the search above."""
    hidden = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml", "zipfile", "subprocess"}
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in hidden, f"{file.relative_to(PACKAGE)}: from {node.module} import"
            if isinstance(node, ast.Import):
                assert not [each for each in node.names if each.name in hidden and each.asname], file
