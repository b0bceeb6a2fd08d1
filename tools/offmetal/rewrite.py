"""The few places where Metal's grammar is not that of C++ for OpenCL.

`rewrite` changes these token sequences and nothing else; line numbers stay, so that messages and reports point at the
kernel's own lines.

1. `threadgroup float buf[N];` in a function body becomes a reference to memory that the runtime gives each threadgroup.
2. Vector swizzles (`v.xz`, `v.xy = ...`) become member templates.
3. `thread` as the qualifier of a constructor goes away: clang would not use that constructor for temporaries.
4. `[[function_constant(n)]]` variables get a value.
5. `1.0bf` becomes `bfloat(1.0f)`.

`fix_conditional` repairs a sixth kind, which takes the compiler's types to find.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

Token = tuple[str, str]
"""Kind (a group of `_TOKEN`) and text."""

_TOKEN: Final = re.compile(
    r"""
    (?P<comment>//[^\n]*|/\*.*?\*/)
  | (?P<directive>\#[ \t]*(?:include|line|pragma)\b[^\n]*)
  | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
  | (?P<number>\.?[0-9](?:[eEpP][+-]|[0-9a-zA-Z_.'])*)
  | (?P<word>[A-Za-z_]\w*)
  | (?P<space>\s+|\\\n)
  | (?P<mark>->\*?|<<=?|>>=|\+\+|--|[-+*/%&|^!=<>]=|&&|\|\||::|\[\[|\]\]|\#\#?|.)
    """,
    re.X | re.S,
)
_BLANK: Final = ("space", "comment", "directive")

_SWIZZLE: Final = re.compile(r"(?:[xyzw]{2,4}|[rgba]{2,4})\Z")
_ASSIGNMENTS: Final = ("=", "+=", "-=", "*=", "/=", "&=", "|=", "^=")
_BFLOAT: Final = re.compile(r"(\d[\d.']*(?:[eE][+-]?\d+)?)bf\Z")


def tokenize(text: str) -> list[Token]:
    return [(match.lastgroup or "", match.group()) for match in _TOKEN.finditer(text)]


def rewrite(text: str) -> str:
    tokens = tokenize(text)
    out = [token for _, token in tokens]
    code = [i for i, (kind, _) in enumerate(tokens) if kind not in _BLANK]

    def at(n: int) -> str:
        """The nth token that is code."""
        return tokens[code[n]][1] if 0 <= n < len(code) else ""

    classes = {at(n + 1) for n in range(len(code)) if at(n) in ("struct", "class")}
    # a name that is declared somewhere is a member, not a swizzle
    declared = {at(n) for n in range(len(code)) if _SWIZZLE.match(at(n)) and at(n - 1) not in (".", "->")}

    rewritten_to = -1
    declarations = 0
    for n, i in enumerate(code):
        kind, token = tokens[i]
        if n < rewritten_to:
            continue
        if kind == "number":
            bfloat = _BFLOAT.match(token)
            if bfloat:
                out[i] = f"bfloat({bfloat[1]}{'' if '.' in bfloat[1] else '.0'}f)"
        elif token == "threadgroup" and at(n - 1) in ("", ";", "{", "}"):
            end = _threadgroup_variables(tokens, code, n, out, declarations)
            if end:
                declarations += 1
                rewritten_to = end
        elif token == "thread" and at(n - 1) == ")" and _ends_constructor(at, n - 1, classes):
            out[i] = " " * len(token)
        elif kind == "word" and at(n - 1) in (".", "->") and _SWIZZLE.match(token):
            if token not in declared and at(n + 1) != "(":
                letters = "xyzw" if token[0] in "xyzw" else "rgba"
                components = ",".join(str(letters.index(letter)) for letter in token)
                written = "ref" if at(n + 1) in _ASSIGNMENTS else ""
                out[i] = f"template __swz{written}<{components}>()"
        elif token == "function_constant" and at(n - 1) == "[[" and at(n + 4) == "]]":
            for j in range(code[n - 1], code[n + 4] + 1):
                out[j] = ""
            out[code[n - 1]] = f"= __msl_function_constant<{at(n + 2)}>::value"
    return "".join(out)


def _ends_constructor(at: Callable[[int], str], n: int, classes: set[str]) -> bool:
    """Whether the `)` at n ends the parameters of a constructor."""
    depth = 0
    while n >= 0:
        depth += (at(n) == ")") - (at(n) == "(")
        if not depth:
            return at(n - 1) in classes and at(n - 2) != "operator"
        n -= 1
    return False


def _threadgroup_variables(tokens: list[Token], code: list[int], n: int, out: list[str], number: int) -> int:
    """Rewrite the declaration of threadgroup variables at code[n], the `number`th of the text. The index in `code`
    behind its `;`, or 0 where it is something else: a parameter, a pointer, a function."""
    angle = square = 0
    declarators: list[list[str]] = [[]]
    for end in range(n + 1, len(code)):
        token = tokens[code[end]][1]
        if not angle and not square:
            if token in ("*", "&", "(", ")", "{", "}", "="):
                return 0
            if token == ";":
                break
            if token == ",":
                declarators.append([])
                continue
        angle += (token == "<") - (token == ">") - 2 * (token == ">>")
        square += (token == "[") - (token == "]")
        declarators[-1].append(token)
    else:
        return 0
    # the first declarator has the type before its name
    first = declarators[0]
    name_at = _dimensions(first) - 1
    if name_at < 1:
        return 0
    kind = " ".join(first[:name_at])
    declarators[0] = first[name_at:]
    made = ""
    for k, (name, *dimensions) in enumerate(declarators):
        array = f"__tgt_{name}"
        made += (
            f"typedef {kind} {array} {' '.join(dimensions)}; threadgroup {array}& {name} = *(threadgroup {array}*)"
            f'__msl_tg_alloc("{name}", MSL_TG_ID({number * 16 + k}), sizeof({array}), alignof({array})); '
        )
    start, stop = code[n], code[end]
    newlines = sum(token.count("\n") for _, token in tokens[start : stop + 1])
    out[start : stop + 1] = [made + "\n" * newlines] + [""] * (stop - start)
    return end + 1


def _dimensions(declarator: list[str]) -> int:
    """The index of the first `[` that is no part of a template argument, or the length."""
    angle = 0
    for index, token in enumerate(declarator):
        if token == "[" and not angle:
            return index
        angle += (token == "<") - (token == ">") - 2 * (token == ">>")
    return len(declarator)


def fix_conditional(text: str, line: int, column: int) -> str | None:
    """`text` with both results of the conditional operator at this place, counted from 1, made values: `c ? a : b` ->
    `c ? __msl_rv(a) : __msl_rv(b)`. None if that is not what stands there.

    In C++ for OpenCL the type of a variable includes its address space, and `?:` refuses a variable of class type
    beside a temporary; Metal's vectors and bfloat are built in and have no such problem.
    """
    start = sum(len(before) + 1 for before in text.split("\n")[: line - 1]) + column - 1
    if text[start : start + 1] != "?":
        return None
    position, depth, nested, colons = start + 1, 0, 0, 0
    results: list[list[tuple[int, str]]] = [[], []]  # of each result, the tokens and where they begin
    for kind, token in tokenize(text[start + 1 :]):
        here, position = position, position + len(token)
        if kind in _BLANK:
            continue
        if depth == 0:
            if token in (")", "]", "}", "]]", ";") or (token == "," and colons):
                break
            if token == ":" and not nested:
                colons += 1
                if colons == 2:
                    break
                continue
            nested += (token == "?") - (token == ":")
        depth += (token in ("(", "[", "{", "[[")) - (token in (")", "]", "}", "]]"))
        results[colons].append((here, token))
    else:
        return None
    if not all(results) or results[0][0][1] == "__msl_rv":
        return None
    for result in reversed(results):
        (first, _), (last, token) = result[0], result[-1]
        end = last + len(token)
        text = f"{text[:first]}__msl_rv({text[first:end]}){text[end:]}"
    return text
