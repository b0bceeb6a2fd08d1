"""What `mx.compile` makes of elementwise primitives: one kernel of several, by the algorithm of mlx/compile.cpp.

tests/benchmarks holds it against `mx.compile` itself.
"""

from __future__ import annotations

from ledger.graph import Array, Node

_UNARY = """Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh AsType Ceil Cos Conjugate Cosh Remainder Erf ErfInv Exp
    Floor Log Log1p LogicalNot Negative Round Sigmoid Sign Sin Sinh Square Sqrt Tan Tanh Expm1 Real Imag
    BitwiseInvert""".split()
_BINARY = """Add Divide Equal Greater GreaterEqual Less LessEqual LogicalAnd LogicalOr LogAddExp Maximum Minimum
    Multiply NotEqual Power Subtract BitwiseBinary ArcTan2""".split()
_FUSABLE = {*_UNARY, *_BINARY, "Select", "Broadcast"}  # compile.cpp, is_fusable
_DEPTH, _ARRAYS = 11, 24  # compile.cpp, max_compile_depth, max_compile_arrays


def fuse(every: list[Node], outputs: list[Array]) -> list[Node]:
    """Join the elementwise primitives of each compiled region as compile_fuse in mlx/compile.cpp does."""
    members: dict[int, list[Node]] = {}
    for node in every:
        if node.region is not None:
            members.setdefault(node.region, []).append(node)
    users: dict[int, list[Node]] = {}
    for node in every:
        for array in node.inputs:
            users.setdefault(id(array), []).append(node)
    final = {id(a) for a in outputs}
    joined: dict[int, Node] = {}
    for nodes in members.values():
        inside = {id(n) for n in nodes}
        consumers = {id(n): [u for u in users.get(id(n.outputs[0]), []) if id(u) in inside] for n in nodes}
        leaves = {
            id(n)
            for n in nodes
            if any(
                id(o) in final or any(id(u) not in inside for u in users.get(id(o), [])) for o in n.outputs
            )
        }
        done: set[int] = set()
        for node in reversed(nodes):
            if id(node) in done or node.name == "Broadcast" or node.name not in _FUSABLE:
                continue
            group = _group(node, inside, consumers, leaves)
            if len(group) > 1:
                done |= {id(n) for n in group}
                _join(group, users, final, joined)
    result: list[Node] = []
    for node in every:
        compiled = joined.get(id(node))
        if compiled is None:
            result.append(node)
        elif compiled.parts[-1] is node:
            result.append(compiled)
    return _ordered(result)


def _group(last: Node, inside: set[int], consumers: dict[int, list[Node]], leaves: set[int]) -> list[Node]:
    """What compile_fuse's first recursion collects from `last` upwards."""
    cache: dict[int, Node] = {}
    inputs: set[int] = set()

    def visit(node: Node | None, array: Array, depth: int) -> None:
        if node is not None and id(node) in cache:
            return
        if (
            depth >= _DEPTH
            or node is None
            or id(node) not in inside
            or node.name not in _FUSABLE
            or (id(node) in leaves and array.shape != last.outputs[0].shape)
        ):
            inputs.add(id(array))
            return
        used_elsewhere = depth and not all(id(u) in cache for u in consumers[id(node)])
        if used_elsewhere and (node.name != "Broadcast" or len(inputs) >= _ARRAYS):
            inputs.add(id(array))
            return
        if id(node) in leaves:
            inputs.add(id(array))
        else:
            inputs.discard(id(array))
        if len(inputs) >= _ARRAYS:
            return
        cache[id(node)] = node
        for each in node.inputs:
            visit(each.source, each, depth + 1)

    visit(last, last.outputs[0], 0)
    return list(cache.values())


def _join(group: list[Node], users: dict[int, list[Node]], final: set[int], joined: dict[int, Node]) -> None:
    """One `Compiled` node for the group. A broadcast that others use, too, stays beside its copy in the group."""
    ids = {id(n) for n in group}
    inputs: list[Array] = []
    for node in group:
        for array in node.inputs:
            if (array.source is None or id(array.source) not in ids) and array not in inputs:
                inputs.append(array)
    outputs = [
        n.outputs[0]
        for n in group
        if n.name != "Broadcast"
        and (id(n.outputs[0]) in final or any(id(u) not in ids for u in users.get(id(n.outputs[0]), [])))
    ]
    last = group[0]
    parts = [*reversed(group[1:]), last]
    node = Node("Compiled", inputs, outputs, None, last.path, last.region, parts)
    for part in parts:
        shared = part.name == "Broadcast" and any(
            id(u) not in ids for u in users.get(id(part.outputs[0]), [])
        )
        if not shared:
            joined[id(part)] = node
    for output in outputs:
        output.source = node


def _ordered(nodes: list[Node]) -> list[Node]:
    """The nodes, each behind those that it reads."""
    made = {id(o): n for n in nodes for o in n.outputs}
    placed: set[int] = set()
    result: list[Node] = []
    for root in nodes:
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, ready = stack.pop()
            if ready:
                if id(node) not in placed:
                    placed.add(id(node))
                    result.append(node)
            elif id(node) not in placed:
                stack.append((node, True))
                stack.extend((made[id(a)], False) for a in node.inputs if id(a) in made)
    return result
