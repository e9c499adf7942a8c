"""docs/faq.md: every error message that users can meet has an entry, and every entry a message."""

import ast
import re
from pathlib import Path

import jaxsoft

PACKAGE = Path(jaxsoft.__file__).parent
PAGE = Path(__file__).parents[2] / "docs" / "faq.md"

# ------------------------------------------------------------------------ messages in the source


def skeletons():
    """Every message of the package, with … in place of what varies, and where it stands."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for scope in scopes(ast.parse(path.read_text())):
            texts = assigned(scope)
            for node in ast.walk(scope):
                for message in raised(node):
                    text = re.sub("…+", "…", skeleton(message, texts))
                    # Without a word after the name it is put together elsewhere, and found there.
                    if re.search(r"\w", re.sub(r"^[\w.…]+: ", "", text)):
                        found.setdefault(text, f"{path.relative_to(PACKAGE)}:{node.lineno}")
    return found


def scopes(tree):
    """The statements of a module and of its classes: functions and methods, for the most part."""
    bodies = [n.body for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef)]
    return [node for body in bodies for node in body if not isinstance(node, ast.ClassDef)]


def assigned(scope):
    """What is assigned to a name in a function, if only once."""
    values = {}
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            values.setdefault(ast.unparse(node.targets[0]), []).append(node.value)
    return {name: value for name, (value, *others) in values.items() if not others}


def raised(node):
    """The message in a call that makes an exception, or in one that raises, notes or prints it.

    That of `assert_derivatives` is a table, whose first line is made elsewhere. An `assert` is for
    what no user can cause.
    """
    match node:
        case ast.Call(func=ast.Name(id=name), args=[message, *_]) if name.endswith("Error"):
            yield message
        case ast.Call(func=ast.Name(id="require"), args=[_, _, message]):
            yield ast.JoinedStr([ast.Constant("assert_derivatives: "), message])
        case ast.Call(func=ast.Attribute(attr="error" | "add_note"), args=[message]):
            yield message
        case ast.Call(func=ast.Name(id="print"), args=[message], keywords=[ast.keyword("file")]):
            yield message
        case ast.JoinedStr() if skeleton(node, {}).startswith("assert_derivatives: "):
            yield node


def skeleton(node, texts):
    """A message with … for each part that varies, and the text of names that do not."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(skeleton(part, texts) for part in parts)
        case ast.FormattedValue(value=value):
            return skeleton(value, texts)
        case ast.Name(id=name) if name in texts:
            return skeleton(texts[name], texts)
    return "…"


# ---------------------------------------------------------------------------- entries of the page

PARTS = re.split(r"^## Error messages$", PAGE.read_text(), flags=re.MULTILINE)
ENTRIES = [" ".join(entry.split()) for entry in re.findall(r"\*\*`([^`]+)`\*\*", PARTS[-1])]
MESSAGES = skeletons()


def message_of(entry):
    """The message that an entry is about: of those that it may be, the one with the most words.

    An entry may say what stands in place of a …, such as the name of the argument.
    """
    fitting = [m for m in MESSAGES if re.fullmatch(re.escape(m).replace("…", ".+"), entry)]
    return max(fitting, key=lambda message: len(message.replace("…", "")), default=None)


def test_messages_are_found():
    assert len(MESSAGES) > 100
    assert len({place.partition(":")[0] for place in MESSAGES.values()}) > 20


def test_every_message_has_an_entry():
    explained = {message_of(entry) for entry in ENTRIES}
    assert {m: place for m, place in MESSAGES.items() if m not in explained} == {}


def test_every_entry_has_a_message():
    assert [entry for entry in ENTRIES if message_of(entry) is None] == []
    assert len(set(ENTRIES)) == len(ENTRIES)


def test_every_entry_says_why_and_what_to_do():
    _, *texts = re.split(r"\*\*`[^`]+`\*\*", PARTS[-1])
    assert len(texts) == len(ENTRIES)
    assert [text for text in texts if len(text.split()) < 8] == []
