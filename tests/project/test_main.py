"""`python -m jaxsoft`: what it measures, prints and saves, and its exit status."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import jaxsoft
from jaxsoft.__main__ import main
from jaxsoft._demo import derivatives, figure, iris, saturation, speed
from jaxsoft._demo.view import View

# The functions of logits or of probabilities; `softmax_jacobian` stands for the class it returns,
# and for `softmax_and_jacobian`, which returns the same beside softmax.
PUBLIC = set(jaxsoft.__all__) - {
    "jvp_from_vjp",
    "LossStatistics",
    "SimplexJacobian",
    "TokenStatistics",
    "softmax_and_jacobian",
}
# Before they are replaced.
DERIVATIVES, QUICK_MODES = derivatives.derivatives, derivatives._QUICK_MODES


def once(function):
    """The function, called at most once: later calls return the same result."""
    results = []

    def call(**options):
        if not results:
            # What Optax computes relies on the promotion that conftest.py forbids.
            with jax.numpy_dtype_promotion("standard"):
                results.append(function(**options))
        return results[0]

    return call


@pytest.fixture(scope="module", autouse=True)
def _measured_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derivatives, "_QUICK_MODES", ("jit(vjp)",))
        patch.setattr(derivatives, "derivatives", once(derivatives.derivatives))
        patch.setattr(saturation, "saturation", once(saturation.saturation))
        patch.setattr(speed, "speed", once(speed.speed))
        patch.setattr(iris, "train_on_iris", once(iris.train_on_iris))
        yield


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty directory; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*options):
        status = main(["--quick", *options])
        return status, capsys.readouterr()

    return run


# ----------------------------------------------------------------------------------------- JSON


@pytest.fixture(scope="module")
def document(_measured_once, tmp_path_factory):
    """What one run prints; its figure stays in the directory of that run."""
    out, err = io.StringIO(), io.StringIO()
    directory = contextlib.chdir(tmp_path_factory.mktemp("document"))
    with directory, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main(["--quick", "--json", "--figure", "figure.png"]) == 0
    assert err.getvalue() == ""
    return json.loads(out.getvalue()) | {"directory": directory.path}


def test_json_says_that_every_check_passed(document):
    assert document["passed"] is True
    assert document["failures"] == []
    assert document["quick"] is True
    assert document["environment"]["jaxsoft"] == jaxsoft.__version__
    assert document["environment"]["devices"]


def test_every_public_function_is_checked(document):
    checked = document["derivatives"]
    names = {name.partition(",")[0] for name in checked["errors"]}
    assert names == PUBLIC
    for errors in checked["errors"].values():
        assert list(errors) == checked["modes"]
        assert all(0 <= error <= checked["tolerance"] for error in errors.values())


@pytest.mark.slow
def test_every_public_function_passes_in_every_quick_mode(monkeypatch):
    monkeypatch.setattr(derivatives, "_QUICK_MODES", QUICK_MODES)
    found = DERIVATIVES(seed=0, quick=True, track=lambda steps, _: steps)
    assert found.modes == ("value", "jit(jvp)", "jit(vjp)")
    assert {name.partition(",")[0] for name in found.errors} == PUBLIC
    assert found.failures == ()


def test_worked_example(document):
    printed, computed = document["worked_example"]["rows"]
    assert [round(p, 2) for p in printed["probabilities"]] == [0.69, 0.10, 0.21]
    assert round(printed["same_class"], 4) == round(0.69 * (1 - 0.69), 4)
    assert round(printed["cross_class"], 4) == round(-0.69 * 0.10, 4)
    assert [round(p, 4) for p in computed["probabilities"]] == [0.6842, 0.1098, 0.2061]
    assert document["worked_example"]["outlier"] == "versicolor"
    assert "https://youtu.be/KpKog-L9veg" in document["worked_example"]["source"]


def test_saturated_row(document):
    rows = {(row["gap"], row["quantity"]): row for row in document["saturation"]["rows"]}
    gradient = rows[20, "∂loss/∂z₁"]
    loss = math.log1p(2 * math.exp(-20))
    assert gradient["exact"] == pytest.approx(math.expm1(-loss), rel=1e-15)
    assert gradient["values"]["jaxsoft"] == pytest.approx(gradient["exact"], rel=1e-6)
    assert gradient["values"]["jax.nn"] == gradient["values"]["optax"] == 0
    assert all(row["errors"]["jaxsoft"] <= row["tolerance"] for row in rows.values())


def test_time_and_memory(document):
    comparisons = document["speed"]["comparisons"]
    assert {(c["quantity"], c["dtype"]) for c in comparisons} == {
        (quantity, dtype)
        for quantity in ("softmax", "softmax + VJP", "cross-entropy", "cross-entropy + gradient")
        for dtype in ("float32", "bfloat16")
    }
    for c in comparisons:
        assert 0 < c["low"] <= c["ratio"] <= c["high"]
        assert c["seconds"] > 0
        assert c["peer_seconds"] > 0


def test_training(document):
    training = document["training"]
    assert training["classes"] == ["setosa", "versicolor", "virginica"]
    assert training["train_loss"][0] == pytest.approx(math.log(3))
    assert training["train_loss"][-1] < 0.2
    assert training["accuracy"] == training["correct"] / training["held_out"] > 0.75
    p, jacobian = training["probabilities"], training["jacobian"]
    assert p == pytest.approx(jax.nn.softmax(jnp.asarray(training["logits"])).tolist(), abs=1e-7)
    for i in range(3):
        assert sum(jacobian[i]) == pytest.approx(0, abs=1e-7)
        for j in range(3):
            assert jacobian[i][j] == pytest.approx(p[i] * ((i == j) - p[j]), abs=1e-6)


def test_figure_is_a_png(document):
    path = document["directory"] / "figure.png"
    assert document["figure"] == str(path)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(content) > 20_000


def test_figure_is_drawn_by_plot(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(figure.plot, "slopes", lambda *args, ax: drawn.update(slopes=args))
    monkeypatch.setattr(
        figure.plot, "jacobian_heatmap", lambda *args, ax, limit: drawn.update(heat=(*args, limit))
    )
    training = iris.train_on_iris(seed=0, quick=True, track=lambda steps, _: steps)
    figure.save_figure(training, tmp_path / "figure.svg")
    logits, index, names = drawn["slopes"]
    assert logits.tolist() == list(training.logits)
    assert index == np.argmax(training.probabilities)
    jacobian, classes, limit = drawn["heat"]
    np.testing.assert_array_equal(jacobian, training.jacobian)
    assert names == classes == training.classes
    assert limit == 0.25


# --------------------------------------------------------------------------------- for a person


def test_report_in_80_columns(run, tmp_path):
    status, printed = run()
    assert status == 0
    lines = printed.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in printed.out.replace("… soft labels", "").replace("… options", "")
    for text in (jaxsoft.__version__, jax.__version__, "0.6842", "-0.07", "all lost", "bfloat16"):
        assert text in printed.out
    for name in PUBLIC:
        assert any(line.split()[:1] == [name] and line.split()[-1] == "pass" for line in lines)
    assert any(line.startswith(" ∂p virginica") for line in lines)
    assert "Every check passed" in printed.out
    assert "Figure saved to jaxsoft-report.png" in printed.out
    assert (tmp_path / "jaxsoft-report.png").exists()
    assert not any(ord(c) < 32 and c != "\n" for c in printed.out)  # no control characters


def test_all_modes_fit_in_80_columns():
    errors = {name: dict.fromkeys(derivatives._MODES, 12.3) for name in PUBLIC}
    section = derivatives.Derivatives(derivatives._MODES, errors, 16.0, ())
    file = io.StringIO()
    View(Console(file=file, width=80)).show(section)
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "fwd∘  fwd∘  rev∘  rev∘" in file.getvalue()
    assert file.getvalue().count("12.3") == 9 * len(PUBLIC)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_for_terminals(terminal):
    file = io.StringIO()
    view = View(Console(file=file, force_terminal=terminal, width=80))
    assert list(view.track([1, 2, 3], "counting")) == [1, 2, 3]
    assert ("counting" in file.getvalue()) is terminal


# ------------------------------------------------------------------------------ when it is wrong


@pytest.fixture
def _wrong_softmax(monkeypatch):
    right = jaxsoft.softmax

    def with_twice_the_derivative(x):
        p = right(x)
        return 2 * p - jax.lax.stop_gradient(p)

    with monkeypatch.context() as patch:
        patch.setattr(jaxsoft, "softmax", with_twice_the_derivative)
        wrong = [case for case in derivatives.cases(0) if case.name == "softmax"]
    monkeypatch.setattr(derivatives, "cases", lambda seed: wrong)
    monkeypatch.setattr(derivatives, "derivatives", DERIVATIVES)
    monkeypatch.setattr(derivatives, "_QUICK_MODES", QUICK_MODES)


@pytest.mark.usefixtures("_wrong_softmax")
def test_a_wrong_derivative_is_found(run):
    status, printed = run("--json")
    document = json.loads(printed.out)
    assert status == 1
    assert document["passed"] is False
    assert [text.partition(": ")[0] for text in document["failures"]] == [
        "softmax, jit(jvp)",
        "softmax, jit(vjp)",
    ]
    assert document["derivatives"]["errors"]["softmax"]["value"] < 1


@pytest.mark.usefixtures("_wrong_softmax")
def test_a_wrong_derivative_is_shown(run):
    status, printed = run()
    assert status == 1
    assert "2 checks failed" in printed.out
    assert "softmax, jit(vjp): off by" in printed.out
    assert any(
        line.split()[:1] == ["softmax"] and "FAIL" in line for line in printed.out.splitlines()
    )


def test_a_mode_that_raises_is_wrong():
    @jax.custom_vjp
    def only_in_reverse(x):
        return x**2

    only_in_reverse.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
    case = derivatives.Case("square", only_in_reverse, lambda x: x**2, jnp.ones(2, jnp.float32))
    errors = derivatives._errors(case, ("value", "jit(jvp)", "jit(vjp)"))
    assert errors == {"value": 0, "jit(jvp)": math.inf, "jit(vjp)": 0}


@pytest.mark.parametrize("missing", ["rich", "optax", "sklearn", "matplotlib"])
def test_missing_dependency(run, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    status, printed = run()
    assert status == 2
    assert printed.out == ""
    assert 'pip install ".[demo]" in a checkout' in printed.err
    assert missing.replace("sklearn", "scikit-learn") in printed.err


def test_without_a_figure(run, tmp_path):
    status, printed = run("--no-figure")
    assert status == 0
    assert "Figure" not in printed.out
    assert "Every check passed" in printed.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [(), ("--no-figure",)])
def test_json_draws_a_figure_only_if_asked(run, tmp_path, options):
    status, printed = run("--json", *options)
    assert status == 0
    assert json.loads(printed.out)["figure"] is None
    assert list(tmp_path.iterdir()) == []


def test_no_figure_needs_no_matplotlib(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--no-figure")[0] == 0
    assert run("--json")[0] == 0
    assert run("--json", "--figure", "figure.png")[0] == 2


@pytest.mark.slow
def test_json_imports_neither_matplotlib_nor_rich(tmp_path):
    # Of each section little, for it is not what is tested here.
    program = """if True:
        import sys
        sys.modules |= dict.fromkeys(["matplotlib", "rich"])
        from jaxsoft.__main__ import main
        from jaxsoft._demo import derivatives, speed
        every = derivatives.cases
        derivatives.cases = lambda seed: every(seed)[:1]
        speed.QUANTITIES = dict(list(speed.QUANTITIES.items())[:1])
        sys.exit(main(["--quick", "--json"]))
    """
    ran = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(jaxsoft.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == ""
    assert ran.returncode == 0
    document = json.loads(ran.stdout)
    assert document["passed"] is True
    assert document["training"]["correct"] > 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--figure", "figure.txt"], "--figure must end in .pdf, .png, .svg, got figure.txt"),
        (["--figure", "no/figure.png"], "--figure: cannot write into the directory no"),
        (
            ["--figure", "figure.png", "--no-figure"],
            "argument --no-figure: not allowed with argument --figure",
        ),
        (
            ["--json", "--no-figure", "--figure", "figure.png"],
            "argument --figure: not allowed with argument --no-figure",
        ),
        (["--seed", "-1"], "--seed must lie in [0, 2**32), got -1"),
    ],
)
def test_wrong_options(capsys, options, message):
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_as_a_command(capsys):
    command = [sys.executable, "-m", "jaxsoft", "--version"]
    version = subprocess.run(command, capture_output=True, text=True, check=True)
    assert version.stdout == f"jaxsoft {jaxsoft.__version__}\n"
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    usage = capsys.readouterr().out
    assert all(
        option in usage for option in ("--quick", "--json", "--figure", "--no-figure", "--seed")
    )
