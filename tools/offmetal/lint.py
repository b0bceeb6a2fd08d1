"""Finds what clang accepts and Metal's compiler does not.

Reads the syntax tree that clang prints. In C++ for OpenCL a pointer without an address space points to the generic one,
which Metal does not have; it shows as `__generic` or, in a template, as a pointer to an unqualified type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from offmetal.places import Place, places
from offmetal.rewrite import tokenize

Finding = tuple[str, int, str]
"""File, line, what is wrong there."""

_NODE: Final = re.compile(
    r"^([| `-]*)(\w+) 0x[0-9a-f]+ (?:parent 0x\w+ )?(?:prev 0x\w+ )?<(.*?)>"
    r"(?: (\S+:\d+:\d+|line:\d+:\d+|col:\d+))? ?(.*)$"
)
_PLACE: Final = re.compile(r"line:(\d+):\d+|col:\d+|([^\s,<>]+):(\d+):\d+")
_SPACES: Final = ("__global", "__local", "__constant", "__private")
_CASTS: Final = ("CStyleCastExpr", "CXXReinterpretCastExpr", "CXXStaticCastExpr", "CXXFunctionalCastExpr")
# The library's own classes, whose members are there for every address space.
_LIBRARY_CLASS: Final = re.compile(
    r"(metal::)?(vec|bfloat|atomic|__msl\w*|simdgroup|matrix|uniform|array)\b|bfloat|\w+[234](x\d)?$|.*_t$"
)
_BANNED: Final = {
    "goto": "goto",
    "thread_local": "thread_local",
    "register": "register",
    "typeid": "typeid",
    "dynamic_cast": "dynamic_cast",
    "std": "the C++ standard library",
}

_BANNED_NODES: Final = {
    "LambdaExpr": "not every version of Metal has lambda expressions",
    "CXXNoexceptExpr": "Metal does not have the operator noexcept",
    "GCCAsmStmt": "Metal does not have inline assembly",
}

_SAY_SPACE: Final = "must say device, constant, threadgroup or thread"


def check(tree: str, header: str, header_name: str, source: str, source_name: str) -> list[Finding]:
    """What is wrong in the two texts, the body of the kernel and what stands before it; `tree` is of the whole."""
    own = {file for file, _ in places(header, header_name) + places(source, source_name)}
    found = set(_in_tree(tree, own))
    found |= set(_banned_words(header, header_name)) | set(_banned_words(source, source_name))
    found |= set(_threadgroup_variables(header, header_name))
    return sorted(found)


@dataclass(frozen=True, slots=True)
class _Node:
    kind: str
    rest: str
    place: Place
    parents: tuple[tuple[str, str], ...]
    """Kind and rest of the nodes above, the nearest last."""

    @property
    def type(self) -> str:
        quoted = re.search(r"'([^']*)'", self.rest)
        return quoted[1] if quoted else ""


def _nodes(tree: str, own: set[str]) -> Iterator[_Node]:
    """The nodes that lie in a file of `own`. The dump names file and line only where they differ from those before."""
    file, line = "", 0
    stack: list[tuple[str, str]] = []
    for text in tree.splitlines():
        match = _NODE.match(text)
        if not match:
            continue
        indent, kind, extent, place, rest = match.groups()
        del stack[len(indent) // 2 :]
        located = False
        for part in _PLACE.finditer(f"{extent} {place or ''}"):
            if part[1]:
                line = int(part[1])
            elif part[2]:
                file, line = part[2], int(part[3])
            located = True
        if located and file in own:
            yield _Node(kind, rest, (file, line), tuple(stack))
        stack.append((kind, rest))


def _in_tree(tree: str, own: set[str]) -> Iterator[Finding]:
    for node in _nodes(tree, own):
        parent = node.parents[-1][0] if node.parents else ""
        if node.kind in _BANNED_NODES:
            yield *node.place, _BANNED_NODES[node.kind]
        if node.kind in ("ParmVarDecl", "VarDecl", "FieldDecl"):
            # what the compiler adds itself, such as a copy constructor, says `implicit` before its type
            above = (*(rest for _, rest in node.parents), node.rest)
            if any(rest.split("'")[0].startswith("implicit") for rest in above):
                continue
            named = re.search(r"(\w+) '", node.rest)
            name = named[1] if named and named[1] not in ("used", "referenced") else "(unnamed)"
            if _lacks_space(node.type) and not name.startswith("__"):
                yield *node.place, f"`{name}`: a pointer or reference {_SAY_SPACE}"
            kept = node.kind == "VarDecl" and re.search(r"' static\b", node.rest)
            if kept and parent == "DeclStmt" and "__constant" not in node.type:
                yield *node.place, f"`{name}`: a static variable must be in the constant address space"
            outside = parent in ("", "NamespaceDecl", "TranslationUnitDecl")
            if node.kind == "VarDecl" and outside and "__constant" not in node.type:
                yield (
                    *node.place,
                    f"`{name}`: a variable outside of functions must be in the constant address space",
                )
        elif node.kind in _CASTS and "__generic" in node.type and "*" in node.type:
            yield *node.place, f"a cast to a pointer {_SAY_SPACE}"
        if any(space in node.type for space in _SPACES[:3]) and _is_object_of_method(node):
            yield (
                *node.place,
                "a member function of an object in device, constant or threadgroup memory needs that qualifier",
            )


def _is_object_of_method(node: _Node) -> bool:
    """Whether a member function without a qualifier is called for the node: its address space is then cast away."""
    if len(node.parents) < 2 or node.parents[-2][0] != "MemberExpr":
        return False
    kind, rest = node.parents[-1]
    if kind != "ImplicitCastExpr" or "<AddressSpaceConversion>" not in rest:
        return False
    quoted = re.search(r"'([^']*)'", rest)
    name = re.sub(r"\b(const|volatile|__generic)\b", "", quoted[1] if quoted else "").strip(" *")
    return not _LIBRARY_CLASS.match(name)


def _lacks_space(kind: str) -> bool:
    """Whether a declared type has a pointer or reference without an address space."""
    if "(" in kind:
        return False  # functions and arrays by reference: what they refer to shows elsewhere
    plain, before = re.sub(r"\[[^\]]*\]", "", kind), ""
    while plain != before:
        plain, before = re.sub(r"<[^<>]*>", "", plain), plain
    *pointees, _ = re.split(r"[*&]", plain)
    return any(not any(space in pointee for space in _SPACES) for pointee in pointees)


def _banned_words(text: str, name: str) -> Iterator[Finding]:
    """Words that Metal's restrictions rule out and clang lets pass."""
    where, line = places(text, name), 0
    for kind, token in tokenize(text):
        if kind == "word" and token in _BANNED:
            yield *where[line], f"Metal does not have {_BANNED[token]}"
        line += token.count("\n")


def _threadgroup_variables(header: str, name: str) -> Iterator[Finding]:
    """Threadgroup variables in functions of the header: Metal allows them in the kernel itself only."""
    where, line, depth, before = places(header, name), 0, 0, ""
    tokens = tokenize(header)
    for index, (kind, token) in enumerate(tokens):
        depth += (token == "{") - (token == "}")
        if token == "threadgroup" and depth and before in (";", "{", "}"):
            declaration = "".join(token for _, token in tokens[index : index + 40]).split(";")[0]
            if not any(mark in declaration for mark in "*&("):
                yield *where[line], "threadgroup variables can be declared in the kernel itself only"
        if kind not in ("space", "comment", "directive"):
            before = token
        line += token.count("\n")
