"""The package as a whole: its public names, their documentation, its imports, what it installs."""

import ast
import doctest
import graphlib
import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Primitive

import jaxsoft

PACKAGE = Path(jaxsoft.__file__).parent
ROOT = Path(__file__).parents[2]

# The packages that jaxsoft needs; numpy comes with jax.
REQUIRED = {"jax", "jaxtyping", "numpy"}
# The packages that a module, or a package within the package, needs besides.
OPTIONAL = {
    "_demo": {"matplotlib", "optax", "rich", "sklearn"},
    "lineax": {"lineax"},
    "plot": {"matplotlib"},
}
# A module imports from its own storey and those before it here; "" is `jaxsoft/__init__.py`.
STOREYS = (
    ("_core",),
    ("_rows",),
    ("_functions",),
    ("_linear", "_attention", "_simplex"),
    ("",),
    ("analysis", "testing"),
    ("lineax", "plot"),
    ("_demo",),
    ("__main__",),
)


def parsed(package):
    """The syntax trees of all modules by their names within the package, as in `STOREYS`."""
    paths = {
        path.relative_to(package).with_suffix("").parts: path for path in package.rglob("*.py")
    }
    return {
        ".".join(parts[:-1] if parts[-1] == "__init__" else parts): ast.parse(path.read_text())
        for parts, path in paths.items()
    }


MODULES = parsed(PACKAGE)
SUBMODULES = [name for name in MODULES if re.fullmatch(r"[a-z]\w*", name)]

# --------------------------------------------------------------------------------- public names


def listed(module):
    """The names in `__all__`, where a module has one."""
    for node in MODULES[module].body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


def re_exports(module):
    """Where each name comes from that a module imports as `X as X`, or lists in `__all__`."""
    return {
        alias.name: node.module.removeprefix("jaxsoft").lstrip(".")
        for node in MODULES[module].body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.name in (alias.asname, *listed(module))
    }


def definitions(module):
    """The functions and classes of a module by name; of overloads the last."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in MODULES[module].body if isinstance(node, kinds)}


def public(module):
    """The public functions and classes of a module, and those that it exports from others."""
    own = {name: node for name, node in definitions(module).items() if not name.startswith("_")}
    exported = re_exports(module).items()
    return own | {x: definitions(source)[x] for x, source in exported if not x.isupper()}


PUBLIC = {
    (module, name): node for module in ("", *SUBMODULES) for name, node in public(module).items()
}


def documented():
    """The names in the first column of the table of functions in the README."""
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("\n## Functions\n")[2].partition("\n## ")[0]
    _, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([\w.]+)\(", row.split("|")[1])]


def test_init_re_exports_every_public_name():
    imports = [
        n for n in MODULES[""].body if isinstance(n, ast.ImportFrom) and root(n.module) == "jaxsoft"
    ]
    names = [alias for node in imports for alias in node.names]
    assert [alias.name for alias in names if alias.asname != alias.name] == []
    assert sorted(alias.name for alias in names) == sorted(jaxsoft.__all__)
    assert set(jaxsoft.__all__) <= set(dir(jaxsoft))


@pytest.mark.parametrize("name", jaxsoft.__all__)
def test_a_public_name_is_where_users_find_it(name):
    value = getattr(jaxsoft, name)
    assert value.__module__ == "jaxsoft"
    # Plain words instead of the unions of all array types, which nobody reads.
    assert len(str(inspect.signature(value))) < 700
    assert "Union" not in str(inspect.signature(value))
    assert name in jaxsoft.__doc__


def test_submodules_are_at_hand_after_import_jaxsoft():
    program = """
import sys, jaxsoft
names = {"analysis", "lineax", "plot", "testing"}
assert not {f"jaxsoft.{name}" for name in names} & set(sys.modules)
jaxsoft.testing.assert_derivatives, jaxsoft.analysis.jacobian_report, jaxsoft.plot.slopes
assert names <= set(dir(jaxsoft))
try:
    jaxsoft.sofmax
except AttributeError as error:
    print(error)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.stdout == "module 'jaxsoft' has no attribute 'sofmax'\n"


@pytest.mark.parametrize("module", [module for module in SUBMODULES if listed(module)])
def test_all_holds_the_public_names(module):
    assert {name for name in listed(module) if not name.isupper()} == set(public(module))


def test_readme_lists_the_public_names():
    names = documented()
    assert {name for name in names if "." not in name} == set(public(""))
    methods = {
        part.name
        for name, node in public("").items()
        if isinstance(node, ast.ClassDef)
        for part in node.body
        if isinstance(part, ast.FunctionDef)
    }
    for owner, _, name in (name.rpartition(".") for name in names):
        assert name in (public(owner) if owner in ("", *SUBMODULES) else methods), (owner, name)


def test_the_pages_of_the_api_have_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text()
    names = re.findall(r"^   (?!:)([\w.]+)$", page, re.MULTILINE)
    assert len(names) == len(set(names))
    wanted = {".".join(filter(None, parts)) for parts in PUBLIC}
    assert {name for name in names if not name.rpartition(".")[2].isupper()} == wanted


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_docstring_says_what_goes_in_and_out_with_an_example(module, name):
    node = PUBLIC[module, name]
    _, *parts = re.split(r"^(\w+):\n", ast.get_docstring(node) or "", flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if isinstance(node, ast.ClassDef):
        fields = [part.target.id for part in node.body if isinstance(part, ast.AnnAssign)]
        assert entries(sections["Attributes"]) == fields
    else:
        a = node.args
        parameters = [*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg]
        assert entries(sections["Args"]) == [p.arg for p in parameters if p is not None]
        assert sections["Returns"].strip()
    assert any(step.want for step in doctest.DocTestParser().get_examples(sections["Example"]))


def entries(section):
    """The names that a section of a docstring explains: those of its least indented lines."""
    return re.findall(r"^    (\w+): ", section, re.MULTILINE)


# -------------------------------------------------------------------------------------- imports


def imported(tree):
    """The modules that are imported anywhere in a syntax tree, each with its statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, ast.unparse(node)) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)} is relative"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("jaxsoft.") in MODULES
                yield (inner if is_module else node.module), ast.unparse(node)


def edges():
    """For each module of the package those that it imports, by their names in it."""
    return {
        module: {
            target.removeprefix("jaxsoft").lstrip(".")
            for target, _ in imported(tree)
            if root(target) == "jaxsoft"
        }
        for module, tree in MODULES.items()
    }


def root(module):
    return module.partition(".")[0]


def storey(module):
    (found,) = (i for i, names in enumerate(STOREYS) if root(module) in names)
    return found


def test_every_module_has_its_storey():
    assert {root(module) for module in MODULES} == {name for names in STOREYS for name in names}
    # What follows has something to find.
    assert edges()["_functions.label_loss"] >= {"_rows.statistics", "_functions.softmax"}


def test_imports_go_one_way():
    upwards = [
        f"{module} imports {target}"
        for module, targets in edges().items()
        for target in targets
        if storey(target) > storey(module)
        or (storey(target) == storey(module) and root(target) != root(module))
    ]
    assert upwards == []


def test_imports_have_no_cycle():
    graphlib.TopologicalSorter(edges()).prepare()  # raises CycleError


def test_imports_inside_functions_are_of_what_is_optional():
    optional = {name for names in OPTIONAL.values() for name in names}
    wrong = [
        f"{module}: {statement}"
        for module, tree in MODULES.items()
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for target, statement in imported(function)
        if root(target) not in optional and not target.startswith("jaxsoft._demo")
    ]
    assert wrong == []


def test_other_packages_are_required_or_optional():
    for module, tree in MODULES.items():
        others = {root(target) for target, _ in imported(tree)} - sys.stdlib_module_names
        assert others <= {"jaxsoft"} | REQUIRED | OPTIONAL.get(root(module), set()), module


def test_importing_jaxsoft_imports_nothing_but_what_it_requires():
    core = [module for module in MODULES if root(module) not in {"_demo", "__main__", *OPTIONAL}]
    # What the required packages import in turn is theirs: jaxtyping imports some only when asked.
    required = {
        statement
        for module in core
        for target, statement in imported(MODULES[module])
        if root(target) in REQUIRED
    }
    names = ["jaxsoft", *(f"jaxsoft.{module}" for module in SUBMODULES if module in core)]
    program = (
        "import sys",
        *sorted(required),
        "before = set(sys.modules)",
        f"import {', '.join(names)}",
        "print(*set(sys.modules) - before)",
    )
    ran = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    new = set(ran.stdout.split())
    assert new >= set(names)
    assert {root(module) for module in new} - sys.stdlib_module_names == {"jaxsoft"}
    assert not any(module.startswith("jaxsoft._demo") for module in new)


# --------------------------------------------------------------------------- where things stand

# What a platform does differently, in words of the code.
OF_PLATFORMS = (
    r"\b(cpu|gpu|cuda|rocm|tpu|platform_dependent|default_backend|optimization_barrier)\b"
)
OF_DEVICES = r"(?<!jax\.)\blax\.(psum|pmax|pmin|all_gather|ppermute|all_to_all|axis_index)\b"


def code(module):
    """The code of a module without comments and docstrings."""
    tree = ast.parse(ast.unparse(MODULES[module]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                node.body[0] = ast.Pass()
    return ast.unparse(tree)


def places_of(words):
    """The modules of the library with one of the words in their code."""
    library = [m for m in MODULES if root(m) not in {"_demo", "__main__"}]
    return {module for module in library if re.search(words, code(module))}


def test_platforms_have_a_place():
    # The last one picks the sizes of chunks; the first sets the forms, and the second takes them.
    assert places_of(OF_PLATFORMS) == {
        "_rows",
        "_rows.cpu",
        "_rows.gpu",
        "_linear.loops",
    }


def test_exchange_between_devices_has_a_place():
    assert places_of(OF_DEVICES) == {"_core.devices"}


# What a reader does not see whole, and why.
LONG = {
    "_simplex.matrix": "the methods of SimplexJacobian",
    "_simplex.operator": "the class itself",
}


def test_no_module_is_long():
    lengths = {m: len((PACKAGE / path_of(m)).read_text().splitlines()) for m in MODULES}
    assert {module for module, length in lengths.items() if length > 300} == set(LONG)


def path_of(module):
    path = Path(*module.split(".")) if module else Path()
    return path / "__init__.py" if (PACKAGE / path).is_dir() else path.with_suffix(".py")


# Through these data passes unchanged.
CARRIERS = ("primitives.py", "programs.py", "autodiff.py")


def test_the_way_of_data_is_short(monkeypatch):
    passed, bind = set(), Primitive.bind

    def noted(self, *args, **params):
        frame = sys._getframe(1)
        while frame and not frame.f_code.co_filename.startswith(str(PACKAGE)):
            frame = frame.f_back
        if frame and not frame.f_code.co_filename.endswith(CARRIERS):
            name = frame.f_code.co_qualname.partition(".<l")[0]
            passed.add((frame.f_code.co_filename, name))
        return bind(self, *args, **params)

    monkeypatch.setattr(Primitive, "bind", noted)
    # Of these shapes nothing has been traced before.
    x, labels = jnp.ones((3, 37)), jnp.zeros(3, int)
    jax.vjp(jaxsoft.softmax, x)[1](x)
    assert 10 <= len(passed) <= 20
    passed.clear()
    jax.vjp(lambda x: jaxsoft.cross_entropy(x, labels), x)[1](jnp.ones(3))
    assert 15 <= len(passed) <= 30


def test_no_two_modules_have_nearly_one_name():
    names = [module.rpartition(".")[2] for module in MODULES if not module.startswith("_demo")]
    plain = [name.strip("_").removesuffix("s") for name in names]
    assert sorted(name for name in set(plain) if plain.count(name) > 1) == []


# ------------------------------------------------------------- what is distributed and installed


def included(path):
    """Whether the source distribution has a file: by its patterns, or as hatchling's own rule."""
    always = {".gitignore", "LICENSE", "README.md", "pyproject.toml"}
    return path in always or any(path == part or path.startswith(f"{part}/") for part in INCLUDED)


SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
INCLUDED = [
    part.removeprefix("/")
    for part in SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
]


def tracked():
    """The files that git knows of: none in an unpacked source distribution."""
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return []
    return listed.stdout.splitlines()


def test_source_distribution_has_what_its_tests_need():
    assert [part for part in INCLUDED if not (ROOT / part).exists()] == []
    assert included("conftest.py")
    assert included("tests/project/test_package.py")
    assert not included("dist/conftest.py")
    assert [path for path in tracked() if not included(path)] == []


def test_hints_install_from_a_checkout():
    # There is no package of this name on an index.
    paths = [
        p for part in INCLUDED for p in (ROOT / part, *(ROOT / part).rglob("*")) if p.is_file()
    ]
    texts = {p: p.read_text() for p in (ROOT / "README.md", *paths) if p.suffix in HINTING}
    assert len(texts) > 50
    found = {}
    for path, text in texts.items():
        hints = re.findall(r"pip install(?:\s+-\S+)*\s+[\\\"']*([\w.]+)(?:\[([\w,]+)\])?", text)
        assert "jaxsoft" not in {name for name, _ in hints}, path
        found |= {
            extra: path for name, extras in hints if name == "." for extra in extras.split(",")
        }
    assert set(found) >= {"", "demo", "plot", "lineax", "notebooks", "bench", "examples"}
    extras = SETTINGS["project"]["optional-dependencies"]
    assert {extra: path for extra, path in found.items() if extra and extra not in extras} == {}


HINTING = {".ipynb", ".md", ".py"}


def test_installed_version():
    installed = importlib.metadata.version("jaxsoft")
    assert installed == jaxsoft.__version__, "install jaxsoft again"


def test_runtime_dependencies():
    required = [r for r in importlib.metadata.requires("jaxsoft") if "extra ==" not in r]
    assert {re.match(r"[\w-]+", requirement)[0] for requirement in required} == REQUIRED - {"numpy"}


def test_package_is_marked_as_typed():
    assert (PACKAGE / "py.typed").is_file()
    assert "Typing :: Typed" in importlib.metadata.metadata("jaxsoft").get_all("Classifier")
